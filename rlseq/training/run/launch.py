"""Whether the world a process is in is the one that `accelerate launch` was asked for; and leaving it.

accelerate 1.15 silently starts another where it is asked for several CPU processes (by `distributed_type:
MULTI_CPU`, or `--cpu --num_processes 2`: one runs) and for FSDP on CPUs (the processes stay data-parallel).
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from rlseq.common.escapes import visible
from rlseq.common.ranks import raise_on_all_ranks
from rlseq.errors import ConfigError, TrainingError
from rlseq.training.run.faults import friendly_error

CPU_WORLD = (
    "On CPUs several processes take `distributed_type: MULTI_GPU` with `use_cpu: true`, as recipes/accelerate/"
    "cpu-2proc.yaml has it."
)


def check_launch() -> None:
    """Refuse to run in another world than the one asked for, where this process is a child of `accelerate launch`.

    Raises:
        ConfigError: says what was asked for, what runs, and how to get it.
    """
    asked = asked_of(_parent()[0])
    if asked is not None:
        compare(asked, os.environ, accelerators=torch.accelerator.is_available())


def _parent() -> tuple[list[str], dict[str, str]]:
    """The command line and environment that the parent process was started with; empty where they cannot be read."""
    try:
        parent = psutil.Process().parent()
        return (parent.cmdline(), parent.environ()) if parent is not None else ([], {})
    except psutil.Error:  # a parent that is gone, or another user's
        return [], {}


def cpu_threads(flag: int | None, processes: int) -> tuple[int, str]:
    """Choose the CPU threads of this process: the flag's, else the launcher's, else OMP_NUM_THREADS', else the cores'.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS to 1 where the user said nothing, so below a launcher the
    variable counts only if the launcher itself was started with it.

    Args:
        flag: `--num_cpu_threads`, or None.
        processes: of this run on this machine; the cores are divided among them.

    Returns:
        The number of threads, and where it comes from, for a message.
    """
    if flag is not None:
        return flag, "--num_cpu_threads"
    command, environment = _parent()
    asked = asked_of(command)
    if asked is not None and asked["threads"] is not None:
        return asked["threads"], "--num_cpu_threads_per_process"
    launched = asked is not None or any(Path(word).name in ("torchrun", "torch.distributed.run") for word in command)
    variable = (environment if launched else os.environ).get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if variable.isdecimal() and int(variable) > 0:
        return int(variable), "OMP_NUM_THREADS"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes), "all cores" if processes == 1 else "all cores, shared"


def asked_of(command: Sequence[str]) -> dict[str, Any] | None:
    """What a command line of `accelerate launch` asks for, or None for any other command.

    `processes` (None: all there are), `kind`, and `threads` a process (None: nothing was said).
    """
    names = [Path(word).name for word in command]
    if "accelerate-launch" in names:
        start = names.index("accelerate-launch")
    elif "accelerate" in names and "launch" in names[names.index("accelerate") :]:
        start = names.index("launch", names.index("accelerate"))
    elif "accelerate.commands.launch" in names:
        start = names.index("accelerate.commands.launch")
    else:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args, _ = launch_command_parser().parse_known_args(list(command[start + 1 :]))
        config = None
        if args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu):
            config = load_config_from_file(args.config_file)
    except (SystemExit, OSError, ValueError, KeyError, TypeError):  # accelerate itself says what is wrong with it
        return None
    processes = args.num_processes if args.num_processes is not None else getattr(config, "num_processes", None)
    kind = str(getattr(getattr(config, "distributed_type", None), "value", None) or "NO")
    threads = args.num_cpu_threads_per_process
    return {"processes": processes, "kind": "FSDP" if args.use_fsdp else kind, "threads": threads}


def compare(asked: Mapping[str, Any], environment: Mapping[str, str], *, accelerators: bool) -> None:
    """Raise ConfigError where what `asked_of` gave is not what runs.

    Args:
        environment: of this process; `WORLD_SIZE` is the number of processes.
        accelerators: whether this machine has any.
    """
    there = int(environment.get("WORLD_SIZE", "1"))
    wanted = asked["processes"]
    if wanted is not None and wanted > 1 and there != wanted and asked["kind"] != "XLA":  # TPUs keep no count there
        raise ConfigError(
            f"accelerate launch was asked for {wanted} processes ({asked['kind']}), but {there} "
            f"{'runs' if there == 1 else 'run'}. {CPU_WORLD if not accelerators else 'Give --multi_gpu.'}"
        )
    if asked["kind"] == "FSDP" and not accelerators:
        raise ConfigError(
            "accelerate launch was asked for FSDP, but there is no accelerator: it would leave every process a whole "
            f"model silently. {CPU_WORLD}"
        )
    if asked["kind"] == "FSDP" and environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false") == "true":
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading leaves every process but the first a model without weights, and rlseq "
            "looks at it before it is sharded. Set it to false, as recipes/accelerate/fsdp2.yaml does: accelerate has "
            "it on where nothing is said."
        )


def shutdown_distributed() -> None:
    """Destroy the process group, where there is one: what a process that has done its work does last.

    Gloo's threads may still hold the tensors of the last collective when Python ends. One that then frees them aborts
    the process ("terminate called without an active exception", exit code 134) although all its work was done; this
    was seen in about one exit in a hundred of a busy machine. Leaving joins the threads. It is for a process that
    ends well: where one of several has failed, the others may be in a collective, and leaving could wait for them.

    vLLM in the trainer's process shuts down with its trainer, and destroys the group itself: after the group it would
    print a traceback as Python ends.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.unfreeze()  # vLLM froze what there was when its engine started, a trainer's parts among it
        gc.collect()  # a trainer is a cycle, and holds the group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_recipe(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe and exit: with 0 or the code `main` returns, or with 130 after Ctrl-C.

    In another world than `accelerate launch` was asked for it does not start. An `RlseqError` ends it with its message
    and its exit code: 2 for bad input, 1 for a fault in training. So do memory or disk that run out, and a process of
    the run that is lost (exit code 1). Any other exception is a bug and keeps its traceback. Under a launcher (which
    sets RANK) only the first process prints what is the same in all of them, such as bad settings.
    """
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    try:
        check_launch()
        with raise_on_all_ranks(exchange=False):
            code = main() or 0
        shutdown_distributed()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        said = friendly_error(error)
        if said is None:
            raise
        alone = isinstance(said, TrainingError) and not said.on_every_rank
        if alone and "RANK" in os.environ:
            print(visible(f"error: rank {rank}: {said}"), file=sys.stderr)
        elif alone or rank == "0":
            print(visible(f"error: {said}"), file=sys.stderr)
        code = said.exit_code
    sys.exit(code)
