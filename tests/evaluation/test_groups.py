"""`--group_column`: every number on the rows of one value, in results, report, training and its evaluation."""

import json

import pytest
from tiny import tiny_model
from tiny_task import ROWS, save_model, tiny_tokenizer, tiny_trainer

from rlseq.data.groups import check_groups, group_name, rows_by_group
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.evaluation.results.compare import join_and_report
from rlseq.evaluation.run import contrast, contrast_and_report
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import load_rewards

TASKS = ["reward", "math", "math", "reward", "greedy", "math", "a/b", None]  # named like metrics, with a slash, none
TASK_ROWS = [{**row, **({} if task is None else {"task": task})} for row, task in zip(ROWS, TASKS, strict=True)]
TOKENIZER = tiny_tokenizer()
SETTINGS = ContrastSettings(
    strategies=("greedy", "sample"), samples_per_row=2, max_new_tokens=4, resamples=100, group_column="task"
)


def words(completion: str) -> float:
    return float(len(completion.split()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, initializer_range=0.3)
    return folder


def test_a_group_s_numbers_are_those_of_evaluating_its_rows_alone(model, tmp_path):
    with load_rewards([words]) as suite:
        options = {"settings": SETTINGS, "prompt_options": {}, "output_dir": tmp_path, "title": "t"}
        results = contrast_and_report({"m": model}, TASK_ROWS, suite, **options)
        block = results["groups"]
        assert block["column"] == "task"
        assert [(g["group"], g["rows"]) for g in block["groups"]] == [
            ("reward", 2),
            ("math", 3),
            ("greedy", 1),
            ("a/b", 1),
            (None, 1),
        ]
        math = block["groups"][1]["models"]["m"]
        records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        keys = {p.key for p, task in zip(build_prompts(TASK_ROWS, TOKENIZER), TASKS, strict=True) if task == "math"}
        lengths = [len(r["completion"].split()) for r in records if r["strategy"] == "sample" and r["key"] in keys]
        assert len(lengths) == 6
        cell = math["strategies"]["sample"]["words"]
        assert cell["value"] == pytest.approx(sum(lengths) / 6)
        assert cell["ci95"][0] <= cell["value"] <= cell["ci95"][1]
        alone = contrast(
            {"m": model}, [r for r in TASK_ROWS if r.get("task") == "math"], suite, settings=SETTINGS, quiet=True
        )
    nll = math["likelihood"]["nll_per_token"]["value"]
    assert nll == pytest.approx(alone["models"]["m"]["likelihood"]["nll_per_token"]["value"], rel=1e-5)
    assert math["likelihood"]["nll_per_token"]["ci95"] != results["models"]["m"]["likelihood"]["nll_per_token"]["ci95"]
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert "By task" in page and "math" in page


def test_joined_evaluations_have_the_groups_of_one(model, tmp_path):
    (tmp_path / "words.py").write_text("def words(completion):\n    return float(len(completion.split()))\n")
    for name in ("a", "b", "both"):
        with load_rewards([f"{tmp_path}/words.py:words"]) as suite:
            models = {"a": model, "b": model} if name == "both" else {name: model}
            found = contrast(models, TASK_ROWS, suite, settings=SETTINGS, output_dir=tmp_path / name, quiet=True)
    joined = join_and_report([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "joined")
    assert joined["groups"] == found["groups"]


def test_the_evaluation_during_training_has_every_number_by_group():
    with load_rewards([words]) as suite:
        options = {"max_new_tokens": 4, "group_column": "task"}
        evaluator = ValidationEvaluator(build_prompts(TASK_ROWS, TOKENIZER), TOKENIZER, suite, **options)
        alone = build_prompts([row for row in TASK_ROWS if row.get("task") == "math"], TOKENIZER)
        found = evaluator(tiny_model("llama", initializer_range=0.3))
        math = ValidationEvaluator(alone, TOKENIZER, suite, max_new_tokens=4)(
            tiny_model("llama", initializer_range=0.3)
        )
    assert set(found) == set(evaluator.metrics)
    for key in ("greedy/reward", "greedy/words", "nll_per_token"):
        assert found[f"group/math/{key}"] == pytest.approx(math[key], rel=1e-5)
    names = {
        key.split("/greedy/words")[0] for key in found if key.endswith("/greedy/words") and key.startswith("group")
    }
    assert names == {"group/reward", "group/math", "group/greedy", 'group/"a/b"', "group/null"}


def test_training_logs_the_reward_and_the_number_of_rollouts_of_each_group(tmp_path):
    trainer = tiny_trainer(tmp_path, rewards=(words,), rows=TASK_ROWS, group_column="task", max_steps=1)
    trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "reward" in line]
    by_task = {}
    for index, scored in zip(trainer.batch.indices, trainer.batch.scored, strict=True):
        by_task.setdefault(trainer.prompts[index].columns.get("task"), []).append(scored.total)
    assert len(by_task) > 1
    for task, totals in by_task.items():
        assert logged[f"group/{group_name(task)}/reward"] == pytest.approx(sum(totals) / len(totals))
        assert logged[f"group/{group_name(task)}/rollouts"] == len(totals)
    assert sum(value for key, value in logged.items() if key.endswith("/rollouts")) == 16


def test_no_two_groups_have_one_name():
    values = ["1", 1, 1.5, True, "true", None, "null", "", "a/b", '"a/b"', "a", ["a"], '["a"]', {"x": 1}, "é", "a b"]
    assert len({group_name(value) for value in values}) == len(values)
    assert group_name("math") == "math"


def test_a_column_that_makes_no_groups_is_refused(model, tmp_path):
    prompts = build_prompts(TASK_ROWS, TOKENIZER)
    assert [places for _, places in rows_by_group(prompts, "task")] == [[0, 3], [1, 2, 5], [4], [6], [7]]
    with pytest.raises(ConfigError, match=r"--group_column 'tasks' is no column of the data; .* Did you mean 'task'"):
        check_groups(prompts, "tasks")
    many = build_prompts([{"prompt": "a", "n": n} for n in range(51)], TOKENIZER)
    with pytest.raises(ConfigError, match="has 51 values in the data; expected at most 50"):
        check_groups(many, "n")
    with pytest.raises(ConfigError, match="is no column of the training rows"):
        tiny_trainer(tmp_path, group_column="tasks")
    (model / "model.safetensors").rename(model / "away")
    try:
        settings = ContrastSettings(strategies=("greedy",), group_column="tasks")
        with load_rewards([words]) as suite, pytest.raises(ConfigError, match="is no column of the rows to evaluate"):
            contrast({"m": model}, TASK_ROWS, suite, settings=settings, quiet=True)
    finally:
        (model / "away").rename(model / "model.safetensors")
