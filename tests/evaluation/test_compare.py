"""Finished evaluations joined, against evaluating together; and what a checkpoint against itself gives."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_data import word_tokenizer
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from rlseq.cli.evaluate import evaluate, parse_models
from rlseq.cli.main import main
from rlseq.config.arguments import DataArguments
from rlseq.errors import ConfigError, DataError, FormatError, RewardError
from rlseq.evaluation.results.compare import join
from rlseq.evaluation.run import ContrastSettings, contrast
from rlseq.evaluation.studies.table import STUDIES
from rlseq.scoring import load_rewards

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E F A", "D E"]},
    {"prompt": "h = ", "references": [""]},
    {"prompt": "b c = ", "references": ["B", "B C"]},
    {"prompt": "f = ", "references": ["F"]},
]
REWARD = """from rlseq import reward
from rlseq.scoring import CorpusMetric

@reward(corpus={"loudness": CorpusMetric(("loud", "all"), lambda sums: (sums["loud"] / sums["all"]) ** 0.5)})
def loud(completion):
    return float(len(completion.split())), {"loud": completion.count("A"), "all": len(completion)}
"""
PAIRS = [{"prompt": f"{a} {b} = ", "references": [f"{a} {b}".upper()]} for a in "abcd" for b in "efgh"]
NODES = 60  # proves the modes of some rows
SETTINGS = ContrastSettings(
    samples_per_row=3,
    max_new_tokens=3,
    resamples=100,
    strategies=("greedy", "sample", "best_of:n=2,by=phoneme_accuracy"),
    studies=("ranking", "map"),
    map_max_nodes=NODES,
    primary="wer:greedy",
)
FILES = ("results.json", "per_example.jsonl", "samples.jsonl", "studies.jsonl", "report.html", "report.md")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with four checkpoints, data and a reward."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("one", "two", "three", "four")):
        tiny_model("llama", seed=seed, initializer_range=0.3).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "loud.py").write_text(REWARD)
    return folder


def arguments(place, models):
    return [f"{name}={place / path}" for name, path in models]


def reported(place, out, *models):
    """As the command evaluates, report and all."""
    evaluate(
        arguments(place, models),
        DataArguments(dataset_name=str(place / "validation.jsonl")),
        ["phoneme_accuracy", str(place / "loud.py")],
        settings=SETTINGS,
        output_dir=str(out),
    )
    return json.loads((out / "results.json").read_text())


def measured(place, out, *models, rows=ROWS, settings=SETTINGS):
    """The same without a report."""
    named = parse_models(arguments(place, models))
    with load_rewards(["phoneme_accuracy", str(place / "loud.py")]) as suite:
        name = f"{place / 'validation.jsonl'} (validation)"
        return contrast(
            named,
            rows,
            suite,
            settings=settings,
            prompt_options=DataArguments().prompt_options(),
            output_dir=out,
            quiet=True,
            data_name=name,
        )


@pytest.fixture(scope="module")
def apart(place, tmp_path_factory):
    """Three evaluations: of two checkpoints, of one of them and another, and of one alone."""
    out = tmp_path_factory.mktemp("apart")
    measured(place, out / "a", ("base", "one"), ("rl", "two"))
    measured(place, out / "b", ("base", "one"), ("rl", "three"))
    measured(place, out / "c", ("start", "four"))
    return out


def same_files(a, b):
    for name in FILES:
        assert (a / name).read_text() == (b / name).read_text(), name
    for plot in (a / "plots").iterdir():
        assert plot.read_text() == (b / "plots" / plot.name).read_text()


def test_joined_evaluations_equal_evaluating_together_file_by_file(place, apart, tmp_path, capsys):
    reported(place, tmp_path / "together", ("base", "one"), ("rl", "two"), ("rl", "three"), ("start", "four"))
    printed = capsys.readouterr().out.replace("together", "joined")
    start = printed.index("6 rows, 95% intervals")  # what it says before it measures; a join does not measure
    assert "80% power" in printed[:start] and "completions" in printed[:start]
    printed = printed[start:]
    given = [f"rl={apart / 'a' / 'results.json'}", f"rl={apart / 'b'}", f"{apart / 'c'}"]
    assert main(["evaluate", "--compare", *given, "--output_dir", str(tmp_path / "joined")]) == 0
    assert capsys.readouterr().out == printed
    same_files(tmp_path / "together", tmp_path / "joined")
    # What was joined can be joined again, in two steps.
    join(given[:2], tmp_path / "pair")
    join([str(tmp_path / "pair"), given[2]], tmp_path / "again")
    for name in FILES[:4]:
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "joined" / name).read_text(), name


def gap(a, b):
    return None if None in (a, b) else pytest.approx(b - a)


def test_a_repeated_name_is_a_method_in_results_and_report(place, tmp_path):
    names = ("base", "one"), ("rl", "two"), ("rl", "three"), ("rl", "four")
    results = reported(place, tmp_path, *names)
    assert list(results["models"]) == ["base", "rl#1", "rl#2", "rl#3"] and list(results["methods"]) == ["rl"]
    method = results["methods"]["rl"]
    assert (method["checkpoints"], method["seeds"]) == (["rl#1", "rl#2", "rl#3"], 3)
    for strategy, cells in method["strategies"].items():
        for name, cell in cells.items():
            seeds = [results["models"][c]["strategies"][strategy][name]["value"] for c in method["checkpoints"]]
            assert cell["per_seed"] == seeds
            assert cell["value"] == (None if None in seeds else pytest.approx(np.mean(seeds)))
    seeds = [results["models"][c]["likelihood"]["exact_pass_at_k"]["4"]["value"] for c in method["checkpoints"]]
    assert method["likelihood"]["exact_pass_at_k"]["4"]["per_seed"] == seeds
    of_methods = [c for c in results["comparisons"] if c["claim"] == "method"]
    assert results["comparisons"][: len(of_methods)] == of_methods
    base = results["models"]["base"]
    with (tmp_path / "studies.jsonl").open() as file:
        proven = [json.loads(line)["studies"]["map"]["proven"] for line in file]
    known = int(np.reshape(proven, (4, len(ROWS))).all(0).sum())  # rows with a proven mode for all four
    assert 0 < known < len(ROWS)
    for c in of_methods:
        assert (c["a"], c["b"], c["seeds_a"], c["seeds_b"]) == ("base", "rl", 1, 3)
        if c["strategy"] == "sample":
            values = (owner["strategies"]["sample"][c["metric"]]["value"] for owner in (base, method))
            assert c["difference"] == gap(*values)
    of_modes = results["studies"]["map"]["comparisons"]
    assert {(c["a"], c["b"]) for c in of_modes} == {("base", "rl"), *(("base", f"rl#{i}") for i in (1, 2, 3))}
    for c in (c for c in of_modes if c["b"] == "rl"):
        assert (c["rows"], c["seeds_a"], c["seeds_b"]) == (known, 1, 3)
        assert c["difference"] == gap(c["value_a"], c["value_b"])
    alone = [c for c in results["comparisons"] if c["claim"] == "checkpoints"]
    assert {(c["a"], c["b"]) for c in alone} == {("base", f"rl#{i}") for i in (1, 2, 3)}
    assert {(c["metric"], c["strategy"]) for c in of_methods} == {(c["metric"], c["strategy"]) for c in alone}
    assert results["primary"] == {"metric": "wer", "strategy": "greedy", "a": "base", "b": "rl"}
    report = (tmp_path / "report.md").read_text()
    assert "(primary) (method: 3 seeds against 1)" in report and "rl: mean of 3 seeds" in report
    assert "One checkpoint stands for base" in report and "Few seeds" not in report


def test_without_repeated_names_there_is_no_method(apart):
    results = json.loads((apart / "a" / "results.json").read_text())
    assert results["methods"] == {} and not any("seed" in note for note in results["notes"])
    assert {c["claim"] for c in results["comparisons"]} == {"checkpoints"}


def changed(apart, tmp_path, change):
    """A copy of the second evaluation with something changed in a file."""
    folder = tmp_path / "changed"
    shutil.copytree(apart / "b", folder)
    change(folder)
    return folder


def on_results(function):
    def change(folder):
        results = json.loads((folder / "results.json").read_text())
        function(results)
        (folder / "results.json").write_text(json.dumps(results))

    return change


def on_lines(name, function):
    def change(folder):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(function(lines)))

    return change


def with_row(number, **values):
    """Statistics of a row of the first checkpoint changed."""

    def change(lines):
        record = json.loads(lines[number])
        record["likelihood"] |= values
        return [*lines[:number], json.dumps(record) + "\n", *lines[number + 1 :]]

    return on_lines("per_example.jsonl", change)


BROKEN = {
    "another setting": (
        on_results(lambda r: r["spec"]["settings"].update(samples_per_row=8)),
        ConfigError,
        "settings.samples_per_row is 3 in the first and 8 in the second",
    ),
    "another seed": (on_results(lambda r: r["spec"].update(seed=1)), ConfigError, "seed is 0 in the first and 1"),
    "other rows": (
        on_results(lambda r: r["spec"]["data"].update(fingerprint="0000")),
        ConfigError,
        "data.fingerprint is .* in the first and 0000 in the second.*rows and their tokens",
    ),
    "another reward": (
        on_results(lambda r: r["spec"]["rewards"]["loud"].update(code="x")),
        ConfigError,
        "rewards.loud.code is",
    ),
    "an old file": (
        on_results(lambda r: r.update(schema=2)),
        FormatError,
        "format version 2; rlseq .* reads 4. Evaluate",
    ),
    "a results.json without a part": (on_results(lambda r: r.pop("oracles")), DataError, "has no oracles"),
    "a truncated results.json": (lambda f: (f / "results.json").write_text('{"a": '), DataError, "is not valid JSON"),
    "no results.json": (lambda f: (f / "results.json").unlink(), DataError, "there is no evaluation at"),
    "no rows": (lambda f: (f / "per_example.jsonl").unlink(), DataError, "there is no .*per_example.jsonl"),
    "rows cut": (on_lines("per_example.jsonl", lambda x: x[:-1]), DataError, "has 11 lines of base, rl; expected 6"),
    "a cut line": (on_lines("per_example.jsonl", lambda x: [*x[:-1], x[-1][:30]]), DataError, "line 12 is truncated"),
    "samples cut": (on_lines("samples.jsonl", lambda x: x[:-1]), DataError, "of rl under best_of.*truncated"),
    "no studies": (lambda f: (f / "studies.jsonl").unlink(), DataError, "there is no .*studies.jsonl"),
    "rows of another evaluation": (with_row(7, nll=9.0), DataError, "says that likelihood.nll_per_token.*of rl is"),
    "another checkpoint": (with_row(1, nll=9.0), DataError, r"base \(.*one\) has other numbers .* row .* changed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_evaluations_that_do_not_fit_are_refused_with_what_differs(apart, tmp_path, case):
    change, error, message = BROKEN[case]
    folder = changed(apart, tmp_path, change)
    with pytest.raises(error, match=message):
        join([f"rl={apart / 'a'}", f"rl={folder}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_collide_are_asked_for(apart, tmp_path):
    a, b, c = (str(apart / name) for name in "abc")
    with pytest.raises(ConfigError, match=r"'rl' is .*two' in .*, and .*three' in .*Name them: NAME=.*b/results.json"):
        join([a, b], tmp_path)
    results = join([f"grpo={a}", f"ppo={b}", f"x={c}"], tmp_path)
    assert list(results["models"]) == ["base", "grpo", "ppo", "x"]
    for specs, message in (
        ([a], "two finished evaluations at least"),
        ([a, a], "twice"),
        ([f"x={tmp_path}", c], "holds base, grpo, ppo, x, and a name can be given"),
        ([f"={a}", c], "is no PATH and no NAME=PATH"),
    ):
        with pytest.raises(ConfigError, match=message):
            join(specs, tmp_path / "other")
    with pytest.raises(ConfigError, match="is one of the evaluations joined"):
        join([a, c], c)


def test_rewards_must_be_what_they_were(place, apart, tmp_path):
    pair = [str(apart / "a"), str(apart / "c")]
    other = tmp_path / "loud.py"
    other.write_text(REWARD)
    join(pair, tmp_path / "moved", reward_funcs=["phoneme_accuracy", str(other)])
    assert (tmp_path / "moved/results.json").is_file()
    other.write_text(REWARD.replace("** 0.5", "** 0.4"))
    with pytest.raises(RewardError, match=r"'loud' is not what it was .* code changed"):
        join(pair, tmp_path / "out", reward_funcs=["phoneme_accuracy", str(other)])
    with pytest.raises(RewardError, match="give --reward_funcs"):
        join(pair, tmp_path / "out", reward_funcs=["phoneme_accuracy", str(tmp_path / "gone.py")])


def test_other_versions_and_rounding_get_a_note(apart, tmp_path):
    def round_differently(folder):
        on_results(lambda r: r["spec"]["versions"].update(torch="9.9"))(folder)
        lines = [json.loads(line) for line in (folder / "per_example.jsonl").read_text().splitlines()]
        lines[2]["likelihood"]["nll"] *= 1 + 1e-9
        (folder / "per_example.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    folder = changed(apart, tmp_path, round_differently)
    results = join([f"x={apart / 'a'}", f"y={folder}"], tmp_path / "out")
    assert "torch" in results["notes"][-2] and "9.9" in results["notes"][-2]
    assert "base was measured in" in results["notes"][-1] and "in 1 rows" in results["notes"][-1]


def test_a_study_against_the_first_checkpoint_is_left_out_where_that_was_another(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(STUDIES["ranking"], "against_first", True, raising=False)
    results = join([str(apart / "a"), str(apart / "c")], tmp_path)
    assert "ranking: nothing of start, which was measured against" in results["notes"][-1]
    assert list(results["studies"]["ranking"]["models"]) == ["base", "rl", "start"]
    assert not results["studies"]["ranking"]["models"]["start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "x=y", "--compare", "a", "b"], "--models cannot change it"),
        (["--dataset_name", "d", "--samples_per_row", "9", "--compare", "a", "b"], "--dataset_name, --samples_per_row"),
        (["--reward_funcs", "r", "--dataset_name", "d"], "no model is named; give --models"),
    ],
)
def test_compare_and_models_exclude_each_other(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["evaluate", "--output_dir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def differences(node):
    if isinstance(node, dict):
        found = [node] if {"difference", "ci95"} <= set(node) else []
        return found + [d for child in node.values() for d in differences(child)]
    return [d for child in node for d in differences(child)] if isinstance(node, list) else []


def test_a_checkpoint_against_itself_differs_by_exactly_nothing_in_every_metric_and_study(place):
    settings = dataclasses.replace(
        SETTINGS,
        studies=tuple(STUDIES),
        coverage_samples=8,
        temperatures=(0.5, 0.7, 1.0),
        prefix_lengths=(1, 2),
        max_new_tokens=6,
        strategies=("greedy", "sample", "beam"),
        map_max_nodes=20,
    )
    results = measured(place, None, ("a", "one"), ("b", "one"), rows=PAIRS, settings=settings)
    every = differences(results["comparisons"])
    assert len(every) > 50
    for found in every + differences(results["studies"]):
        if found["difference"] is not None:  # else nothing was measured on either side
            assert (found["difference"], found["ci95"]) == (0, [0, 0])
            assert found.get("p_value", 1) == 1
    of_studies = {name for name, block in results["studies"].items() if differences(block)}
    assert of_studies == set(STUDIES) - {"kl"}
    gaps = results["studies"]["sharpening"]["gaps"]
    assert {name for gap in gaps for name in gap} == {"a", "b", "metric", "by_temperature", "mean", "range", "total"}
    cells = [cell for gap in gaps for cell in (*gap["by_temperature"].values(), gap["mean"], gap["total"])]
    for cell in (cell for cell in cells if cell["value"] is not None):
        assert (cell["value"], cell["ci95"]) == (0, [0, 0])
    (moved,) = results["studies"]["kl"]["models"].values()
    assert {(cell["value"], *cell["ci95"]) for cells in moved.values() for cell in cells.values()} == {(0, 0, 0)}
