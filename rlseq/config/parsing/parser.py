"""Settings of a recipe, from a YAML file and flags on top: nothing misspelled or mistyped gets through.

`RecipeParser` keeps TRL's field names and its dataclasses. It refuses what `trl.TrlParser` lets pass:
abbreviated flags, unknown YAML keys, YAML values of another type than the field's, environment variables set
from the YAML file, and arguments read from a hidden `<script>.args` file. Every refusal is a `ConfigError` of
one line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, get_type_hints

from trl import TrlParser

from rlseq.config.fields import for_argparse
from rlseq.config.parsing.config_file import construct, resolved_values, write_config
from rlseq.config.parsing.flags import CONFIG_HELP, HelpFormatter, OneLineErrors
from rlseq.config.parsing.values import flag_type
from rlseq.config.parsing.yaml_file import given_settings
from rlseq.config.validation.batch_sizes import working_batch_sizes
from rlseq.errors import ConfigError, did_you_mean

__all__ = ["RecipeParser", "resolved_values", "working_batch_sizes", "write_config"]

_UNSET = object()
_LIBRARIES = {"trl": 1, "transformers": 2}  # the order of their groups in --help, after the recipe's own


class RecipeParser(OneLineErrors, TrlParser):
    """Parser of one or more dataclasses: `--config FILE.yaml` gives values, flags override them.

    Args:
        dataclass_types: the dataclasses to fill, in the order in which `parse` returns them. Their fields
            must have distinct names. `_argument_group_name` titles the group of a dataclass in `--help`.
        description: shown at the top of `--help`.
    """

    def __init__(self, dataclass_types: Iterable[type], description: str | None = None):
        super().__init__(
            list(dataclass_types),
            allow_abbrev=False,
            description=description,
            formatter_class=HelpFormatter,
            usage="%(prog)s [--config FILE.yaml] [--name value ...]",
        )
        self.add_argument("--config", metavar="FILE.yaml", help=CONFIG_HELP)
        self.parsed: tuple[Any, ...] = ()
        for action in self._actions:
            action.required = False  # a YAML file may give it: `parse` looks once both are read
            if action.nargs == 0 and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS  # --name false says the same
        self._action_groups.sort(key=lambda group: getattr(group, "rank", -1))

    def parse(
        self, args: Sequence[str] | None = None, *, default_config: str | os.PathLike | None = None
    ) -> tuple[Any, ...]:
        """Return the dataclasses, filled from flags, else from the YAML file, else from their defaults.

        Args:
            args: the command line; that of the process when None.
            default_config: the YAML file to read when the command line names none.

        A path recipes/... is that of the working directory where it has it, and else the bundled one.

        Raises:
            ConfigError: for anything that is not a known name with a value of its type, and for values that
                the dataclasses refuse.
        """
        # argparse sets a default only where the namespace has nothing: what stays unset was not given.
        namespace = argparse.Namespace(**{action.dest: _UNSET for action in self._actions})
        namespace, unknown = self.parse_known_args(sys.argv[1:] if args is None else list(args), namespace)
        if unknown:
            raise ConfigError(self._unknown_argument(unknown))
        flags = {name: value for name, value in vars(namespace).items() if value is not _UNSET}
        config = flags.pop("config", default_config)
        given = given_settings(self.dataclass_types, flags, config)
        self.parsed = tuple(construct(dataclass_type, given) for dataclass_type in self.dataclass_types)
        return self.parsed

    def write_config(self, path: str | os.PathLike) -> None:
        """Write what the last `parse` returned, as it is now, to a YAML file that repeats the run."""
        write_config(path, *self.parsed)

    def parse_args_and_config(self, args: Sequence[str] | None = None, **_: Any) -> tuple[Any, ...]:
        """TRL's name for `parse`, so that the lenient original cannot be called by accident."""
        return self.parse(args)

    def _unknown_argument(self, unknown: list[str]) -> str:
        flag = next((argument for argument in unknown if argument.startswith("-")), None)
        if flag is None:
            return f"Unexpected argument {unknown[0]!r}: give settings as --name value, or in a --config file."
        flag = flag.split("=")[0]
        valid = [option for option in self._option_string_actions if "-" not in option.removeprefix("--")]
        return f"Unknown flag {flag}.{did_you_mean('--' + flag.lstrip('-').replace('-', '_'), valid)}"

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints = get_type_hints(dtype)
        for field in dataclasses.fields(dtype):
            if field.init:
                field = copy.copy(field)
                field.type, field.metadata = flag_type(hints[field.name]), for_argparse(field.metadata)
                self._parse_dataclass_field(self._help_group(dtype, field.name), field)

    def _help_group(self, dtype: type, field_name: str) -> argparse._ArgumentGroup:
        """Own fields go under the title of their dataclass, TRL's and transformers' under theirs."""
        owners = [cls for cls in dtype.__mro__ if field_name in inspect.get_annotations(cls)]
        library = owners[0].__module__.partition(".")[0]
        if library in _LIBRARIES:
            # A private base only overrides defaults of the class that declares the field.
            owner = owners[-1] if owners[0].__name__.startswith("_") else owners[0]
            library = owner.__module__.partition(".")[0]
            title = f"{owner.__name__} ({library})"
        else:
            title = getattr(dtype, "_argument_group_name", dtype.__name__)
        for group in self._action_groups:
            if group.title == title:
                return group
        group = self.add_argument_group(title)
        group.rank = _LIBRARIES.get(library, 0)
        return group
