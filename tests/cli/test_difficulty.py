"""`rlseq difficulty`: numbers by hand, what is kept of an interrupted command, what is refused before a model loads."""

import json
import math

import pytest
import torch
from forks import run_ranks
from tiny_task import ROWS, VOCABULARY, write_rows, write_task
from transformers import AutoModelForCausalLM

from rlseq.cli.main import main
from rlseq.evaluation import difficulty
from rlseq.evaluation.difficulty import mean_reward_columns, pass_rate_columns

REWARD = """def by_prompt(completion, prompt):
    return {"a = ": 1.0, "b c = ": 0.5, "i = ": None}.get(prompt, 0.25)


def is_right(completion, references):
    return float(completion in references)


def answered(answer):
    return float(len(answer))


def answered_by_hand(completion):
    return float(len(completion.partition("A")[2].lstrip()))


def broken(completion):
    raise ValueError("no such word")
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, rows=[{**row, "none": []} for row in ROWS])
    (folder / "reward.py").write_text(REWARD)
    return folder


def flags(task, out, *more, data="data"):
    given = ["difficulty", task / data, "--model", task / "model", "--output_dir", out, "--max_new_tokens", 4, *more]
    return [str(word) for word in given]


def column(out, name="pass_rate", split="train"):
    return [json.loads(line)[name] for line in (out / f"{split}.jsonl").read_text().splitlines()]


def chance(model, prompt, completion, temperature=1.0):
    """p(completion, <eos> | prompt), token by token in float64."""
    ids = [VOCABULARY.index(token) for token in (*prompt.split(), *completion.split(), "<eos>")]
    with torch.no_grad():
        probs = model(torch.tensor([ids])).logits[0].double().div(temperature).softmax(-1)
    start = len(prompt.split())
    return math.prod(probs[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_without_rewards_the_column_is_the_exact_chance_of_a_reference(task, tmp_path, capsys):
    assert main(flags(task, tmp_path / "out")) == 0
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    expected = [chance(model, row["prompt"], row["references"][0]) for row in ROWS]
    assert column(tmp_path / "out") == pytest.approx(expected, rel=1e-4)
    # The rows are as they were, but for the column, and those to evaluate on are as they were.
    written = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [["prompt", "references", "none", "pass_rate"]] * 8
    assert [(row["prompt"], row["references"]) for row in written] == [(*row.values(),) for row in ROWS]
    assert (tmp_path / "out/validation.jsonl").read_text() == (task / "data/validation.jsonl").read_text()
    said = f"pass_rate of 8 rows: mean {sum(expected) / 8:.3f}; "
    assert said in capsys.readouterr().out
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [".jsonl"] * 2
    assert not (tmp_path / "out/.measured_rows").exists()


def test_a_reference_that_does_not_fit_or_is_not_there_adds_nothing(task, tmp_path):
    rows = [{"prompt": "a = ", "references": ["A", "A B C D"]}, {"prompt": "b = ", "references": []}]
    write_rows(tmp_path / "data/train.jsonl", rows)
    assert main(flags(task, tmp_path / "out", data=tmp_path / "data")) == 0
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    found = column(tmp_path / "out")
    assert found[0] == pytest.approx(chance(model, "a = ", "A"), rel=1e-4)  # A B C D <eos> has 5 tokens, of 4
    assert found[1] is None
    assert not (tmp_path / "out/validation.jsonl").exists()  # that data has none


def test_rows_with_equal_prompts_get_the_chance_of_all_their_references(task, tmp_path):
    rows = [{"prompt": p, "references": [r]} for p, r in (("a = ", "A"), ("b = ", "B"), ("a = ", "C"))]
    write_rows(tmp_path / "data/train.jsonl", rows)
    assert main(flags(task, tmp_path / "out", "--merge_references", data=tmp_path / "data")) == 0
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    both = chance(model, "a = ", "A") + chance(model, "a = ", "C")
    assert column(tmp_path / "out") == pytest.approx([both, chance(model, "b = ", "B"), both], rel=1e-4)


def test_with_rewards_it_is_the_share_of_samples_that_reach_the_threshold(task, tmp_path):
    reward = ["--reward_funcs", f"{task}/reward.py:by_prompt", "--samples_per_row", 4]
    assert main(flags(task, tmp_path / "out", *reward)) == 0
    assert column(tmp_path / "out") == [1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0]
    z2 = 1.959964**2
    low, high = column(tmp_path / "out", "pass_rate_ci95")[0]
    assert (low, high) == (pytest.approx(4 / (4 + z2), rel=1e-6), 1.0)  # of all n: n / (n + z²) to 1
    low, high = column(tmp_path / "out", "pass_rate_ci95")[1]
    assert (low, high) == (0.0, pytest.approx(z2 / (4 + z2), rel=1e-6))
    assert column(tmp_path / "out", "pass_rate_samples") == [4, 4, 4, 4, 0, 4, 4, 4]
    assert main(flags(task, tmp_path / "half", *reward, "--pass_threshold", 0.5)) == 0
    assert column(tmp_path / "half")[:3] == [1.0, 1.0, 0.0]
    assert main(flags(task, tmp_path / "mean", *reward, "--mean_reward", "--reward_weights", 2)) == 0
    assert column(tmp_path / "mean", "mean_reward")[:5] == [2.0, 1.0, 0.5, 0.5, None]


def test_a_share_its_interval_and_a_mean_by_hand():
    # 2 of 3: p̂ = 0.66667, z² = 3.84146: (0.66667 + 0.64024 ± 1.95996 √(0.07407 + 0.10671)) / 2.28049
    found = pass_rate_columns([1.0, 0.5, None, 0.1 + 0.2 + 0.45], "right", 0.75)
    assert found == {"right": 2 / 3, "right_ci95": pytest.approx([0.20766, 0.93851], abs=1e-5), "right_samples": 3}
    assert pass_rate_columns([0.1 * 3 + 0.6, 0.7 + 0.2], "right", 0.9)["right"] == 1.0  # 0.8999999999999999
    # 0, 0.5, 1: s = 0.5, s / √3
    found = mean_reward_columns([0.0, 0.5, 1.0, None], "m")
    assert found == {"m": 0.5, "m_se": pytest.approx(0.288675, abs=1e-6), "m_samples": 3}
    assert mean_reward_columns([2.0], "m") == {"m": 2.0, "m_se": None, "m_samples": 1}
    assert mean_reward_columns([None], "m") == {"m": None, "m_se": None, "m_samples": 0}


def test_sampled_shares_are_near_the_exact_chance_at_the_same_temperature(task, tmp_path):
    rows = [{"prompt": row["prompt"], "references": ["", *"ABCDEFGHI"]} for row in ROWS]
    write_rows(tmp_path / "data/train.jsonl", rows)
    strategy = ["--strategy", "sample:temperature=0.5"]
    more = ["--reward_funcs", f"{task}/reward.py:is_right", "--samples_per_row", 200]
    assert main(flags(task, tmp_path / "exact", *strategy, data=tmp_path / "data")) == 0
    assert main(flags(task, tmp_path / "sampled", *more, *strategy, data=tmp_path / "data")) == 0
    exact, sampled = (column(tmp_path / name) for name in ("exact", "sampled"))
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    by_hand = sum(chance(model, "a = ", reference, temperature=0.5) for reference in rows[0]["references"])
    assert exact[0] == pytest.approx(by_hand, rel=1e-4)
    error = math.sqrt(sum(p * (1 - p) for p in exact) / 200)
    assert sum(exact) > 5 * error and abs(sum(sampled) - sum(exact)) < 3 * error


@pytest.mark.parametrize("cut", [False, True], ids=["interrupted", "killed in a line"])
def test_an_interrupted_command_resumes_after_the_rows_that_are_measured(task, tmp_path, monkeypatch, capsys, cut):
    more = ["--reward_funcs", f"{task}/reward.py:is_right", "--eval_batch_size", 3, "--seed", 5]
    assert main(flags(task, tmp_path / "whole", *more)) == 0
    measured, batches = difficulty.sampled_rewards, []

    def interrupted(model, prompts, *args, **kwargs):
        batches.append(len(prompts))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return measured(model, prompts, *args, **kwargs)

    monkeypatch.setattr(difficulty, "sampled_rewards", interrupted)
    assert main(flags(task, tmp_path / "out", *more)) == 130
    assert "interrupted: the same command resumes after the 6 rows that are measured" in capsys.readouterr().err
    assert not (tmp_path / "out/train.jsonl").exists()
    (kept,) = (tmp_path / "out/.measured_rows").iterdir()
    if cut:
        kept.write_text(kept.read_text()[:-9])
    batches += [0] * 9
    assert main(flags(task, tmp_path / "out", *more)) == 0
    assert sum(batches[12:]) == (3 if cut else 2)
    assert f"{5 if cut else 6} of 8 rows are measured already" in capsys.readouterr().out
    assert (tmp_path / "out/train.jsonl").read_text() == (tmp_path / "whole/train.jsonl").read_text()
    assert not kept.exists()


def test_rows_measured_under_other_settings_are_not_taken_up(task, tmp_path, monkeypatch, capsys):
    more = ["--reward_funcs", f"{task}/reward.py:is_right", "--eval_batch_size", 4]
    with monkeypatch.context() as context:
        context.setattr(
            difficulty.KeptRows, "add", lambda kept, found, add=difficulty.KeptRows.add: stop(kept, found, add)
        )
        assert main(flags(task, tmp_path / "out", *more)) == 130
    capsys.readouterr()
    assert main(flags(task, tmp_path / "out", *more, "--seed", 1)) == 0
    assert "measured already" not in capsys.readouterr().out


def stop(kept, found, add):
    add(kept, found)
    raise KeyboardInterrupt


def test_two_processes_write_what_one_does(task, tmp_path):
    more = ["--reward_funcs", f"{task}/reward.py:is_right", "--samples_per_row", 3, "--eval_batch_size", 2]
    assert main(flags(task, tmp_path / "one", *more)) == 0

    def act():
        assert main(flags(task, tmp_path / "two", *more)) == 0

    run_ranks(2, act, tmp_path / "log")
    assert (tmp_path / "two/train.jsonl").read_text() == (tmp_path / "one/train.jsonl").read_text()
    assert (tmp_path / "log").read_text().count("written: ") == 1


REWARDS = ("--reward_funcs", "exact_match")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--exact", *REWARDS], "--reward_funcs score samples, and --exact samples none: give one of them"),
        (["--exact", "false"], "--exact false needs --reward_funcs (`rlseq reward list` shows the bundled ones)"),
        (["--samples_per_row", 3], "--samples_per_row is 3, which has no effect without --reward_funcs"),
        ([*REWARDS, "--mean_reward", "--pass_threshold", 0.5], "no effect without a pass rate"),
        (["--strategy", "greedy"], "--strategy is 'greedy'; expected sample"),
        (["--column", "references"], "the data has a column 'references' already; give --column another name"),
        (["--reference_column", "none"], "no row has a reference, so the exact chance of one cannot be computed"),
        (["--prompt_column", "promt"], "the data has no column 'promt'"),
        (["--reward_funcs", "by_colour"], "'by_colour'"),
        (
            ["--reward_funcs", "reward.py:broken"],
            "tried on row 1 of 8, which has nothing in 'none': reward 'broken' raised",
        ),
        (["--train_split", "validation"], "--train_split and --eval_split are both 'validation'"),
        (["--output_dir", " "], "--output_dir is empty"),
        (["--model", "model/missing"], "there is no model at 'model/missing'"),
        (["--max_new_tokens", 0], "--max_new_tokens is 0; expected at least 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_before_a_model_loads(task, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.setattr(difficulty, "load_checkpoint", None)  # calling it is a TypeError
    monkeypatch.chdir(task)
    assert main(flags(task, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_files_of_the_data_are_never_replaced(task, tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", ROWS)
    assert main(flags(task, tmp_path, data=tmp_path / "train.jsonl")) == 2
    assert f"'{tmp_path}/train.jsonl' exists already; give another --output_dir" in capsys.readouterr().err
    assert "pass_rate" not in (tmp_path / "train.jsonl").read_text()


def test_a_row_that_json_cannot_hold_is_named(task, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import datetime\n\ndef load(split):\n"
        "    return [{'prompt': 'a = ', 'references': ['A']},"
        " {'prompt': 'b = ', 'references': ['B'], 'on': datetime.date(2024, 1, 2)}]\n"
    )
    assert main(flags(task, tmp_path / "out", data=tmp_path / "own.py")) == 2
    assert "row 1: column 'on' holds a date that cannot be written as JSON" in capsys.readouterr().err


def test_rewards_may_judge_the_answer_behind_a_thought(task, tmp_path, capsys):
    found = []
    for name, more in (("answered", ["--think_end", "A"]), ("answered_by_hand", [])):
        given = ["--reward_funcs", f"{task}/reward.py:{name}", "--mean_reward", *more]
        assert main(flags(task, tmp_path / name, *given)) == 0
        found.append(column(tmp_path / name, "mean_reward"))
    assert found[0] == found[1]
    assert any(found[0])
    refused = flags(task, tmp_path / "none", "--reward_funcs", f"{task}/reward.py:answered", "--mean_reward")
    assert main(refused) != 0
    assert "give --think_end" in capsys.readouterr().err
    assert main(flags(task, tmp_path / "none", "--think_end", "A")) != 0
    assert "without --reward_funcs" in capsys.readouterr().err
