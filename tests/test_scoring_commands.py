"""`rlseq reward list | check | score | replay`, through the command line."""

from __future__ import annotations

import json
import math
import random

import pytest
from scipy import stats

from rlseq.cli import main
from rlseq.errors import RewardError, RunDirectoryError
from rlseq.scoring.check import corrupt, run_checks
from rlseq.scoring.rescore import compare, read_rollouts, score_by_step, spearman
from rlseq.scoring.suite import load_rewards
from rlseq.types import Prompt


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"sum of {i} and {i}: ", "answer": f"it is {2 * i}"} for i in range(1, 25)]
    return str(jsonl(tmp_path / "rows.jsonl", rows))


def save_tiny_model(folder):
    """A random model of 8 words, with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "d", "e", "f"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, eos_token_id=1, **sizes)).save_pretrained(folder)
    return str(folder)


def findings(spec, prompts, root="/nowhere"):
    return {check.question: check for check in run_checks(spec, prompts, root)}


def prompts(count=12):
    answers = [f"the answer to {i} is {i * 37 % 101}" for i in range(count)]
    return [Prompt(f"k{i}", f"question {i}?", (), {"references": [a]}) for i, a in enumerate(answers)]


def test_list_shows_the_bundled_rewards_and_those_beside_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text('def mine(completion):\n    """How mine it is."""\n    return 1\n')
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["bleu"].split()[1:5] == ["0", "to", "1", "text"]
    assert lines["own_log_prob"].split()[1:4] == ["-inf", "to", "0"]
    assert "How mine it is. [rewards/mine.py]" in lines["mine"]


def test_check_passes_a_sound_reward_and_exits_0(data, capsys):
    spec = '{"func": "exact_match", "columns": {"references": "answer"}}'
    assert main(["reward", "check", spec, "--dataset_name", data, "--reference_column", "answer"]) == 0
    out = capsys.readouterr().out
    assert "Nothing is wrong with it." in out
    assert "FAIL" not in out


def test_check_exits_1_for_a_reward_that_everything_satisfies(data, capsys):
    assert main(["reward", "check", "constant", "--dataset_name", data, "--reference_column", "answer"]) == 1
    out = capsys.readouterr().out
    assert "hackable by the empty string?" in out
    assert "Training will find this" in out


def test_check_without_data_tries_made_up_rows(capsys):
    assert main(["reward", "check", "number_match"]) == 0
    assert "made-up rows" in capsys.readouterr().err


def test_check_names_a_reward_that_cannot_be_found(capsys):
    assert main(["reward", "check", "exact_mach"]) == 1
    assert "Did you mean 'exact_match'" in " ".join(capsys.readouterr().out.split())


def test_check_names_a_missing_column(data, capsys):
    spec = '{"func": "regex_match"}'
    assert main(["reward", "check", spec, "--dataset_name", data]) == 1
    assert "asks for 'pattern'" in " ".join(capsys.readouterr().out.split())


POSITION = "def f(completions, **kwargs):\n    return [i for i, _ in enumerate(completions)]"
OUT_OF_RANGE = "from rlseq import reward\n@reward(range=(0, 1))\ndef f(completion):\n    return 2"


@pytest.mark.parametrize(
    ("source", "question"),
    [
        ("calls = []\ndef f(completion):\n    calls.append(1)\n    return len(calls) % 7", "the same twice"),
        (POSITION, "together equals one at a time"),
        (POSITION, "order does not matter"),
        ("def f(completion):\n    return 1 / len(completion)", "it survives strange completions"),
        ("def f(completion):\n    return float(completion.encode() != b'')", "it survives strange completions"),
        ("import time\ndef f(completion):\n    time.sleep(0.05)\n    return 0", "speed"),
        (OUT_OF_RANGE, "values are in the stated range"),
        ("def f(completion):\n    return -len(completion)", "hackable by the empty string?"),
        ("def f(completion):\n    return len(completion)", "hackable by the maximum length?"),
        ("def f(completion, prompt):\n    return 2 * (prompt == completion)", "hackable by the prompt copied?"),
        ("def f(completion):\n    return float('answer' in completion)", "a reference scores above a damaged one"),
        ("def f(completion):\n    return 'high'", "it runs on these rows"),
        ("def f(completions, **kwargs):\n    return [1.0]", "it runs on these rows"),
    ],
)  # fmt: skip
def test_check_finds_what_is_wrong(tmp_path, source, question):
    path = tmp_path / "f.py"
    path.write_text(source)
    found = findings({"func": f"{path}:f"}, prompts(1 if "sleep" in source else 12), tmp_path)
    assert found[question].passed is False
    assert found[question].advice or "returned" in found[question].finding


def test_check_survives_a_reward_that_hangs_on_a_strange_completion(tmp_path, monkeypatch):
    monkeypatch.setattr("rlseq.scoring.check.PATIENCE", 0.5)
    path = tmp_path / "f.py"
    path.write_text("def f(completion):\n    while '\\x00' in completion: pass\n    return len(completion) > 5")
    found = findings({"func": f"{path}:f"}, prompts(), tmp_path)
    assert found["it survives strange completions"].passed is False
    assert "a null character" in found["it survives strange completions"].finding


def test_a_group_reward_is_checked_group_by_group():
    found = findings({"func": "majority_vote"}, prompts())
    assert found["all groups together equal one group at a time"].passed
    assert found["a reference scores above a damaged one"].passed is None


def test_a_damaged_text_is_never_the_same_text():
    rng = random.Random(0)
    for text in ("a", "a a", "a a a a a", "x y", "7", "it is 12", ""):
        for _ in range(20):
            assert corrupt(text, rng).split() != text.split()


def test_check_samples_from_a_model_to_see_whether_grpo_would_learn(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a b {'c ' * i}", "references": ["a b"]} for i in range(4)])
    flags = ["--dataset_name", str(data), "--model_name_or_path", folder, "--max_completion_length", "6"]
    main(["reward", "check", "token_f1", *flags])
    table = " ".join(capsys.readouterr().out.split())
    assert "ok samples of a prompt differ in reward 4 of 4 groups (100%)" in table
    assert main(["reward", "check", "constant", *flags]) == 1
    assert "FAIL samples of a prompt differ in reward 0 of 4 groups" in " ".join(capsys.readouterr().out.split())


def test_check_names_a_model_that_cannot_be_loaded(capsys, tmp_path):
    assert main(["reward", "check", "constant", "--model_name_or_path", str(tmp_path / "none")]) == 2
    assert "cannot load --model_name_or_path" in capsys.readouterr().err


# Scoring and replaying logs


def record(step, key, sample, completion, total, **more):
    return {
        "step": step, "prompt_key": key, "sample": sample, "prompt": f"say {key}", "completion": completion,
        "references": ["one two"], "values": {"old": total}, "total": total, "length": len(completion.split()), **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    jsonl(
        tmp_path / "run" / "rollouts" / "000001.jsonl",
        [
            record(1, "p", 0, "one two", 1.0),
            record(1, "p", 1, "one", 0.0),
            record(1, "p", 2, "", 0.5),
            record(1, "q", 0, "two", 1.0),
            record(1, "q", 1, "one two", 0.0),
        ],
    )
    jsonl(
        tmp_path / "run" / "rollouts" / "000002.jsonl",
        [record(2, "p", 0, "one two", None), record(2, "p", 1, "x", 0.2)],
    )
    return tmp_path / "run"


def test_replay_compares_with_what_was_optimised_by_hand(run):
    # exact_match gives p: 1 0 0, q: 0 1, then (no logged total), 0
    # logged advantages p: + - 0, q: + -;   new p: + - -, q: - +
    # reversed: the two of q; gained: the third of p; step 2 has one rollout left, whose advantage is 0 on
    # both sides
    logged = read_rollouts(run)
    with load_rewards(["exact_match"]) as suite:
        totals = score_by_step(suite, logged).totals
    assert totals == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    found = compare(logged, totals)
    assert (found.rollouts, found.groups, found.varying) == (6, 2, 2)
    assert found.reversed == pytest.approx(2 / 6)
    assert found.gained == pytest.approx(1 / 6)
    assert found.lost == 0
    old = [1.0, 0.0, 0.5, 1.0, 0.0, 0.2]
    new = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert found.rank_correlation == pytest.approx(stats.spearmanr(old, new).statistic)
    by_group = [stats.spearmanr([1, 0, 0.5], [1, 0, 0]).statistic, -1.0]
    assert found.group_correlation == pytest.approx(sum(by_group) / 2)


def test_replaying_the_same_reward_changes_nothing(tmp_path):
    texts = ["one two", "one", "x", "one two three"]
    with load_rewards(["token_f1"]) as suite:
        first = [record(1, "p", i, text, 0.0) for i, text in enumerate(texts)]
        totals = score_by_step(suite, read_rollouts(jsonl(tmp_path / "a.jsonl", first))).totals
        again = read_rollouts(
            jsonl(tmp_path / "b.jsonl", [{**r, "total": t} for r, t in zip(first, totals, strict=True)])
        )
        found = compare(again, score_by_step(suite, again).totals)
    assert (found.reversed, found.gained, found.lost) == (0, 0, 0)
    assert found.rank_correlation == pytest.approx(1.0)


def test_replay_prints_the_comparison_and_writes_the_records(run, tmp_path, capsys):
    out = tmp_path / "new.jsonl"
    flags = ["--reward_funcs", "exact_match", "token_f1", "--reward_weights", "1", "0.5", "--output", str(out)]
    assert main(["reward", "replay", str(run), *flags]) == 0
    printed = capsys.readouterr().out
    assert "of advantages change sign" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[0]["values"] == {"exact_match": 1.0, "token_f1": 1.0}
    assert written[0]["total"] == 1.5
    assert written[0]["prompt"] == "say p"


def test_replay_scores_a_prompts_group_step_by_step(tmp_path):
    # the same prompt in two steps: the vote is taken within each
    records = [record(s, "p", i, text, 0.0) for s, texts in enumerate(["aab", "bbb"]) for i, text in enumerate(texts)]
    with load_rewards(["majority_vote"]) as suite:
        totals = score_by_step(suite, read_rollouts(jsonl(tmp_path / "r.jsonl", records))).totals
    assert totals == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_score_prints_moments_and_corpus_metrics(tmp_path, capsys):
    rows = [
        {"prompt": "a", "completion": "A B C D", "references": ["A B C E"]},
        {"prompt": "b", "completion": "A", "references": ["A"]},
    ]
    path = jsonl(tmp_path / "r.jsonl", rows)
    assert main(["reward", "score", "phoneme_accuracy", "--rollouts", str(path)]) == 0
    out = capsys.readouterr().out
    assert "per = 0.2 " in out  # 1 edit of 5 phonemes
    assert "wer = 0.5 " in out
    assert out.splitlines()[2].split()[:7] == ["phoneme_accuracy", "1", "2", "0.875", "0.125", "0.75", "1"]


def test_a_log_without_ids_keeps_lengths_and_the_mean_log_prob(tmp_path):
    logged = read_rollouts(jsonl(tmp_path / "r.jsonl", [record(1, "p", 0, "one two", 1.0, length=4, logprob=-2.0)]))
    assert logged.rollouts[0].completion_ids == (0,) * 4
    assert logged.rollouts[0].logprobs == (-0.5,) * 4
    assert set(logged.columns) == {"prompt", "references"}


def test_bad_logs_are_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="has no rollouts"):
        read_rollouts(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    with pytest.raises(RewardError, match="line 2 is no JSON"):
        read_rollouts(tmp_path / "bad.jsonl")
    with pytest.raises(RewardError, match="line 1 has prompt; expected prompt and completion"):
        read_rollouts(jsonl(tmp_path / "short.jsonl", [{"prompt": "a"}]))
    with pytest.raises(RewardError, match="no rollout has a total both in the log and now"):
        compare(read_rollouts(jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}])), [1.0])


def test_rank_correlation_agrees_with_scipy_ties_included():
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randrange(4) for _ in range(9)] for _ in range(2))
        expected = stats.spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected) or (math.isnan(expected) and math.isnan(spearman(a, b)))
    assert math.isnan(spearman([1.0], [1.0]))
