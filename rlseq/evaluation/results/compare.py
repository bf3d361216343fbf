"""Finished evaluations joined: what evaluating their checkpoints together gives, from the files, without a model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.data.chat import shortened
from rlseq.errors import ConfigError, DataError, RewardError
from rlseq.evaluation.measure.checkpoint import ModelStatistics
from rlseq.evaluation.measure.documents import load_documents
from rlseq.evaluation.report.tables import flatten
from rlseq.evaluation.results.files import Evaluation, read_evaluation, say_replaced, spec_on_file, write_results
from rlseq.evaluation.results.folder import claimed
from rlseq.evaluation.run import assemble, report_on
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.statistics import LIKELIHOOD
from rlseq.evaluation.stats.seeds import methods, numbered
from rlseq.evaluation.studies.table import STUDIES
from rlseq.evaluation.tune_decoding import joined_tuning
from rlseq.scoring import RewardSuite, load_rewards

_NLL = LIKELIHOOD("nll")


def join(
    evaluations: Sequence[str], output_dir: str | Path, *, reward_funcs: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Join finished evaluations of the same rows under the same settings, rewards and seed.

    The first checkpoint of the first is `a` in every comparison. A checkpoint that is in several (equal name and path)
    is taken once.

    Args:
        evaluations: paths of results.json files or their folders, as PATH or NAME=PATH. NAME is given to the file's one
            checkpoint, or to the one method beside its first; a NAME that is repeated names seeds of one method.
        output_dir: results.json and the files beside it are written there, as by `contrast`; it is none of the folders
            read.
        reward_funcs: the rewards' specs; by default those that the first evaluation kept.

    Returns:
        The results, equal to those of evaluating all checkpoints together on the machine that wrote the files.

    Raises:
        DataError: a file that is missing or truncated, or is of another version or evaluation than the one beside it;
            another checkpoint under a name and path.
        ConfigError: evaluations that differ in what decides a number, names that collide.
        RewardError: the rewards are not found, or not what they were.
    """
    named = [named_path(spec) for spec in evaluations]
    if len(named) < 2:
        raise ConfigError("--compare needs two finished evaluations at least; give their results.json files or folders")
    loaded = [read_evaluation(path) for _, path in named]
    places = [evaluation.path.resolve() for evaluation in loaded]
    if (again := [place for place, count in Counter(places).items() if count > 1]) != []:
        raise ConfigError(f"--compare names {str(again[0])!r} twice")
    if (Path(output_dir) / "results.json").resolve() in places:
        raise ConfigError(f"--output_dir {str(output_dir)!r} is one of the evaluations joined; name another folder")
    first = loaded[0]
    notes = [note for other in loaded[1:] for note in _check_alike(first, other)]
    spec = first.results["spec"]
    settings = _settings(spec["settings"])
    found, more, origins = _together(loaded, [name for name, _ in named])
    tuned = joined_tuning({name: (e.results.get("tuned", {}), old) for name, (e, old) in origins.items()})
    suite = _suite(first, reward_funcs)
    documents = load_documents(settings)
    try:
        results = assemble(
            found,
            first.prompts,
            suite,
            settings,
            spec=spec,
            chosen_by=first.results["oracles"],
            tuned=tuned,
            documents=documents,
            data_name=first.results["data_name"],
        )
    finally:
        suite.close()
    results["reward_funcs"] = first.results["reward_funcs"]
    for name, (evaluation, old) in origins.items():
        _check_numbers(evaluation, old, results["models"][name])
    _check_documents(first, results)
    results["notes"] += notes + more
    with claimed(Path(output_dir)):
        say_replaced(Path(output_dir))
        write_results(results, found, Path(output_dir), rows_of=first.prompts)
    return results


def join_and_report(
    evaluations: Sequence[str], output_dir: str | Path, *, reward_funcs: Sequence[Any] | None = None
) -> dict[str, Any]:
    """`join`, then the report beside its results, and a short table on the terminal."""
    results = join(evaluations, output_dir, reward_funcs=reward_funcs)
    report_on(results, Path(output_dir))
    return results


def named_path(spec: str) -> tuple[str | None, str]:
    """NAME=PATH or PATH; a path that is there may have an equals sign."""
    name, equals, path = spec.partition("=")
    if not equals or Path(spec).exists():
        return None, spec
    if not name or not path:
        raise ConfigError(f"--compare: {spec!r} is no PATH and no NAME=PATH")
    return name, path


def _check_alike(a: Evaluation, b: Evaluation) -> list[str]:
    """Notes on versions that differ.

    Raises:
        ConfigError: anything else of the specs does.
    """
    fields = [dict(flatten({k: v for k, v in e.results["spec"].items() if k != "versions"})) for e in (a, b)]
    pairs = {key: [spec.get(key, "absent") for spec in fields] for key in dict.fromkeys([*fields[0], *fields[1]])}
    differing = [
        f"{key} is {_shown(one)} in the first and {_shown(two)} in the second"
        for key, (one, two) in pairs.items()
        if one != two
    ]
    if differing:
        raise ConfigError(
            f"{str(a.path)!r} and {str(b.path)!r} cannot be joined: {'; '.join(differing[:4])}"
            + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
            + ". Evaluate one of them again as the other was."
            + (" (The fingerprint is of the rows and their tokens.)" if "data.fingerprint" in differing[0] else "")
        )
    versions = [e.results["spec"]["versions"] for e in (a, b)]
    other = [f"{k} {versions[0].get(k)} and {v}" for k, v in versions[1].items() if versions[0].get(k) != v]
    return [f"Versions differ between {a.path} and {b.path}: {', '.join(other)}."] if other else []


def _shown(value: Any) -> Any:
    """A value in one line: a chat template has many."""
    return shortened(value) if isinstance(value, str) and ("\n" in value or len(value) > 200) else value


def _settings(on_file: Mapping[str, Any]) -> ContrastSettings:
    known = {field.name for field in dataclasses.fields(ContrastSettings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in on_file.items() if k in known}
    return ContrastSettings(**values)


def _suite(first: Evaluation, reward_funcs: Sequence[Any] | None) -> RewardSuite:
    """The rewards, of which the corpus metrics are needed, with the code they had."""
    expected = first.results["spec"]["rewards"]
    specs = reward_funcs or first.results["reward_funcs"]
    if None in specs:
        raise ConfigError(
            f"{str(first.path)!r} was made with a reward given as a function, which no file holds; give --reward_funcs"
        )
    without = [{k: v for k, v in s.items() if k != "weight"} if isinstance(s, Mapping) else s for s in specs]
    try:
        weights, think_end = (
            [r["weight"] for r in expected.values()],
            first.results["spec"]["settings"].get("think_end"),
        )
        suite = load_rewards(without, weights=weights, think_end=think_end)
    except RewardError as error:
        raise RewardError(
            f"{error} If it has moved since {str(first.path)!r} was made, give --reward_funcs."
        ) from error
    for name, had in expected.items():
        has = spec_on_file(suite.fingerprint().get(name))
        if has != had:
            fields = [key for key in had if has is None or has[key] != had[key]]
            raise RewardError(
                f"the reward {name!r} is not what it was when {str(first.path)!r} was made: {', '.join(fields)} "
                "changed. Restore it, or evaluate again."
            )
    return suite


def _together(
    loaded: Sequence[Evaluation], names: Sequence[str | None]
) -> tuple[dict[str, ModelStatistics], list[str], dict[str, tuple[Evaluation, str]]]:
    """All checkpoints by their names in the joined evaluation, notes, and where each comes from under which name."""
    entries: list[tuple[str, Evaluation, str]] = []
    notes: list[str] = []
    given = {name for name in names if name}
    for evaluation, name in zip(loaded, names, strict=True):
        for old, new in _renamed(evaluation, name).items():
            statistics = evaluation.found[old]
            same = [e for e in entries if e[0] == new and e[1].found[e[2]].path == statistics.path]
            if same:
                _, other, other_name = same[0]
                notes += _check_same(new, other, other.found[other_name], evaluation, statistics)
                continue
            namesakes = [e for e in entries if e[0] == new]
            if namesakes and new not in given:
                paths = namesakes[0][1].found[namesakes[0][2]].path, statistics.path
                raise ConfigError(
                    f"{new!r} is {paths[0]!r} in {str(namesakes[0][1].path)!r}, and {paths[1]!r} in "
                    f"{str(evaluation.path)!r}. Name them: NAME={evaluation.path}, with different names, or with one "
                    "name if they are seeds of one method."
                )
            entries.append((new, evaluation, old))
    final = numbered([new for new, _, _ in entries])
    methods(final)
    baseline = entries[0][1].found[entries[0][2]].path
    found, origins = {}, {}
    for name, (_, evaluation, old) in zip(final, entries, strict=True):
        statistics = evaluation.found[old]
        samples = [{**record, "model": name} for record in statistics.samples]
        found[name] = dataclasses.replace(statistics, samples=samples)
        origins[name] = (evaluation, old)
        against = next(iter(evaluation.found.values())).path
        apart = [s for s in statistics.studies if STUDIES[s].against_first]
        if apart and against != baseline:
            found[name].studies = statistics.studies | {s: [{}] * len(evaluation.prompts) for s in apart}
            notes.append(
                f"{', '.join(apart)}: nothing of {name}, which was measured against {against}, not {baseline}. "
                "Evaluate it together with that."
            )
    return found, notes, origins


def _renamed(evaluation: Evaluation, name: str | None) -> dict[str, str]:
    """By name on file that in the joined evaluation, seeds of a method all with the method's."""
    groups = methods(evaluation.found)
    of = {checkpoint: method for method, checkpoints in groups.items() for checkpoint in checkpoints}
    if name is None:
        return {checkpoint: checkpoint for checkpoint in of}
    chosen = list(groups)[-1:] if len(groups) <= 2 else []
    if not chosen:
        raise ConfigError(
            f"--compare {name}={evaluation.path}: that holds {', '.join(groups)}, and a name can be given where there "
            "is one beside the first alone; leave the name out"
        )
    return {checkpoint: name if method in chosen else checkpoint for checkpoint, method in of.items()}


def _check_same(
    name: str, a: Evaluation, statistics_a: ModelStatistics, b: Evaluation, statistics_b: ModelStatistics
) -> list[str]:
    """A note where a checkpoint that was measured twice differs by rounding.

    Raises:
        DataError: it differs by more.
    """
    differing = [
        row
        for row in range(len(a.prompts))
        if any(
            x[row] != y[row]
            for x, y in zip(
                (statistics_a.likelihood, *statistics_a.strategies.values()),
                (statistics_b.likelihood, *statistics_b.strategies.values()),
                strict=True,
            )
        )
    ]
    if not differing:
        return []
    scored = [(x, y) for x, y in zip(statistics_a.likelihood, statistics_b.likelihood, strict=True) if x or y]
    near = scored and all(x and y and math.isclose(x[_NLL], y[_NLL], rel_tol=1e-3, abs_tol=1e-3) for x, y in scored)
    if not near:
        raise DataError(
            f"{name} ({statistics_a.path}) has other numbers in {str(b.path)!r} than in {str(a.path)!r}, first in row "
            f"{a.prompts[differing[0]].key}: the checkpoint changed in between. Evaluate again."
        )
    return [
        f"{name} was measured in {a.path} and {b.path}, with numbers that differ by rounding in {len(differing)} rows; "
        f"those of {a.path} stand."
    ]


def _check_numbers(evaluation: Evaluation, name: str, joined: Mapping[str, Any]) -> None:
    """Raise DataError unless the statistics on file give the values of the results.json beside them."""
    old, new = (dict(_values(entry)) for entry in (evaluation.results["models"][name], joined))
    for place, value in old.items():
        other = new.get(place)
        if value != other and (None in (value, other) or not math.isclose(value, other)):
            raise DataError(
                f"{evaluation.path} says that {place} of {name} is {value}, and the rows beside it give "
                f"{other}: they are of different evaluations, or were changed. Evaluate again."
            )


def _values(node: Any, place: str = "") -> Iterator[tuple[str, float | None]]:
    if isinstance(node, Mapping):
        if "value" in node:
            yield place, node["value"]
        for key, inner in node.items():
            yield from _values(inner, f"{place}.{key}" if place else key)


def _check_documents(first: Evaluation, results: Mapping[str, Any]) -> None:
    had, has = (r.get("documents", {}).get("fingerprint") for r in (first.results, results))
    if had != has:
        raise DataError(
            f"the text of --likelihood_dataset has changed since {str(first.path)!r} was made: its fingerprint was "
            f"{had}, and is {has}. Restore it, or evaluate again."
        )
