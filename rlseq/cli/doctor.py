"""`rlseq doctor`: every check of a model and its tokenizer, a line each."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.config.commands import DoctorArguments, EvalRowsArguments
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.doctor.check import FAILED, OK, SKIPPED, WARNING, Result
from rlseq.errors import RlseqError

ARGUMENTS = (DoctorArguments, EvalRowsArguments)
MARKS = {OK: ("✓", "green"), WARNING: ("!", "yellow"), FAILED: ("✗", "bold red"), SKIPPED: ("–", "dim")}
WEIGHT_PATTERNS = ("*.bin", "*.pt", "*.pth")

DESCRIPTION = """Check a model and its tokenizer for reinforcement learning, one line per check, and say what to do.

Tokenizer and configuration: padding, stop tokens, BOS, chat template, dropout, generation config, context,
references, vocabulary, dtype. The model itself, in float32 on random tokens: left padding, packing, KV cache,
causality, saving and tied weights, LoRA, train mode. docs/reliability.md says what each looks at. No code of the
model's repository is run, and no weights but safetensors are read."""

EPILOG = """Exit status: 0 when nothing failed (warnings are none), 1 when a check failed, 2 on bad input.

  rlseq doctor --model_name_or_path recipes/g2p/base --dataset_name recipes/g2p/data.py --max_new_tokens 32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq doctor`; those of the data are those of `rlseq evaluate`."""
    parser.usage = "%(prog)s --model_name_or_path PATH [--dataset_name DATA] [--name value ...]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_flags(parser, ARGUMENTS)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when no check failed, else 1.

    Raises:
        RlseqError: the model, data or a flag cannot be used.
    """
    args, data = from_flags(ARGUMENTS, args)
    show = _silent if args.json else _Lines(args.model_name_or_path)
    results = []
    with _quiet():
        for result in examine(args, data):
            results.append(result)
            show(result)
    failed = any(result.status == FAILED for result in results)
    if args.json:
        report = {"model": args.model_name_or_path, "ok": not failed, "checks": [asdict(r) for r in results]}
        print(visible(json.dumps(report, indent=1, ensure_ascii=False)))
    else:
        show.end(results)
    return int(failed)


def examine(args: DoctorArguments, data: EvalRowsArguments) -> Iterator[Result]:
    """Make the checks, the cheap ones first.

    Raises:
        RlseqError: the model or data cannot be loaded.
    """
    from rlseq.config.groups.chat_template import template_options
    from rlseq.data.rows import load_prompts
    from rlseq.doctor.static import load_configs, static_checks
    from rlseq.engine.model.load import load_tokenizer
    from rlseq.training.models import check_model_path

    path = Path(args.model_name_or_path)
    unsafe = path.is_dir() and not any(path.glob("*.safetensors")) and any(any(path.glob(p)) for p in WEIGHT_PATTERNS)
    if not unsafe:
        check_model_path(args.model_name_or_path)
    config, generation_config = load_configs(args.model_name_or_path)
    tokenizer = load_tokenizer(args.model_name_or_path)  # as it was saved
    prompts = []
    if template := data.prompt_options().get("chat_template"):
        tokenizer.chat_template = template  # also where there is no data
    if data.dataset_name:
        options = data.prompt_options() | {"config_name": data.dataset_config}
        options["chat_template_kwargs"] = template_options(args.chat_template_kwargs)
        prompts = load_prompts(data.dataset_name, tokenizer, split=data.eval_split, limit=data.eval_rows, **options)
    yield from static_checks(
        config,
        tokenizer,
        prompts,
        generation_config=generation_config,
        max_new_tokens=args.max_new_tokens,
        own_sampler=False,
        needs_references=True,
        elsewhere=True,
    )
    if unsafe:
        todo = "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder), where you trust them"
        yield Result("weights", FAILED, "pickled, not safetensors: loading them can run any code", todo)
        return
    yield from examine_model(args.model_name_or_path)


def examine_model(name_or_path: str) -> Iterator[Result]:
    """Load the model as training would, in float32, and make the checks that run it.

    Raises:
        ModelError: it cannot be loaded.
    """
    import torch

    from rlseq.doctor import forward
    from rlseq.engine.model.gguf_files import gguf_file
    from rlseq.training.models import disable_dropout

    path = Path(name_or_path)
    adapter = (path / "adapter_config.json").is_file()
    model, missing = _load(name_or_path, adapter)
    # A build for CUDA names an accelerator on machines that have none, too.
    model = model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    files = sorted(path.glob("*.safetensors")) or [file for file in [gguf_file(path)] if file]
    yield _attempt("weights", forward.check_weights, model, missing, files)
    yield _attempt("left padding", forward.check_left_padding, model)
    yield _attempt("packing", forward.check_packing, model)
    yield _attempt("KV cache", forward.check_cache, model)
    yield _attempt("causality", forward.check_causality, model)
    if adapter:
        yield Result("saving", SKIPPED, "an adapter is saved without its base: examine that")
        yield _attempt("LoRA", forward.check_adapter, model)
    else:
        yield _attempt("saving", forward.check_saving, model)
        yield _attempt("LoRA", forward.check_lora, model)
    yield _attempt("train mode", forward.check_train_mode, model, disable_dropout)


def _load(name_or_path: str, adapter: bool) -> tuple[Any, list[str]]:
    """The model and the names of the parameters that its checkpoint lacks."""
    import torch

    from rlseq.config.training import ModelArguments
    from rlseq.engine.model.load import load_with_loading_info
    from rlseq.training.models import load_model

    if adapter:
        return load_model(ModelArguments(model_name_or_path=name_or_path, dtype="float32")), []
    model, missing, _ = load_with_loading_info(name_or_path, dtype=torch.float32)
    return model, sorted(missing)


def _attempt(name: str, check: Callable[..., Result], *given: Any) -> Result:
    """A check that breaks on the model has found something: the model refuses what training would ask of it."""
    try:
        return check(*given)
    except RlseqError:
        raise
    except Exception as error:  # anything at all
        reason = next(iter(str(error).splitlines()), "")
        todo = "training asks the same of the model: update transformers, or take another model"
        return Result(name, FAILED, f"stopped by {type(error).__name__}: {reason}", todo)


def _silent(result: Result) -> None:
    """Nothing is printed as it is found."""


class _Lines:
    """Findings in the terminal, as they come."""

    def __init__(self, model: str):
        from rich.console import Console

        self.console = Console(highlight=False)
        self.console.print(visible(f"rlseq doctor: {model}\n"), style="bold", markup=False)

    def __call__(self, result: Result) -> None:
        from rich.table import Table
        from rich.text import Text

        mark, style = MARKS[result.status]
        line = Table.grid(padding=(0, 1), pad_edge=False)
        for width in (1, 7, 17):
            line.add_column(width=width)
        line.add_column(overflow="fold")
        found = Text(visible(result.found), style="dim" if result.status == SKIPPED else "")
        line.add_row(Text(mark, style), Text(result.status, style), result.check, found)
        for todo in result.todo.splitlines():
            line.add_row("", "", "", Text(visible(f"→ {todo}"), style=style))
        self.console.print(line)

    def end(self, results: list[Result]) -> None:
        """Print how many checks ended how."""
        counts = {status: sum(r.status == status for r in results) for status in MARKS}
        plural = {WARNING: "s" if counts[WARNING] > 1 else ""}
        said = ", ".join(f"{count} {status}{plural.get(status, '')}" for status, count in counts.items() if count)
        self.console.print(f"\n{said}", style="bold red" if counts[FAILED] else "bold")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars and advice of other libraries between the lines."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
