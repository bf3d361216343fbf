"""From rows to prompts and references: keys, templates, token ids, and what is refused."""

import hashlib

import pytest
from test_data import CHAT_TEMPLATE, EOS, TOKENIZER, VOCABULARY, ids, own_cache, word_tokenizer, write  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts, fingerprint
from rlseq.data.rows import load_prompts
from rlseq.errors import DataError


def test_a_row_becomes_a_prompt_with_its_ids_references_and_other_columns():
    (prompt,) = build_prompts([{"prompt": "a b = ", "references": ["A B", "B", "A B"], "level": 3}], TOKENIZER)
    assert prompt.prompt == "a b = "
    assert prompt.prompt_ids == ids("a b =")
    assert prompt.columns == {"references": ["A B", "B"], "level": 3}


def test_columns_are_named_and_templates_make_their_text():
    rows = [{"word": "ab", "sounds": "A-B", "weight": 2}]
    by_column = build_prompts(rows, TOKENIZER, prompt_column="word", reference_column="sounds")[0]
    assert (by_column.prompt, by_column.columns["references"]) == ("ab", ["A-B"])
    assert by_column.columns["word"] == "ab"
    by_template = build_prompts(
        rows,
        TOKENIZER,
        prompt_template="{{ word | list | join(' ') }} = ",
        reference_template="{{ sounds | replace('-', ' ') }}",
    )[0]
    assert by_template.prompt == "a b = "
    assert by_template.prompt_ids == ids("a b =")
    assert by_template.columns == {"word": "ab", "sounds": "A-B", "weight": 2, "references": ["A B"]}


@pytest.mark.parametrize(("given", "expected"), [(7, ["7"]), (2.5, ["2.5"]), (None, []), ([], []), ("A", ["A"])])
def test_a_reference_becomes_a_list_of_texts(given, expected):
    (prompt,) = build_prompts([{"prompt": "a", "references": given}], TOKENIZER)
    assert prompt.columns["references"] == expected


def test_without_a_column_of_references_there_are_none():
    for options in ({}, {"reference_column": None}):
        assert build_prompts([{"prompt": "a"}], TOKENIZER, **options)[0].columns["references"] == []


def test_merging_gathers_the_references_of_equal_prompts_in_order():
    rows = [{"prompt": p, "references": r} for p, r in (("a", "A"), ("b", "B"), ("a", ["C", "A"]), ("a", "D"))]
    merged = build_prompts(rows, TOKENIZER, merge_references=True)
    assert [(p.prompt, p.columns["references"]) for p in merged] == [("a", ["A", "C", "D"]), ("b", ["B"])]
    assert len(build_prompts(rows, TOKENIZER)) == 4


def test_keys_are_distinct_also_for_equal_rows_and_do_not_depend_on_order_or_company():
    rows = [{"prompt": p, "references": r} for p, r in (("a", "A"), ("a", "B"), ("b", "A"), ("a", "A"), ("a", "A"))]
    prompts = build_prompts(rows, TOKENIZER)
    keys = [p.key for p in prompts]
    assert len(set(keys)) == 5
    assert [p.key for p in build_prompts(rows[::-1], TOKENIZER)][2] == keys[2]
    assert {p.key for p in build_prompts(rows[::-1], TOKENIZER)} == set(keys)
    assert build_prompts(rows[2:3], TOKENIZER)[0].key == keys[2]
    # Pinned: a key that changes makes every recorded run's noise another. BLAKE2b of ["a", ["A"]] as JSON.
    assert keys[0] == hashlib.blake2b(b'["a", ["A"]]', digest_size=8).hexdigest()
    assert keys[3:] == [f"{keys[0]}-2", f"{keys[0]}-3"]


def test_the_fingerprint_tells_other_rows_order_or_tokens():
    prompts = build_prompts([{"prompt": "a b"}, {"prompt": "c"}], TOKENIZER)
    assert fingerprint(prompts) == fingerprint(build_prompts([{"prompt": "a b"}, {"prompt": "c"}], TOKENIZER))
    assert len({fingerprint(p) for p in (prompts, prompts[::-1], prompts[:1])}) == 3


def test_chat_messages_go_through_the_chat_template():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "a b"}]
    (prompt,) = build_prompts([{"prompt": messages, "references": "A"}], tokenizer)
    assert prompt.prompt_ids == ids("<user> a b <answer>")
    assert prompt.prompt == messages
    assert prompt.text == "a b"
    (shouted,) = build_prompts([{"prompt": messages}], tokenizer, chat_template_kwargs={"shout": True})
    assert shouted.prompt_ids == ids("<user> a b <answer> =")


def test_a_limit_keeps_the_first_rows(tmp_path):
    path = write(tmp_path / "test.jsonl", [{"prompt": x} for x in "abcd"])
    assert [p.text for p in load_prompts(str(path), TOKENIZER, split="test", limit=3)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the data set is empty"),
        ([{"promt": "a"}], {}, r"no column 'prompt' \(--prompt_column\); its columns are promt. Did you mean 'promt'?"),
        ([{"prompt": "a", "sound": "A"}], {"reference_column": "sounds"}, r"\(--reference_column\).* 'sound'?"),
        ([{"prompt": "a"}, {"prompt": ""}], {}, "row 1: the prompt is ''; expected text or a list of chat messages"),
        ([{"prompt": None}], {}, "row 0: the prompt is None"),
        ([{"prompt": 12}], {}, "row 0: the prompt is 12"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], {}, "row 1: .* cannot be mixed"),
        ([{"prompt": " "}], {}, "the prompt ' ' has no tokens"),
        ([{"prompt": "a", "references": {"x": 1}}], {}, "row 0: the reference is {'x': 1}; expected a text or a list"),
        ([{"prompt": "a", "references": [1]}], {}, r"the reference is \[1\]"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], {}, "chat messages, but the tokenizer has no chat template"),
        (
            [{"word": "a"}],
            {"prompt_template": "{{ wrod }}"},
            "--prompt_template .*'wrod' is undefined; the columns are word",
        ),
        ([{"word": "a"}], {"prompt_template": "{{ word"}, "--prompt_template is not a valid template"),
        ([{"prompt": "a"}], {"reference_template": "{{ x }}"}, "--reference_template .*'x' is undefined"),
    ],
)
def test_rows_that_make_no_prompt_are_refused(rows, options, message):
    with pytest.raises(DataError, match=message):
        build_prompts(rows, TOKENIZER, **options)


def test_a_template_cannot_reach_outside_of_its_row():
    with pytest.raises(DataError):
        build_prompts([{"w": "a"}], TOKENIZER, prompt_template="{{ w.__class__.__mro__[1].__subclasses__() }}")


def references(prompt, texts, tokenizer=TOKENIZER, stops=(EOS,)):
    (built,) = build_prompts([{"prompt": prompt, "references": texts}], tokenizer)
    return reference_ids(built, tokenizer, stops)


def test_references_are_completions_ended_by_one_stop_id():
    assert references("a b = ", ["A B", "B"]) == [ids("A B <eos>"), ids("B <eos>")]
    assert references("a = ", ["A <eos>", "B <eos> C <eos>"]) == [ids("A <eos>"), ids("B <eos>")]
    assert references("a = ", [""]) == [ids("<eos>")]
    assert references("a = ", []) == []


def test_any_stop_id_ends_a_reference_and_the_first_is_appended():
    h = VOCABULARY.index("H")
    assert references("a = ", ["A H B", "A B"], stops=(EOS, h)) == [ids("A H"), ids("A B <eos>")]
    assert references("a = ", ["A B"], stops=(h, EOS)) == [ids("A B H")]


def test_references_of_equal_tokens_are_one():
    assert references("a = ", ["A  B", "A B", "A B <eos>"]) == [ids("A B <eos>")]


def test_a_reference_that_moves_the_boundary_is_tokenised_by_itself():
    # "a" and "b" as one string is the unknown word "ab": its first token is not the prompt's.
    assert references("a", ["b"]) == [ids("b <eos>")]


def test_prompt_and_reference_are_tokenised_as_one_string_where_that_keeps_the_prompt():
    # A tokenizer for which a word's form depends on what stands before it, as byte-level ones are.
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "▁a": 2, "▁b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    spaced = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    (prompt,) = build_prompts([{"prompt": " a", "references": " b"}], spaced)
    assert (prompt.prompt_ids, reference_ids(prompt, spaced, (1,))) == ((2,), [(3, 1)])


def test_a_chat_reference_is_what_the_template_makes_of_the_answer():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "a b"}]
    assert references(messages, ["A B", "C"], tokenizer) == [ids("A B <eos>"), ids("C <eos>")]


def test_images_in_columns_and_messages_are_refused_by_place():
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "url": "x.png"}]
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "user", "content": content}]}]
    with pytest.raises(
        DataError, match=r"^row 1: a message of the role 'user' holds an image, but rlseq serves only text"
    ):
        build_prompts(rows, None)
    for column, value in (("image", "x.png"), ("images", ["x.png"])):
        with pytest.raises(DataError, match=f"^row 0: column '{column}' holds an image"):
            build_prompts([{"prompt": "a", column: value}], None)
