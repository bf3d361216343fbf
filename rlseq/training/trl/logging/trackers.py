"""What trackers (`--report_to tensorboard wandb trackio`) get beside the logged numbers, which transformers sends them.

Tracking        the completions of the last batch, as TRL's table where a tracker has tables, else as text
log_contrast    what the evaluation after training found, into the same run
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler
from trl.trainer.utils import print_prompt_completions_sample

from rlseq.training.run.faults import writing


@dataclass(frozen=True)
class Completions:
    """The rollouts of a batch over all processes, as they are shown; every list has an entry per rollout.

    Attributes:
        prompts, completions: texts or messages.
        rewards: by name; NaN where one abstained.
        advantages: of one with an advantage per token, their mean.
        extra: what rewards logged beside (`log_extra`), and the `total`.
    """

    prompts: list[Any]
    completions: list[Any]
    rewards: Mapping[str, list[float]]
    advantages: list[float]
    extra: Mapping[str, list[Any]]

    def columns(self) -> dict[str, list[Any]]:
        """The columns of the table, in its order."""
        columns = {"prompt": self.prompts, "completion": self.completions, **self.rewards, **self.extra}
        return columns | {"advantage": self.advantages}


class Tracking(TrainerCallback):
    """Shows the completions of the last batch each time training logs its numbers (`log_completions`).

    They are printed, written to the run's `completions/` and sent to the trackers: TRL's table, or text where a tracker
    has no tables. An evaluation and the closing summary show none, nor does a run that was resumed within a batch
    until it samples again.

    Args:
        trackers: the trainer's callbacks, among them those of `report_to`.

    Attributes:
        completions: those of the last batch, on the first process; None before there is one.
        trackio_run: the name of the run under way in trackio, which is closed before the evaluation; None without.
    """

    def __init__(self, trackers: CallbackHandler):
        self.trackers = trackers
        self.completions: Completions | None = None
        self.trackio_run: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.completions is not None and "loss" in (logs or {}):  # the loss is logged by training alone
            self._show(self.completions, args, state.global_step)
        if any(isinstance(callback, TrackioCallback) for callback in self.trackers.callbacks):
            import trackio

            run = trackio.context_vars.current_run.get()
            self.trackio_run = self.trackio_run if run is None else run.name

    def _show(self, shown: Completions, args: Any, step: int) -> None:
        import pandas

        print_prompt_completions_sample(
            shown.prompts,
            shown.completions,
            shown.rewards,
            shown.advantages,
            step,
            args.num_completions_to_print,
            extra=shown.extra,
        )
        columns = shown.columns()
        frame = pandas.DataFrame({"step": [step] * len(shown.prompts)} | columns)
        file = Path(args.output_dir) / "completions" / f"completions_{step:05d}.parquet"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            frame.to_parquet(file)
        if args.log_unique_prompts:
            frame = frame[~frame["prompt"].astype(str).duplicated()]  # messages are compared by their text
        for callback in self.trackers.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                callback.tb_writer.add_text("completions", markdown_table(rows), step)
            elif isinstance(callback, WandbCallback):
                import wandb

                if wandb.run is not None:
                    wandb.log({"completions": wandb.Table(dataframe=frame)})
            elif isinstance(callback, TrackioCallback):
                import trackio

                trackio.log({"completions": trackio.Table(dataframe=frame)})


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same columns as Markdown, in which no text of theirs is markup."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).replace("\\", "\\\\").replace("\r", "").replace("\n", " ⏎ ")
    for character in "|`*_[]<>#~":
        text = text.replace(character, "\\" + character)
    return text


def contrast_numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """The values that a contrast's headline and tables show, by `contrast/...`; what has no value is left out.

    `contrast/MODEL/METRIC` of likelihood and `contrast/MODEL/STRATEGY/METRIC` of generation, for methods and single
    checkpoints; `contrast/primary/difference`, `.../ci_low`, `.../ci_high`, `.../p_value` of the declared comparison.
    """
    numbers = dict(_values(results.get("models", {})))
    primary = results.get("primary")
    for found in results.get("comparisons", ()) if primary else ():
        if all(found[key] == primary[key] for key in ("metric", "strategy", "a", "b")):
            low, high = found["ci95"]
            numbers["primary/difference"] = found["difference"]
            numbers |= {"primary/ci_low": low, "primary/ci_high": high, "primary/p_value": found["p_value"]}
            break
    return {f"contrast/{name}": float(value) for name, value in numbers.items() if value is not None}


def _values(models: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for model, found in models.items():
        for where, metrics in [("", found["likelihood"]), *((f"/{s}", m) for s, m in found["strategies"].items())]:
            for metric, cell in (metrics or {}).items():
                if isinstance(cell, Mapping):
                    if "value" in cell:
                        yield f"{model}{where}/{metric}", cell["value"]
                    else:  # exact_pass_at_k, by k
                        yield from ((f"{model}{where}/{metric}.{k}", c["value"]) for k, c in cell.items())


def log_contrast(trainer: Trainer, results: Mapping[str, Any], figures: Sequence[Path | None] = ()) -> None:
    """Log the numbers and figures of the evaluation after training to the run that the trackers have of it.

    Args:
        trainer: a `GRPOTrainer` after `train`; its trackers are those of `report_to`, its last step is where the
            numbers stand.
        results: the contents of results.json; empty, as on any process but the first, nothing is logged.
        figures: PNG files, each logged by its name without the suffix; what is None or not there is left out.
    """
    if not results:
        return
    numbers, step = contrast_numbers(results), trainer.state.global_step
    images = {f"contrast/{path.stem}": path for path in figures if path is not None and path.is_file()}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            _to_tensorboard(callback, trainer, numbers, images, step)
        elif isinstance(callback, WandbCallback):
            import wandb

            shown = {name: wandb.Image(str(path)) for name, path in images.items()}
            if wandb.run is not None:
                wandb.log({**numbers, **shown, "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            _to_trackio(callback, trainer, numbers, images, step)


def _to_tensorboard(callback: Any, trainer: Trainer, numbers: Any, images: Any, step: int) -> None:
    """transformers closes its writer as training ends: a new one adds to the same folder."""
    import numpy as np
    from PIL import Image

    callback._init_summary_writer(trainer.args)
    for name, value in numbers.items():
        callback.tb_writer.add_scalar(name, value, step)
    for name, path in images.items():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (height, width, 3)
        callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
    callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _to_trackio(callback: Any, trainer: Any, numbers: Any, images: Any, step: int) -> None:
    """transformers closes its run as training ends: it is opened again, by its name."""
    import trackio

    args = copy.copy(trainer.args)
    args.run_name = trainer.tracking.trackio_run
    callback.setup(args, trainer.state, trainer.model)
    try:
        shown = {name: trackio.Image(str(path)) for name, path in images.items()}
        trackio.log({**numbers, **shown, "train/global_step": step})
    finally:
        callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
