"""The settings by which rows become prompts, of every recipe and command that reads a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlseq.common.mixture import Joined, parse_mixture
from rlseq.config.fields import setting
from rlseq.config.groups.chat_template import read_chat_template
from rlseq.config.validation.validate import Settings
from rlseq.errors import ConfigError


@dataclass
class RowsArguments(Settings):
    """A data set, and how its rows become prompts and references."""

    dataset_name: str | None = setting(
        None,
        "Task module (path/to/task.py), local json/jsonl/csv/parquet file or folder, or hub id. Several with weights, "
        "math.jsonl:0.7 code.jsonl:0.3, are mixed for training; the column dataset says which one a row is of.",
        metavar="DATA[:WEIGHT]",
        nargs="+",
        action=Joined,
    )
    dataset_config: str | None = setting(None, "Configuration name of a hub data set.")
    prompt_column: str = setting("prompt", "Column of the prompt: text or chat messages.")
    reference_column: str = setting("references", "Column of the right answer: a text or a list of texts.")
    prompt_template: str | None = setting(
        None,
        "Jinja template over a row's columns that makes the prompt, e.g. \"{{ word | list | join(' ') }} = \".",
    )
    reference_template: str | None = setting(None, "Jinja template over a row's columns that makes the reference.")
    merge_references: bool = setting(False, "Make rows with equal prompts one row with all their references.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if parse_mixture(self.dataset_name) is not None and self.merge_references:
            raise ConfigError(
                "--merge_references makes rows with equal prompts one, and a mixture of data sets repeats rows by its "
                "weights: leave out one of them"
            )

    def row_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.rows.load_rows` that these settings stand for."""
        return {
            "config_name": self.dataset_config,
            "prompt_column": self.prompt_column,
            "prompt_template": self.prompt_template,
        }

    def prompt_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.prompts.build_prompts` that these settings stand for."""
        return {
            "prompt_column": self.prompt_column,
            "reference_column": self.reference_column,
            "prompt_template": self.prompt_template,
            "reference_template": self.reference_template,
            "merge_references": self.merge_references,
        }


@dataclass
class RenderedRowsArguments(RowsArguments):
    """A data set, and what stands around the messages of its rows."""

    system_prompt: str | None = setting(
        None,
        "System message that is put before the messages of every prompt, in training and evaluation; the rows hold "
        "chat messages without one.",
        metavar="TEXT",
    )
    chat_template: str | None = setting(
        None,
        "File of a Jinja chat template to use instead of the tokenizer's own; the trained model is saved with it.",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise ConfigError("--system_prompt is empty; give its text, or leave it out (is a shell variable unset?)")
        # Read once: training and the evaluation of its result use the same text, whatever becomes of the file.
        self._chat_template = read_chat_template(self.chat_template)

    def rendering(self) -> dict[str, str]:
        """By name what is put around the rows' messages, where it is not the tokenizer's own."""
        given = {"system prompt": self.system_prompt, "chat template": self._chat_template}
        return {name: text for name, text in given.items() if text is not None}

    def prompt_options(self) -> dict[str, Any]:
        """The options of `rlseq.data.prompts.build_prompts` that these settings stand for."""
        given = {"system_prompt": self.system_prompt, "chat_template": self._chat_template}
        return super().prompt_options() | {name: text for name, text in given.items() if text is not None}
