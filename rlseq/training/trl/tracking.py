"""What trackers (`--report_to tensorboard wandb trackio`) get beside the logged numbers, which transformers sends them.

log             the completions of the last round, as TRL's table where a tracker has tables, else as text
log_contrast    what the evaluation after training found, into the same run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trl
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


class TrackingMixin(trl.GRPOTrainer):
    """For trainers on rollouts: TRL's table of completions (`log_completions`), with the total, where there is one.

    Attributes:
        trackio_run: the name of the run under way in trackio, which is closed before the evaluation; None without.
    """

    trackio_run: str | None = None

    def log(self, logs, start_time=None):
        # The closing summary has no rollouts of its own, nor has a run that was resumed within a round.
        asked, told = self.log_completions, bool(self._logs["prompt"]) and "train_runtime" not in logs
        self.log_completions = asked and told
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = asked
        if not self.is_world_process_zero():
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and asked and told and callback.tb_writer is not None:
                table = markdown_table(completion_rows(self._logs))
                callback.tb_writer.add_text("completions", table, self.state.global_step)
            if isinstance(callback, TrackioCallback):
                import trackio

                run = trackio.context_vars.current_run.get()
                self.trackio_run = self.trackio_run if run is None else run.name


def completion_rows(logs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of TRL's table, from the columns it keeps of the last round."""
    columns = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["rewards"], **logs["extra"]}
    columns["advantage"] = logs["advantages"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


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
        trainer: after `train`; its trackers are those of `report_to`, its last step is where the numbers stand.
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

    named = trainer.args.run_name
    trainer.args.run_name = trainer.trackio_run
    try:
        callback.setup(trainer.args, trainer.state, trainer.model)
        shown = {name: trackio.Image(str(path)) for name, path in images.items()}
        trackio.log({**numbers, **shown, "train/global_step": step})
    finally:
        trainer.args.run_name = named
        callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
