"""What an evaluation costs is said before anything is decoded, and is what it then does."""

import pytest
from tiny import tiny_model
from tiny_task import tiny_tokenizer

from rlseq.evaluation.costs import Cost, costs, describe_costs
from rlseq.evaluation.measure import checkpoint
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import load_rewards
from rlseq.types import Prompt

ROWS = [{"prompt": p, "references": [p[::-1]]} for p in ("a b", "a c", "b c")]


def prompts(n, references=1):
    return [Prompt(str(i), "p", (0,), {"references": tuple(map(str, range(references)))}) for i in range(n)]


def test_parts_by_hand():
    strategies = ("greedy", "sample", "beam:width=5", "best_of:n=8", "mbr:n=6,utility=exact_match,temperature=0.5")
    studies = ("ranking", "coverage", "sharpening", "kl", "exposure_bias", "map")
    settings = ContrastSettings(strategies=strategies, samples_per_row=4, studies=studies, study_rows=50, map_rows=10)
    found = costs(settings, prompts(100, references=2))
    assert list(found.values()) == [
        Cost(0, 200),
        Cost(100),
        Cost(400),
        Cost(500),
        Cost(800),
        Cost(600, 600),  # of another distribution: each candidate is scored by the model's own
        Cost(),
        Cost(50 * 32, 100),
        Cost(50 * 4 * 6),
        Cost(2 * 50 * 4, 4 * 50 * 4),
        Cost(50 * 4 * (1 + 2 * 4), 100 + 200),
        Cost(0, 10 * 20_000),
    ]


def test_tuning_tries_each_alternative_once():
    settings = ContrastSettings(strategies=("beam:width=1/5", "greedy"), tune_split="validation")
    found = costs(settings, prompts(10), prompts(3))
    assert found["tuning on 3 rows"] == Cost(3 * 1 + 3 * 5, 3)
    assert found["beam:width=1/5"] == Cost(50)  # the larger, whichever is chosen


def test_the_table_sums_parts_and_models():
    said = describe_costs(ContrastSettings(strategies=("greedy", "sample"), samples_per_row=4), prompts(1000), 2)
    lines = [line.split() for line in said.splitlines()]
    assert ["one", "model", "5,000", "1,000"] in lines and ["2", "models", "10,000", "2,000"] in lines


@pytest.mark.parametrize("studies", [(), ("coverage", "sharpening", "kl")])
def test_one_bar_counts_the_completions_of_the_whole_evaluation(tmp_path, monkeypatch, capsys, studies):
    models = {}
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        models[name] = tmp_path / name
    settings = ContrastSettings(
        strategies=("greedy", "sample", "beam:width=2"),
        samples_per_row=2,
        max_new_tokens=3,
        resamples=10,
        studies=studies,
        coverage_samples=2,
        temperatures=(0.5, 1.0),
    )
    bars = []

    def measured(*given, bar, **options):
        bars.append(bar)
        if len(bars) == 1:  # the table is printed before a model is loaded
            assert "sequences scored" in capsys.readouterr().out and bar.n == 0
        return checkpoint.measure_checkpoint(*given, bar=bar, **options)

    monkeypatch.setattr("rlseq.evaluation.run.measure_checkpoint", measured)
    with load_rewards(["exact_match"]) as suite:
        contrast(models, ROWS, suite, settings=settings)
    assert len(bars) == 2 and bars[0] is bars[1]
    per_row = 1 + 2 + 2 + (2 + 2 * 2 + 2 * 2 if studies else 0)
    assert bars[0].total == bars[0].n == 2 * 3 * per_row
