"""What a run began with beside its settings: its rewards by code and arguments, its data by content.

It is kept in `began_with.json`. A run that goes on with others would write their numbers behind those of the first as
if they were of one kind, so it stops, unless --resume_with_changes says that this is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.errors import RunDirectoryError
from rlseq.scoring import RewardSuite
from rlseq.scoring.find import find
from rlseq.scoring.fingerprint import code_hash
from rlseq.training.records import write_json_atomic

FILE = "began_with.json"


def began_with(
    suites: Mapping[str, RewardSuite | None], data: Mapping[str, Sequence[Any]], functions: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Describe the rewards, the data and the other functions of a run, in plain JSON.

    Args:
        suites: by what they are for ("reward", "eval reward"); one may be None.
        data: by name ("training rows"), anything with a `repr` that is equal for equal content.
        functions: specs of tools and of an environment.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, suite in suites.items():
        for name, about in (suite.signature() if suite is not None else {}).items():
            found[f"{kind} {name!r}"] = about
    for spec in functions:
        found[f"function {spec!r}"] = {"code": code_hash(find(spec, Path.cwd()).function)}
    for name, rows in data.items():
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode(errors="surrogatepass") + b"\0")
        found[name] = {"count": len(rows), "content": digest.hexdigest()[:16]}
    return json.loads(json.dumps(found, default=repr))


def changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs, one text each: "reward 'r': code"; "training rows: 84, now 60"."""
    texts = []
    for name in dict.fromkeys([*before, *now]):
        had, has = before.get(name), now.get(name)
        if had is None or has is None:
            texts.append(f"{name}: {'new' if had is None else 'gone'}")
        elif had.get("count") != has.get("count"):
            texts.append(f"{name}: {had['count']}, now {has['count']}")
        elif differing := [key for key in dict.fromkeys([*had, *has]) if had.get(key) != has.get(key)]:
            hashes = ("code", "content")
            said = [key if key in hashes else f"{key} {had.get(key)}, now {has.get(key)}" for key in differing]
            texts.append(f"{name}: {'; '.join(said)}")
    return texts


def check_unchanged(run: Path, now: Mapping[str, Any], *, accepted: bool) -> str | None:
    """Refuse to go on with other rewards or rows than the run began with.

    Args:
        run: the directory of the run that is gone on with.
        now: as `began_with` describes what is there today.
        accepted: whether other ones are meant.

    Returns:
        A sentence on what differs, where that is meant; None where nothing does, or nothing is known.

    Raises:
        RunDirectoryError: it names what differs.
    """
    try:
        before = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a run before this was kept, or damaged: nothing to compare with
        return None
    differing = "; ".join(changes(before, now))
    if differing and not accepted:
        raise RunDirectoryError(
            f"the run in {run} began with something else: {differing}. Bring that back, start anew in another "
            "--output_dir, or go on with what is there by --resume_with_changes true."
        )
    return f"the run goes on with something else than it began with: {differing}" if differing else None


def write(run: Path, now: Mapping[str, Any]) -> None:
    """Keep what a run begins, or goes on, with."""
    write_json_atomic(run / FILE, now)
