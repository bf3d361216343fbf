"""The headline of a report: what a busy person reads first, in sentences made of numbers that were computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlseq.evaluation.metrics import EXPECTED_ACCURACY, LOGPROB, NLL, PASS_METRICS, TOKEN_LOGPROB
from rlseq.evaluation.report import tables
from rlseq.evaluation.report.tables import Comparison, Results
from rlseq.evaluation.studies.table import headlines


@dataclass(frozen=True)
class Headline:
    """The finding, its certainty and its cost, as sentences.

    Attributes:
        cost: in likelihood, coverage and diversity; one sentence for each that was measured.
        source: what the studies say of the difference.
    """

    title: str
    finding: str
    certainty: str
    cost: str
    source: str
    verdict: str
    tiles: tuple[Comparison, ...]


def make_headline(results: Results) -> Headline:
    """The finding, its certainty and its cost as sentences."""
    found = tables.comparisons(results)
    models = list(results["models"])
    if not found:
        return _headline_without_comparison(results, models)
    fair = [c for c in found if not c.oracle]
    measured = [c for c in fair if c.raw["difference"] is not None] or fair or found
    lead = next((c for c in measured if c.strategy is not None), measured[0])
    declared = found[0].primary
    lead = found[0] if declared else lead
    others = [c for c in found if (c.a, c.b) == (lead.a, lead.b)]
    undefined = lead.raw["difference"] is None
    opening = {
        "better": "Better: ",
        "worse": "Worse: ",
        "unclear": "No clear difference: ",
        "equal": "No difference: ",
    }.get(lead.verdict, "")
    opening = "Not measured: " if undefined else opening.replace(":", f"{lead.unseen}:")
    finding = (
        f"{opening}{lead.metric.label} under {lead.where} is {lead.value_b} for {lead.b}, "
        f"against {lead.value_a} for {lead.a}."
    )
    p = f", p {lead.p if lead.p.startswith('<') else '= ' + lead.p}" if declared else ""
    certainty = (
        f"Difference {lead.difference}, 95% interval {lead.interval}{p}, on the same {results['rows']:,} rows"
        + _in_clusters(results)
        + (f" and {lead.seeds}" if lead.of_methods else "")
        + (_why_unclear(lead) if lead.verdict == "unclear" else ".")
    )
    if undefined:
        certainty = f"There is no difference to report: {lead.metric.label} has no value on one side at least."
    if not declared:
        certainty += " No primary comparison was declared, so this is exploratory."
    certainty = " ".join(filter(None, [certainty, lead.power]))
    same_metric = [
        c
        for c in others
        if c is not lead
        and not c.oracle
        and c.metric.name == lead.metric.name
        and c.strategy_a == c.strategy is not None
    ]
    by_name = {c.metric.name: c for c in others if c.strategy is None}
    likelihood = [by_name[m.name] for m in (NLL, EXPECTED_ACCURACY) if m.name in by_name]
    return Headline(
        title=" against ".join(models) if len(models) == 2 else ", ".join(models),
        finding=finding,
        certainty=certainty,
        cost=" ".join(
            [
                _likelihood_cost(by_name.get(NLL.name), by_name.get(EXPECTED_ACCURACY.name), lead.verdict == "better"),
                *_coverage_cost(by_name),
                *_diversity_cost(others),
            ]
        ),
        source=" ".join(headlines(results, lead.a, lead.b)),
        verdict=lead.verdict,
        tiles=(lead, *same_metric[:3], *likelihood),
    )


def _in_clusters(results: Results) -> str:
    found = results.get("clusters")
    return f" in {found['clusters']:,} clusters ({found['column']})" if found else ""


def _why_unclear(lead: Comparison) -> str:
    low, high = lead.raw["ci95"]
    if None in (low, high) or low <= 0 <= high:
        return ": the interval holds zero."
    return f": the interval excludes zero, but p is not below {tables.LEVEL:g}."


def _likelihood_cost(nll: Comparison | None, accuracy: Comparison | None, gained: bool) -> str:
    if nll is None:
        return "Likelihood was skipped: no references."
    words = {
        "worse": "The references became less likely",
        "better": "The references became more likely" + (" too" if gained else ""),
        "unclear": "The likelihood of the references shows no clear change",
        "equal": "The likelihood of the references is the same",
    }[nll.verdict]
    text = f"{words}{nll.unseen}: NLL per token {nll.value_a} → {nll.value_b} nats ({nll.interval})."
    if accuracy is not None:
        change = {"better": "rose", "worse": "fell", "equal": "is the same"}.get(
            accuracy.verdict, "did not clearly change"
        )
        text += (
            f" The exact chance that one sample is a reference {change}{accuracy.unseen}: "
            f"{accuracy.value_a} → {accuracy.value_b}."
        )
    return text


def _coverage_cost(by_name: Mapping[str, Comparison]) -> list[str]:
    """What the largest k of the exact pass@k says: a gain at k = 1 may be paid for there (Yue et al. 2025)."""
    ks = [k for k, metric in PASS_METRICS.items() if metric.name in by_name]
    if not ks:
        return []
    largest = by_name[PASS_METRICS[max(ks)].name]
    words = {"better": "Coverage rose", "worse": "Coverage fell", "equal": "Coverage is the same"}
    return [
        f"{words.get(largest.verdict, 'Coverage did not clearly change')}{largest.unseen}: {max(ks)} samples hold a "
        f"reference in {largest.value_a} → {largest.value_b} of rows ({largest.interval} pp)."
    ]


def _diversity_cost(compared: Sequence[Comparison]) -> list[str]:
    """Whether plain samples vary less: minus the log-prob of samples estimates the entropy, of tokens and of them."""
    plain = {c.metric.name: c for c in compared if c.strategy == c.strategy_a == "sample"}
    found, whole = plain.get(TOKEN_LOGPROB.name), plain.get(LOGPROB.name)
    if found is None or whole is None or found.raw["difference"] is None:
        return []
    words = {"higher": "Samples are less varied", "lower": "Samples are more varied", "equal": "Samples vary as before"}
    token, completion = (
        " → ".join(value.removeprefix("−") for value in (c.value_a, c.value_b))  # a log-prob is below 0
        for c in (found, whole)
    )
    return [
        f"{words.get(found.verdict, 'Samples vary about as before')}{found.unseen}: the entropy of a token is "
        f"{token} nats, that of a completion {completion} nats."
    ]


def _headline_without_comparison(results: Results, models: Sequence[str]) -> Headline:
    strategy = next(iter(tables.fair_strategies(results)), None)
    names = tables.quality_metrics(results)[:3]
    parts = []
    for name in names:
        info, found = tables.metric(results, name), tables.cell(results, models[0], strategy, name)
        if found:
            parts.append(f"{info.label} {tables.shown(info, found)}")
    return Headline(
        title=", ".join(models),
        finding=f"Under {strategy}, {models[0]} has {', '.join(parts)}." if parts else "Nothing was generated.",
        certainty=f"On {results['rows']:,} rows, with nothing to compare it with.",
        cost="" if tables.likelihood_metrics(results) else "Likelihood was skipped: no references.",
        source="",
        verdict="unclear",
        tiles=(),
    )
