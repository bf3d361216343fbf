"""The bundled rewards, each against hand arithmetic or an independent tool."""

from __future__ import annotations

import json
import math
import random
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlseq.scoring import load_rewards
from rlseq.scoring.specs.find import bundled_folder, find
from rlseq.scoring.specs.reward_files import describe_file

BUNDLED = sorted(path.stem for path in bundled_folder().glob("[!_]*.py"))
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def bundled(name):
    return find(name, Path("/nowhere")).function


def test_every_bundled_reward_loads_and_says_what_it_is():
    for name in BUNDLED:
        assert load_rewards([name], search_root="/nowhere").names == [name]
        assert describe_file(bundled_folder() / f"{name}.py")["description"].endswith((".", ":"))
    assert len(BUNDLED) == 26
    assert not (bundled_folder() / "__init__.py").exists()


# Overlap and distance


def edit_distance(a, b):
    """The textbook recursion, an oracle too slow for use."""

    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


def test_phoneme_accuracy_by_hand():
    reward = bundled("phoneme_accuracy")
    # AH B AE N -> AH B N: one deletion of 4 phonemes
    value, details = reward("AH B N", ["AH B AE N"])
    assert value == 0.75
    assert details == {"edits": 1, "length": 4, "word_error": 1, "words": 1}
    # one edit from both; 1/5 an phoneme is the shorter normalised error
    assert reward("A B C D", ["A B C", "A B C D E"])[1]["length"] == 5
    # fewer edits win over a smaller ratio: 1 of 1 before 2 of 9
    assert reward("Z", ["A", "Z Y X"])[1] == {"edits": 1, "length": 1, "word_error": 1, "words": 1}
    assert reward("", ["A B"])[0] == 0.0
    assert reward("A B C D E", ["X"])[0] == 0.0  # more edits than phonemes: not below 0
    assert reward("A B", ["A C", "A B"])[1]["word_error"] == 0


def test_phoneme_accuracy_agrees_with_the_recursion_on_random_words():
    reward, rng = bundled("phoneme_accuracy"), random.Random(0)
    for _ in range(200):
        guess = [rng.choice("ABC") for _ in range(rng.randrange(7))]
        targets = [[rng.choice("ABC") for _ in range(rng.randrange(1, 7))] for _ in range(rng.randrange(1, 4))]
        details = reward(" ".join(guess), [" ".join(target) for target in targets])[1]
        distances = [edit_distance(tuple(guess), tuple(target)) for target in targets]
        assert details["edits"] == min(distances)
        nearest = [len(t) for t, d in zip(targets, distances, strict=True) if d == min(distances)]
        assert details["length"] == max(nearest)


def test_per_and_wer_are_ratios_of_sums_not_means_of_ratios():
    suite = load_rewards(["phoneme_accuracy"])
    sums = {
        "edits": np.array([3, 1]),
        "length": np.array([12, 4]),
        "word_error": np.array([1, 1]),
        "words": 2,
    }
    np.testing.assert_allclose(suite.corpus["per"].compute(sums), [0.25, 0.25])
    np.testing.assert_allclose(suite.corpus["wer"].compute(sums), [0.5, 0.5])
    assert suite.corpus["per"].reward == "phoneme_accuracy"
    assert not suite.corpus["per"].higher_is_better


def test_exact_match_ignores_white_space_at_the_ends_only():
    reward = bundled("exact_match")
    assert reward(" a b\n", ["x", "a b"]) == 1.0
    assert reward("a  b", ["a b"]) == 0.0
    assert reward("a b", "a b") == 1.0


def test_token_f1_by_hand():
    reward = bundled("token_f1")
    # {cat, sat, here} against {cat, sat}: 2 shared, precision 2/3, recall 1, F1 = 2*(2/3)/(5/3) = 0.8
    value, details = reward("The cat sat, here.", ["a cat sat", "dog"])
    assert value == pytest.approx(0.8)
    assert details == {"precision": pytest.approx(2 / 3), "recall": 1.0}
    assert reward("the", ["an"])[0] == 1.0  # both empty once articles are gone
    assert reward("", ["cat"])[0] == 0.0
    assert reward("x x", ["x"])[0] == pytest.approx(2 / 3)  # a bag, not a set
    assert reward("The", ["the"], normalize=False)[0] == 0.0


def test_error_rate_counts_words_characters_and_tokens(tiny_tokenizer):
    reward = bundled("error_rate")
    assert reward("the cat sat", ["the cat sat down"]) == (0.75, {"edits": 1, "length": 4})
    # kitten -> sitting: 3 edits of 7 characters
    assert reward("kitten", "sitting", unit="character") == (pytest.approx(4 / 7), {"edits": 3, "length": 7})
    # a word-level tokenizer that knows a and b only: "a b" against "a a b"
    assert reward("a b", "a a b", unit="token", tokenizer=tiny_tokenizer)[1] == {"edits": 1, "length": 3}
    with pytest.raises(ValueError, match="unit is 'sentence'"):
        reward("a", "b", unit="sentence")


SENTENCES = [
    ("the cat sat on the mat", ["the cat sat on a mat", "a cat was on the mat"]),
    ("a dog", ["the dog barked at the quick brown fox all day long"]),
    ("there is nothing in common here", ["completely different words"]),
    ("the quick brown fox jumps over the lazy dog .", ["the quick brown fox jumped over the lazy dog ."]),
    ("", ["something"]),
    ("on the mat the cat sat", ["the cat sat on the mat", "the cat sat on the mat today"]),
]


def sums_of(name, rows):
    reward = bundled(name)
    statistics = [reward(completion, references)[1] for completion, references in rows]
    return {key: sum(row[key] for row in statistics) for key in statistics[0]}


def transposed(rows):
    """References as sacrebleu takes them: one list a reference number, None where there are fewer."""
    most = max(len(references) for _, references in rows)
    return [[r[i] if i < len(r) else None for _, r in rows] for i in range(most)]


@pytest.mark.parametrize(
    ("name", "metric", "oracle"),
    [("bleu", "corpus_bleu", "BLEU"), ("chrf", "corpus_chrf", "CHRF"), ("ter", "corpus_ter", "TER")],
)
def test_corpus_scores_equal_sacrebleu_on_every_subset(name, metric, oracle):
    import sacrebleu

    corpus, scale = load_rewards([name]).corpus[metric], 100 if name == "ter" else 1
    rng = random.Random(1)
    subsets = [rng.choices(SENTENCES, k=rng.randrange(1, 5)) for _ in range(30)]
    subsets += [[SENTENCES[2]], [SENTENCES[1]]]
    sums = [sums_of(name, rows) for rows in subsets]
    ours = corpus.compute({key: np.array([s[key] for s in sums]) for key in corpus.statistics})
    for rows, value in zip(subsets, ours, strict=True):
        theirs = getattr(sacrebleu, oracle)().corpus_score([c for c, _ in rows], transposed(rows)).score
        assert scale * value == pytest.approx(theirs, abs=1e-9)
    assert corpus.higher_is_better is (name != "ter")


@pytest.mark.parametrize(
    ("name", "metric", "kwargs"),
    [
        ("bleu", "corpus_bleu", {}),
        ("bleu", "corpus_bleu", {"tokenize": "char", "lowercase": True}),
        ("chrf", "corpus_chrf", {"word_order": 2}),
        ("ter", "corpus_ter", {"normalized": True}),
    ],
)
def test_corpus_scores_follow_the_kwargs_and_say_so_in_sacrebleus_signature(name, metric, kwargs):
    import sacrebleu

    suite = load_rewards([{"func": name, "kwargs": kwargs}])
    statistics = [bundled(name)(completion, references, **kwargs)[1] for completion, references in SENTENCES]
    ours = suite.corpus[metric].compute({key: sum(row[key] for row in statistics) for key in statistics[0]})
    oracle = getattr(sacrebleu, {"bleu": "BLEU", "chrf": "CHRF", "ter": "TER"}[name])(**kwargs)
    theirs = oracle.corpus_score([c for c, _ in SENTENCES], transposed(SENTENCES))
    assert (100 if name == "ter" else 1) * ours == pytest.approx(theirs.score, abs=1e-9)
    assert str(oracle.get_signature()) in suite.corpus[metric].description


def test_corpus_compute_keeps_a_leading_axis_of_resamples_and_scalars():
    for name, metric in (("bleu", "corpus_bleu"), ("chrf", "corpus_chrf"), ("ter", "corpus_ter")):
        corpus, sums = load_rewards([name]).corpus[metric], sums_of(name, SENTENCES[:4])
        one = corpus.compute(sums)
        many = corpus.compute({key: np.full((5,), value) for key, value in sums.items()})
        assert np.shape(one) == ()
        np.testing.assert_allclose(many, np.full(5, one))


def test_sentence_scores_are_sacrebleus():
    import sacrebleu

    for completion, references in SENTENCES:
        bleu = sacrebleu.sentence_bleu(completion, references).score / 100
        assert bundled("bleu")(completion, references)[0] == pytest.approx(bleu)
        chrf = sacrebleu.sentence_chrf(completion, references, word_order=2).score / 100
        assert bundled("chrf")(completion, references, word_order=2)[0] == pytest.approx(chrf)
        ter = sacrebleu.sentence_ter(completion, references).score / 100
        assert bundled("ter")(completion, references)[0] == pytest.approx(max(0, 1 - ter))


def test_a_moved_block_is_one_edit_for_ter_and_several_for_the_word_error_rate():
    # "on the mat" moves as one block
    assert bundled("ter")("on the mat the cat sat", "the cat sat on the mat")[1]["edits"] == 1
    assert bundled("error_rate")("on the mat the cat sat", "the cat sat on the mat")[1]["edits"] > 1


def test_rouge_l_by_hand():
    # longest common subsequence of "the cat sat here" and "the dog sat": the sat = 2; precision 2/4, recall
    # 2/3
    value, details = bundled("rouge")("the cat sat here", ["the dog sat", "nothing"])
    assert details == {"precision": 0.5, "recall": pytest.approx(2 / 3)}
    assert value == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    # bigrams of "a b c" and "a b d": 1 of 2 shared
    assert bundled("rouge")("a b c", "a b d", kind="rouge2")[0] == 0.5


def test_rouge_refuses_references_in_which_it_knows_no_word():
    with pytest.raises(ValueError, match="finds no word in '你好 世界'"):
        bundled("rouge")("你好 世界", ["你好 世界"])
    assert bundled("rouge")("a", ["你好", "a"])[0] == 1.0
    assert bundled("rouge")("a", [""])[0] == 0.0


# Mathematics


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("so it is 18.", "#### 18", 1.0),
        ("$18.00", "18", 1.0),
        ("1,234 apples", "1234", 1.0),
        ("48-24", "24", 1.0),  # a difference: its last number is 24
        ("the sum is -24", "-24", 1.0),
        ("−24", "-24", 1.0),  # a typographic minus
        ("0.5", ".5", 1.0),
        ("#### 7 since 3+4", "7", 1.0),  # the first number after the mark
        ("first 18, then 19", "18", 0.0),
        ("180", "18", 0.0),
        ("none", "18", 0.0),
        ("", "18", 0.0),
        ("9" * 10_000, "18", 0.0),  # more digits than Python reads
        ("0." + "3" * 10_000, "18", 0.0),
    ],
)
def test_number_match(completion, reference, expected):
    assert bundled("number_match")(completion, [reference])[0] == expected


def test_number_match_refuses_a_reference_without_a_number():
    with pytest.raises(ValueError, match="no number in the reference 'none'"):
        bundled("number_match")("18", ["none"])


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"\boxed{2x + x}", "$3x$", 1.0),
        (r"\boxed{x^2}", "$x^3$", 0.0),
        ("#### 1,000", "1000", 1.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_math_equal(completion, reference, expected):
    assert bundled("math_equal")(completion, [reference])[0] == expected


def gsm8k_answers():
    if not GSM8K.exists():
        pytest.skip("the GSM8K training answers are not at ../shared/data/gsm8k")
    return [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def perturbed(answer):
    """The answer with its final number made one larger, read by another route than the rewards': the
    dataset's own convention (OpenAI's grade-school-math: the text after `#### `, commas removed)."""
    number = re.search(r"#### (-?[0-9.,]+)", answer)[1].replace(",", "")
    return re.sub(r"#### .*", f"#### {float(number) + 1:g}" if "." in number else f"#### {int(number) + 1}", answer)


@pytest.mark.parametrize("name", ["number_match", "math_equal"])
def test_every_gsm8k_answer_equals_itself_and_not_its_neighbour(name):
    reward, answers = bundled(name), gsm8k_answers()
    assert len(answers) == 7473
    assert [a for a in answers if reward(a, [a])[0] != 1.0] == []
    assert [a for a in answers if reward(perturbed(a), [a])[0] != 0.0] == []


# Form and shape


def test_regex_match():
    reward = bundled("regex_match")
    pattern = r"<think>.*</think>\d+"
    assert reward("<think>a\nb</think>12", pattern) == 1.0
    assert reward("x<think>a</think>12", pattern) == 0.0
    assert reward("x<think>a</think>12", pattern, whole=False) == 1.0


def test_json_schema():
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
    reward = bundled("json_schema")
    assert reward('{"n": 3}', schema) == (1.0, {"problem": None})
    assert reward('{"n": 3}', json.dumps(schema))[0] == 1.0
    assert reward('{"n": -3}', schema)[0] == 0.0
    assert "$.n" in reward('{"n": -3}', schema)[1]["problem"]
    assert reward('{"n": NaN}', schema)[0] == 0.0
    assert reward('{"n": 3', schema)[0] == 0.0
    assert reward("[" * 100_000, schema)[0] == 0.0
    value, details = reward("[" * 500 + "]" * 500, {"type": "array", "items": {"$ref": "#"}})
    assert value == 0.0 and details["problem"].startswith("cannot be checked: ")
    assert reward("1e999", {"type": "number", "multipleOf": 0.5})[0] == 0.0


def test_length_target_by_hand():
    reward = bundled("length_target")
    assert reward("", [1] * 10, target=10, tolerance=4) == (1.0, {"length": 10})
    assert reward("", [1] * 9, target=10, tolerance=4)[0] == 0.75
    assert reward("", [1] * 20, target=10, tolerance=4)[0] == 0.0
    assert reward("a bc", [], target=2, tolerance=1, unit="word")[0] == 1.0
    assert reward("a bc", [], target=4, tolerance=1, unit="character")[0] == 1.0


def test_overlong_penalty_is_equation_13_of_dapo():
    reward = bundled("overlong_penalty")
    # L_max = 20, L_cache = 5: free up to 15, then (15 - n) / 5, then -1
    for n, expected in [(0, 0), (15, 0), (16, -0.2), (19, -0.8), (20, -1), (21, -1), (100, -1)]:
        assert reward([0] * n, max_length=20, buffer=5) == pytest.approx(expected)


def test_repetition_penalty_by_hand():
    reward = bundled("repetition_penalty")
    # bigrams of a b a b a: ab ba ab ba; 2 distinct of 4
    assert reward("a b a b a", n=2) == -0.5
    assert reward("a b c d") == 0.0
    assert reward("") == 0.0


def test_group_diversity_by_hand():
    reward = bundled("group_diversity")
    # a b / a c: 1 edit of 2; a b / x: 2 of 2; a c / x: 2 of 2
    assert reward(["a b", "a c", "x"]) == [0.75, 0.75, 1.0]
    assert reward(["a"]) == [None]
    assert reward(["a", "a"]) == [0.0, 0.0]


# Controls


def test_own_log_prob_is_the_mean_or_the_sum():
    reward = bundled("own_log_prob")
    assert reward([5, 6], [-1.0, -3.0]) == -2.0
    assert reward([5, 6], [-1.0, -3.0], per_token=False) == -4.0
    assert reward([], []) == 0.0
    with pytest.raises(ValueError, match="0 log-probs for 2 tokens"):
        reward([5, 6], [])


def test_majority_vote():
    reward = bundled("majority_vote")
    assert reward(["7 ", "8", "7"]) == [1.0, 0.0, 1.0]
    assert reward(["8", "7"]) == [1.0, 0.0]
    assert reward(["is 7", "7!", "none"], pattern=r"(\d+)") == [1.0, 1.0, 0.0]
    assert reward(["none", "none"], pattern=r"\d") == [0.0, 0.0]


def test_bernoulli_ignores_the_text_repeats_itself_and_has_mean_p():
    reward, n = bundled("bernoulli"), 4000
    keys = [f"k{i // 4}" for i in range(n)]
    samples = [i % 4 for i in range(n)]
    first = reward(["x"] * n, keys, samples, p=0.3)
    assert reward(["other"] * n, keys, samples, p=0.3) == first
    assert reward(["x"] * n, keys, samples, SimpleNamespace(global_step=1), p=0.3) != first
    assert reward(["x"] * n, keys, samples, p=0.3, seed=1) != first
    assert abs(sum(first) / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)


def test_constant():
    assert bundled("constant")("x") == 1.0
    assert bundled("constant")("y", value=-2.0) == -2.0


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return str(folder)
