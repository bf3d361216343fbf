"""What an evaluation has finished, kept on disk part by part, so that one that was killed can resume.

A part is the likelihood of the references, one strategy, or one study, of one model and of this process's rows. It is
kept with a hash of all that decides it, and is taken up only under an equal one; what does not fit or cannot be read
is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import cached_file

from rlseq.common.escapes import visible
from rlseq.common.formats import PARTIAL_RESULTS
from rlseq.engine.strategies import Strategy
from rlseq.errors import FormatError
from rlseq.scoring import RewardSuite
from rlseq.scoring.cache import key_of
from rlseq.scoring.specs.fingerprint import folder_hash
from rlseq.types import Prompt, Rollout

_FOLDER = ".partial_results"
# Names of parts; a strategy's is its spec.
REFERENCES, DOCUMENTS, STUDY = "likelihood", "documents", "study {}"


class PartialResults:
    """The parts of one model's evaluation: those found on disk, and a place for those to come.

    Under several processes a part counts as found only where every one of them has it, so that all do the same.

    Args:
        output_dir: of the evaluation, in whose folder `.partial_results` parts are kept; None: nothing is kept.
        key: a hash of all that decides the parts; None: it is not known, and nothing is kept by this process.
        names: of all parts.

    Attributes:
        found: the parts that are not measured again, by name.
    """

    def __init__(self, output_dir: Path | None = None, key: str | None = None, names: Sequence[str] = ()):
        self.folder = None if output_dir is None or key is None else output_dir / _FOLDER
        self.found: dict[str, Any] = {}
        if output_dir is None:
            return
        state = PartialState()
        self._key = f"{key} {state.process_index} of {state.num_processes}"
        mine = {}
        if self.folder is not None:
            mine = {name: value for name in names if (value := self._read(name)) is not None}
        everywhere = set(mine).intersection(*gather_object([set(mine)]))  # called by all, whatever they have
        self.found = {name: value for name, value in mine.items() if name in everywhere}

    def get_or_compute(self, part: str, measure: Callable[[], Any]) -> Any:
        """A part as it was found, or measured and kept.

        What is kept comes back as JSON gives it (tuples as lists), whether it was found or measured, so that an
        resumed evaluation has what an uninterrupted one has.
        """
        if part in self.found:
            return self.found[part]
        value = measure()
        return value if self.folder is None else self._keep(part, value)

    def _path(self, part: str) -> Path:
        return self.folder / f"{_hash(f'{self._key} {part}')}.json"

    def _keep(self, part: str, value: Any) -> Any:
        text = json.dumps(value)
        path = self._path(part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.write(f"{json.dumps(PARTIAL_RESULTS.stamp({'checksum': _hash(text)}))}\n{text}")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:  # a full disk must not end what can still be measured
            warnings.warn(f"{part} is not kept for an evaluation that resumes from here: {error}", stacklevel=2)
        return json.loads(text)

    def _read(self, part: str) -> Any:
        path = self._path(part)
        try:
            header, _, text = path.read_text(encoding="utf-8").partition("\n")
            about = json.loads(header)
            PARTIAL_RESULTS.check(about, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except FormatError as error:
            warnings.warn(f"{part}: {error}", stacklevel=2)
            return None
        except (OSError, ValueError):  # also of bytes that are not UTF-8
            about, text = {}, ""
        if about.get("checksum") != _hash(text):
            warnings.warn(f"{path} is truncated; {part} is measured again", stacklevel=2)
            return None
        return json.loads(text)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def remove_partial_results(output_dir: Path) -> None:
    """Remove what is kept of unfinished evaluations: one has finished."""
    shutil.rmtree(output_dir / _FOLDER, ignore_errors=True)


def resume_hint(output_dir: Path) -> str:
    """What to say of an evaluation that was interrupted."""
    folder = output_dir / _FOLDER
    if not any(folder.glob("*.json")):
        return "interrupted before any part was finished"
    return f"interrupted: the same command resumes from the parts that are finished ({folder})"


def rollouts_as_json(groups: Sequence[Sequence[Rollout]]) -> list[list[dict[str, Any]]]:
    """Completions as JSON holds them; `rollouts_from_json` gives them back."""
    return [[vars(rollout) for rollout in group] for group in groups]


def rollouts_from_json(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Rollout]]:
    """The completions that `rollouts_as_json` was given."""
    return [
        [Rollout(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}) for fields in group]
        for group in groups
    ]


def partial_results_of(
    name: str,
    checkpoints: Sequence[str],
    prompts: Sequence[Prompt],
    prompt_options: Mapping[str, Any],
    documents: Sequence[str],
    suite: RewardSuite,
    settings: Any,
    output_dir: Path,
    *,
    tuned: Mapping[str, Strategy],
    doing: str,
    quiet: bool,
) -> PartialResults:
    """The parts of one model of a contrast, found and to come; says how many are found, unless `quiet`.

    Args:
        name: of the model.
        checkpoints: the paths of the model and of the one that studies compare it with.
        prompts: all rows, with all columns that rewards may read.
        prompt_options: how rows became prompts, and references are rendered.
        documents: text without prompts.
        settings: of the contrast (`rlseq.evaluation.measure.checkpoint.ContrastSettings`).
        tuned: by sweep the one that stands for it.
        doing: what is measured, as the progress line says it.
    """
    state = PartialState()
    fingerprints = [checkpoint_fingerprint(path) for path in checkpoints]
    fields = {
        "model": [name, *checkpoints, *fingerprints],
        "rows": [vars(prompt) for prompt in prompts],
        "prompt": dict(prompt_options),
        "documents": documents,
        "rewards": suite.fingerprint(),
        "settings": settings.reproducibility_fields(),
        "tuned": {sweep: strategy.spec for sweep, strategy in tuned.items()},
        "versions": versions(),
        "device": state.device.type,
    }
    strategies = [strategy.spec for strategy in settings.parsed()]
    names = [REFERENCES, *strategies, *map(STUDY.format, settings.studies), *([DOCUMENTS] if documents else [])]
    try:
        key = None if None in fingerprints else key_of("", fields)
    except TypeError:  # a column that JSON cannot name, such as a dict with tuples for keys
        key = None
    parts = PartialResults(output_dir, key, names)
    if parts.found and state.is_main_process and not quiet:
        said = f"{doing} {name}: {len(parts.found)} of {len(names)} parts found in {parts.folder}"
        print(visible(said), flush=True)
    return parts


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    import transformers

    import rlseq

    return {
        "rlseq": rlseq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def checkpoint_fingerprint(path: str) -> str | None:
    """A hash of a checkpoint's files: names, times of change and content (`folder_hash`); an adapter's base too.

    Args:
        path: a folder, or a hub id whose files are in the local cache.

    Returns:
        The hash, or None where the files cannot be found.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            folder = Path(cached_file(path, "config.json", local_files_only=True)).parent
        found = folder_hash(folder, times=True)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            base = checkpoint_fingerprint(json.loads(adapter.read_bytes())["base_model_name_or_path"])
            if base is None:
                return None
            found += base
    except (OSError, ValueError, KeyError):
        return None
    return found
