"""What a run started with beside its settings: its rewards by code and arguments, its data and templates by content.

It is kept in `run_inputs.json`. A run that resumes with others would write their numbers behind those of the first as
if they were of one kind, so it stops, unless --resume_with_changes says that this is meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.common.formats import RUN_INPUTS
from rlseq.errors import RunDirectoryError
from rlseq.scoring import RewardSuite
from rlseq.scoring.specs.find import find
from rlseq.scoring.specs.fingerprint import code_hash, content_hash, needed_files
from rlseq.training.run.records import write_json_atomic

FILE = "run_inputs.json"


def run_inputs(
    suites: Mapping[str, RewardSuite | None],
    data: Mapping[str, Sequence[Any]],
    functions: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Describe the rewards, the data and the other functions of a run, in plain JSON.

    Args:
        suites: by what they are for ("reward", "eval reward"); one may be None.
        data: by name ("training rows"), rows of any content.
        functions: specs of tools and of an environment.
        texts: by name, what stands around every row's messages ("system prompt", "chat template").
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, suite in suites.items():
        for name, about in (suite.fingerprint() if suite is not None else {}).items():
            found[f"{kind} {name!r}"] = about
    for spec in functions:
        function = find(spec, Path.cwd()).function
        found[f"function {spec!r}"] = {"code": code_hash(function), "files": needed_files(function, {})}
    for name, text in (texts or {}).items():
        found[name] = {"text": text}
    for name, rows in data.items():
        digits = "".join(map(content_hash, rows))  # 8 a row, that the first other one is found
        found[name] = {"count": len(rows), "rows": digits}
    return json.loads(json.dumps(found, default=repr))


def changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs, one text each: "reward 'r': code, module helpers.py"; "training rows: 84, now 60"."""
    texts = []
    for name in dict.fromkeys([*before, *now]):
        had, has = before.get(name), now.get(name)
        if had is None or has is None:
            texts.append(f"{name}: {'new' if had is None else 'gone'}")
        elif "count" in has:
            if (had["count"], had["rows"]) != (has["count"], has["rows"]):
                texts.append(f"{name}: {_rows_change(had, has)}")
        elif said := _reward_changes(had, has):
            texts.append(f"{name}: {'; '.join(said)}")
    return texts


def _rows_change(had: Mapping[str, Any], has: Mapping[str, Any]) -> str:
    if had["count"] != has["count"]:
        return f"{had['count']}, now {has['count']}"
    one, two = had["rows"], has["rows"]
    other = [start // 8 + 1 for start in range(0, len(two), 8) if one[start : start + 8] != two[start : start + 8]]
    differ = f"row {other[0]} of {has['count']} differs"
    return differ if len(other) == 1 else f"{len(other)} of {has['count']} differ, the first is row {other[0]}"


def _reward_changes(had: Mapping[str, Any], has: Mapping[str, Any]) -> list[str]:
    said = []
    for key in dict.fromkeys([*had, *has]):
        one, two = had.get(key), has.get(key)
        if key == "files":
            one, two = one or {}, two or {}
            unknown = {name for name in one.keys() ^ two.keys() if name.startswith("weights of ")}
            # of a model of the hub that was not in the cache at one of the two times: nothing to compare
            names = [name for name in dict.fromkeys([*one, *two]) if name not in unknown]
            said += [name for name in names if one.get(name) != two.get(name)]
        elif one != two:
            said.append({"code": "code", "text": "another text"}.get(key) or f"{key} {one}, now {two}")
    return said


def check_unchanged(run: Path, now: Mapping[str, Any], *, accepted: bool) -> str | None:
    """Refuse to resume with other rewards or rows than the run started with.

    Args:
        run: the directory of the run that resumes.
        now: what `run_inputs` says of today.
        accepted: whether other ones are meant.

    Returns:
        A sentence on what differs, where that is meant; None where nothing does, or nothing is known.

    Raises:
        RunDirectoryError: it names what differs.
        FormatError: the record is of a version that cannot be read.
    """
    try:
        before = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a run before this was recorded, or damaged: nothing to compare with
        return None
    RUN_INPUTS.check(before, run / FILE)
    before = {name: about for name, about in before.items() if name != RUN_INPUTS.key}
    differing = "; ".join(changes(before, now))
    if differing and not accepted:
        raise RunDirectoryError(
            f"the run in {run} started with something else: {differing}. Restore it, start again in another "
            "--output_dir, or accept the change by --resume_with_changes true."
        )
    return f"the run resumes with something else than it started with: {differing}" if differing else None


def write(run: Path, now: Mapping[str, Any]) -> None:
    """Record what a run starts, or resumes, with."""
    write_json_atomic(run / FILE, RUN_INPUTS.stamp(now))
