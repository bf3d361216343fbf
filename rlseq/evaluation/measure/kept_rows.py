"""Measurements of rows, kept on disk batch by batch, so that a command that was interrupted resumes after them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlseq.common.formats import PARTIAL_RESULTS
from rlseq.errors import FormatError

_FOLDER = ".measured_rows"
_READING: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
Measurements = dict[str, list[float | None]]  # by row key: one exact chance, or the reward of each sample


class KeptRows:
    """Measurements of rows on disk: what earlier processes left, and a file for those of this one.

    Args:
        folder: in whose folder `.measured_rows` there is a file per process.
        key: of all that decides a measurement beside the row: files of another key are not read. None: nothing is kept.

    Attributes:
        found: measurements by row key, equal on every process.
    """

    def __init__(self, folder: Path, key: str | None):
        self.folder, self._key = folder / _FOLDER, key
        state = PartialState()
        found: Measurements = {}
        if key is not None and state.is_main_process:
            for file in sorted(self.folder.glob("*.measured")):
                found |= self._read(file)
        (self.found,) = broadcast_object_list([found])
        self._path, self._begun = self.folder / f"{state.process_index}.measured", False

    def add(self, found: Measurements) -> None:
        """Keep measurements of this process."""
        if self._key is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        resumes = self._begun or (self._path.is_file() and self._header_fits(self._path.read_text(**_READING)))
        with self._path.open("a" if resumes else "w", encoding="utf-8") as file:
            if not resumes:
                file.write(json.dumps(PARTIAL_RESULTS.stamp({"key": self._key})) + "\n")
            elif not self._begun:
                file.write("\n")  # ends a line that was cut off by a kill
            self._begun = True
            file.writelines(json.dumps([key, values]) + "\n" for key, values in found.items())
            file.flush()
            os.fsync(file.fileno())

    def resume_hint(self) -> str:
        """What to say of a command that was interrupted."""
        rows = len({key for file in self.folder.glob("*.measured") for key in self._read(file)})
        if not rows:
            return "interrupted before the first batch of rows was finished"
        return f"interrupted: the same command resumes after the {rows:,} rows that are measured ({self.folder})"

    def _read(self, file: Path) -> Measurements:
        text = file.read_text(**_READING)
        if not self._header_fits(text):
            return {}
        found: Measurements = {}
        for line in text.split("\n")[1:]:
            try:
                key, values = json.loads(line)
            except ValueError:  # cut off, or the empty line after it
                continue
            found[key] = values
        return found

    def _header_fits(self, text: str) -> bool:
        try:
            header = json.loads(text.partition("\n")[0])
            PARTIAL_RESULTS.check(header, self.folder)
        except (ValueError, FormatError):
            return False
        return header.get("key") == self._key


def remove_kept(folder: Path) -> None:
    """Remove what was kept in case of an interruption."""
    for file in (folder / _FOLDER).glob("*.measured"):
        file.unlink()
    if (folder / _FOLDER).is_dir():
        (folder / _FOLDER).rmdir()
