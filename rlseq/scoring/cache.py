"""Reward values kept on disk by content: for judges and code execution, whose calls cost money or time.

The key is a hash of the reward's code, its arguments and what it reads of the row; the value is JSON in an
sqlite file, which several processes may share. Only "ok" and "abstained" are kept: a failure is tried
again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlseq.errors import RewardError
from rlseq.scoring.outcome import Outcome, plain

KEPT = ("ok", "abstained")
LOCK_TIMEOUT = 60.0  # seconds to wait for another process's write


def default_path() -> Path:
    """Where `cache: true` keeps values: one file for all runs of a user."""
    return Path.home() / ".cache" / "rlseq" / "rewards.sqlite"


def key_of(code: str, arguments: Mapping[str, Any]) -> str:
    """A hash of a reward's code and the arguments of one call."""
    content = json.dumps([code, arguments], sort_keys=True, default=_encode, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _encode(value: Any) -> Any:
    light = plain(value)
    return repr(value) if light is value else light


class Cache:
    """An sqlite file of outcomes by key.

    Raises (all methods):
        RewardError: when the file cannot be read or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()

    def get(self, keys: Iterable[str]) -> dict[str, list[Outcome]]:
        """Return the outcomes of those keys that are known."""
        keys = list(dict.fromkeys(keys))
        if not self.path.is_file():
            return {}
        found: dict[str, list[Outcome]] = {}
        with closing(self._open()) as database:
            for start in range(0, len(keys), 500):  # sqlite limits the variables of a statement
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, outcomes FROM rewards WHERE key IN ({marks})"
                for key, text in self._do(database, query, some):
                    found[key] = [Outcome(*outcome) for outcome in json.loads(text)]
        return found

    def put(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Keep the outcomes of calls that all succeeded."""
        lines = [
            (key, self._json(several)) for key, several in outcomes.items() if all(o.status in KEPT for o in several)
        ]
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cache_error(error) from error
        with closing(self._open()) as database, database:
            self._do(database, "INSERT OR REPLACE INTO rewards VALUES (?, ?)", lines, many=True)

    def _json(self, outcomes: Sequence[Outcome]) -> str:
        return json.dumps([[o.value, o.status, dict(o.details)] for o in outcomes])

    def _open(self) -> sqlite3.Connection:
        try:
            database = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT)
            database.execute("CREATE TABLE IF NOT EXISTS rewards (key TEXT PRIMARY KEY, outcomes TEXT NOT NULL)")
            return database
        except sqlite3.Error as error:
            raise self._cache_error(error) from error

    def _do(self, database: sqlite3.Connection, query: str, values: Any, many: bool = False) -> list[tuple]:
        try:
            return (database.executemany if many else database.execute)(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._cache_error(error) from error

    def _cache_error(self, error: sqlite3.Error | OSError) -> RewardError:
        return RewardError(
            f"the reward cache {self.path} cannot be used: {error}. Give another file with cache: PATH, or delete it."
        )
