"""The files that outlive the process that wrote them: each format has one version, and one check of it on reading.

A version goes up when what an rlseq that reads the old one would make of a new file is wrong. `oldest` follows it where
the new rlseq would make something wrong of an old file. A file without a version, as rlseq wrote them before it kept
any and as they are written by hand, is of version 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlseq import __version__
from rlseq.errors import FormatError


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        name: as messages say it.
        version: what this rlseq writes.
        oldest: the oldest version that it reads.
        remedy: what to do with a file that it cannot read.
        key: where a record holds its version.
    """

    name: str
    version: int
    oldest: int
    remedy: str
    key: str = "format_version"

    def stamp(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with the version that this rlseq writes."""
        return {**record, self.key: self.version}

    def check(self, record: Any, file: Path | str) -> None:
        """Refuse a record of a version that this rlseq cannot read.

        Raises:
            FormatError: naming the file, its version, those that can be read, and what to do.
        """
        found = record.get(self.key, 0) if isinstance(record, Mapping) else 0
        if type(found) is int and self.oldest <= found <= self.version:
            return
        reads = f"{self.version}" if self.oldest == self.version else f"{self.oldest} to {self.version}"
        raise FormatError(
            f"{file} is a {self.name} of format version {found!r}; rlseq {__version__} reads {reads}. {self.remedy}, "
            "or use the rlseq that wrote it."
        )


ROLLOUTS = Format("rollout log", version=1, oldest=0, remedy="Run the training again")
METRICS = Format("log of metrics", version=1, oldest=0, remedy="Run the training again")
RUN_CONFIG = Format("file of a run's settings", version=1, oldest=0, remedy="Run the training again")
RUN_INPUTS = Format("record of a run's rewards and data", version=1, oldest=0, remedy="Run the training again")
CHECKPOINT = Format("checkpoint", version=3, oldest=3, remedy="Start the run again")
RESULTS = Format("result of an evaluation", version=4, oldest=4, remedy="Evaluate again", key="schema")
PARTIAL_RESULTS = Format("partial result of an evaluation", version=3, oldest=3, remedy="It is measured again")
