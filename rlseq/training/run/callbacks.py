"""What happens beside the training loop: metrics to a file, stopping without losing work, progress."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlseq.common.escapes import visible
from rlseq.common.formats import METRICS
from rlseq.training.run.records import append_jsonl

# One Ctrl-C may arrive twice, from the terminal and from the launcher; a second one this much later is meant.
_SAME_KEYSTROKE_SECONDS = 1.0
_REASONS = (None, "the launcher exited", "SIGTERM", "SIGINT")  # by code; the highest of all processes' wins


class MetricsWriter(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, as it is logged, from the main process.

    One line a call: `{"step": 12, "epoch": 0.5, "loss": ...}`; NaN and infinities become null. An evaluation
    logs a line of its own (keys `eval_*`) at its step. The trainer's closing summary (train_runtime and its
    like) is marked `"summary": true`: it is about the whole run, not about its step.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        summary = {"summary": True} if "train_runtime" in logs else {}
        append_jsonl(self.path, METRICS.stamp({"step": state.global_step, "epoch": state.epoch, **summary, **logs}))


class Warnings(TrainerCallback):
    """Says what the log shows to be in the way of learning, each thing once.

    Args:
        find: what was logged so far -> texts; one that was returned before is not said again.
    """

    def __init__(self, find: Callable[[list[dict[str, Any]]], list[str]]):
        self.find = find
        self.said: set[str] = set()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        for text in self.find(state.log_history):
            if text not in self.said:
                self.said.add(text)
                print(visible(f"warning, step {state.global_step}: {text}"), file=sys.stderr, flush=True)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback, whose count resumes from the checkpoint; theirs restarts."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        held = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = held["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class GracefulStop(TrainerCallback):
    """Saves and ends training at the next step boundary after SIGINT, SIGTERM or the death of the launcher.

    All processes agree on it at each step's end, so that none waits for another in a collective. A second
    SIGINT raises KeyboardInterrupt at once. Signals act as before once training has ended.

    Attributes:
        stopped: why training ended early: "SIGINT", "SIGTERM" or "the launcher exited"; None if it did not.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        self._signal: str | None = None
        self._first_interrupt = 0.0
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        # Without a launcher the parent is a shell, which may well end before a run in the background.
        launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._launcher = os.getppid() if launched else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopped = self._signal = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous.setdefault(number, signal.signal(number, self._receive))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopped = self._agree(args.device)
        if self.stopped is None:
            return
        control.should_save = True
        control.should_training_stop = True
        if args.save_strategy == "best":  # saves after an evaluation only the best, whatever was asked for
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped is None:
            return
        if state.epoch != int(state.epoch):  # in the middle of an epoch, which resuming will end
            control.should_evaluate = control.should_save = control.should_log = False
        elif control.should_evaluate:
            control.should_save = True  # again, with what the evaluation changes

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked data loader worker, which is to end as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if number == signal.SIGINT and self._signal == "SIGINT":
            if now - self._first_interrupt > _SAME_KEYSTROKE_SECONDS:
                raise KeyboardInterrupt
            return
        first = self._signal is None
        if number == signal.SIGINT or first:
            self._signal = signal.Signals(number).name
            self._first_interrupt = now
        if first and os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{self._signal}: saving at the end of this step, then stopping.\n".encode())

    def _agree(self, device: torch.device) -> str | None:
        code = _REASONS.index(self._signal)
        if code == 0 and self._launcher is not None and os.getppid() != self._launcher:
            code = 1
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            codes = torch.tensor(code, device=device)
            torch.distributed.all_reduce(codes, op=torch.distributed.ReduceOp.MAX)
            code = int(codes.item())
        return _REASONS[code]


class Progress(TrainerCallback):
    """A progress bar with the last values beside it, and a table row an evaluation.

    Where standard error is no terminal (a log file), or with --disable_tqdm, there is no bar and about twenty
    rows a run instead. transformers' own callback prints a dict a logged step;
    `Progress.replace_default(trainer)` puts this one in its place.
    """

    columns = (
        "loss",
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "mean_token_accuracy",
        "expected_accuracy",
        "reference_nll",
        "completions/mean_length",
    )
    evaluated = ("nll_per_token", "expected_accuracy", "greedy/reward", "sample/reward")

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._header: list[str] = []
        self._next_row = 0.0

    @classmethod
    def replace_default(cls, trainer: Trainer) -> None:
        """Make this the one callback of a trainer that shows progress."""
        for callback in (ProgressCallback, PrinterCallback, cls):
            trainer.remove_callback(callback)
        trainer.add_callback(cls())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        evaluation = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if evaluation:
            chosen = [f"eval_{name}" for name in (*self.columns, *self.evaluated)] + [args.metric_for_best_model]
            names = [name for name in dict.fromkeys(chosen) if name in evaluation]
            self._write_row(state.global_step, {name.replace("/", " "): evaluation[name] for name in names})
            return
        shown = {name: logs[name] for name in self.columns if name in logs}
        if self._bar is not None:
            self._bar.set_postfix({_short(name): _format(value) for name, value in shown.items()})
        elif state.global_step >= self._next_row:
            self._write_row(state.global_step, shown)
            self._next_row = state.global_step + state.max_steps / 20

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write_row(self, step: int, values: Mapping[str, Any]) -> None:
        if not values:
            return
        names = [_short(name) for name in values]
        widths = [max(len(name), 9) for name in names]
        if names != self._header:
            self._header = names
            self._write("    step" + "".join(f"  {n:>{w}}" for n, w in zip(names, widths, strict=True)))
        cells = zip(map(_format, values.values()), widths, strict=True)
        self._write(f"{step:>8}" + "".join(f"  {value:>{width}}" for value, width in cells))

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _short(name: str) -> str:
    return visible(name.rpartition("/")[2])


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
