"""What every training recipe does around its trainer: open the run directory, say what runs, and finish."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from rlseq.scoring import RewardSuite
from rlseq.training.callbacks import GracefulStop
from rlseq.training.config import RunArguments
from rlseq.training.parser import write_config
from rlseq.training.run_directory import RunDirectory, prepare
from rlseq.types import Prompt, Rollout

SELECTS_MODEL_OR_DATA = ("--config", "--model_name_or_path", "--dataset_name", "--new_model")


def default_config(path: Path) -> Path | None:
    """Return the demonstration's YAML when the command line names no config, model or data of its own."""
    named = any(
        arg.split("=")[0].replace("-", "_").lstrip("_") in {s.lstrip("-") for s in SELECTS_MODEL_OR_DATA}
        for arg in sys.argv[1:]
        if arg.startswith("--")
    )
    return None if named else path


def open_run(config: TrainingArguments, run: RunArguments, *others: Any) -> RunDirectory:
    """Claim the run directory and write config.yaml; every rank returns the same paths, only the first writes.

    Raises:
        RunDirectoryError: the directory holds a run and neither continuing nor replacing it was asked for.
    """
    state = PartialState()
    directory = prepare(
        config.output_dir,
        resume=config.resume_from_checkpoint,
        overwrite=run.overwrite_output_dir,
        main_process=state.is_main_process,
    )
    if state.is_main_process:
        write_config(directory.config, config, run, *others)
    state.wait_for_everyone()
    return directory


def say(message: str) -> None:
    """Print one line from the first process only."""
    if PartialState().is_main_process:
        print(message, flush=True)


def world() -> str:
    """Describe the processes and devices that really run."""
    state = PartialState()
    processes = f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device.type}"
    return f"{processes}, {torch.get_num_threads()} threads each" if state.device.type == "cpu" else processes


def announce(config: TrainingArguments, run: RunArguments, what: str) -> None:
    """Say which world, data and directory the run really has, and take the CPU threads it is to have.

    `accelerate launch` gives a process one thread unless told otherwise, which halves the speed on two cores.
    """
    state = PartialState()
    if state.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(run.num_cpu_threads or max(1, (os.cpu_count() or 1) // local))
    say(f"rlseq: {world()}, {what}, into {config.output_dir}")


def try_rewards(suite: RewardSuite, prompt: Prompt) -> None:
    """Score one row before any model loads: its first reference, or an empty completion where it has none.

    Raises:
        RewardError: a reward asks for a column that is not there, or fails.
    """
    references = prompt.columns.get("references") or [""]
    chat = not isinstance(prompt.messages_or_text, str)
    rollout = Rollout(
        prompt_key=prompt.key,
        sample=0,
        completion_ids=(),
        trained_mask=(),
        logprobs=(),
        text=references[0],
        raw_text=references[0],
        messages=({"role": "assistant", "content": references[0]},) if chat else None,
        finish_reason="stop",
        strategy="reference",
    )
    columns = {name: [value] for name, value in prompt.columns.items()} | {"prompt": [prompt.messages_or_text]}
    suite.check_columns(columns)
    suite.score([rollout], columns)


def finish(trainer: Trainer, directory: RunDirectory, stop: GracefulStop) -> bool:
    """Save the final model, or say how to go on when the run was stopped early.

    Returns:
        True if training ran to its end.
    """
    if stop.stopped:
        say(
            f"stopped by {stop.stopped} at step {trainer.state.global_step}, saved. Continue with the same command and "
            "--resume_from_checkpoint latest"
        )
        return False
    trainer.save_model(trainer.args.output_dir)
    return True
