"""The card of a run and the push of its result to the hub, for any of TRL's trainers.

A model's repository gets the model, its tokenizer and the card, of PPO the critic too. transformers uploads the folder
it saves to, which in a run holds every rollout and evaluated row too, so pushes go by way of a folder of their own,
RUN/hub/.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import upload_folder
from transformers import Trainer, TrainerCallback
from trl.trainer.utils import get_config_model_id

from rlseq.training.critic import FOLDER as CRITIC
from rlseq.training.run.model_card import launch_command, model_card

HUB_FOLDER = "hub"


class Publisher:
    """Writes a trainer's card, and pushes its model, tokenizer and card to the hub.

    Args:
        trainer: any of TRL's.

    Attributes:
        base_model: what was trained on, a hub id or path; None for the name in the model's configuration.
        dataset_name: a hub id or path; None for the one that a push is given.
        report: the text of the evaluation's report.md; "" where nothing was evaluated.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.base_model: str | None = None
        self.dataset_name: str | None = None
        self.report = ""

    @property
    def hub_folder(self) -> Path:
        """What is pushed is put together there."""
        return Path(self.trainer.args.output_dir) / HUB_FOLDER

    def write_card(self, folder: Path, *, dataset_name: str | None = None, tags: str | list[str] | None = None) -> None:
        """Write README.md into a folder, from the first process."""
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        method = type(trainer).__name__.removesuffix("Trainer")
        suite = getattr(trainer, "suite", None)
        hub_name = trainer.hub_model_id or trainer.args.hub_model_id
        card = model_card(
            model_name=hub_name.split("/")[-1] if hub_name else folder.absolute().name,
            method=method,
            base_model=self.base_model or get_config_model_id(getattr(trainer.model, "config", None)) or None,
            dataset_name=self.dataset_name or dataset_name,
            rewards=list(zip(suite.names, suite.weights, strict=True)) if suite is not None else [],
            report=self.report,
            command=launch_command(),
            where=trainer.hub_model_id or str(folder),
            adapter_of=_adapter_base(trainer.model),
            tags=["trl", method.lower(), *([tags] if isinstance(tags, str) else tags or ())],
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(str(card), encoding="utf-8")

    def card_of_checkpoint(self) -> TrainerCallback:
        """A callback that puts the card in place of the one that TRL writes as it saves a checkpoint."""
        return _CardOfCheckpoint(self)

    def push(
        self,
        commit_message: str | None,
        *,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> Any:
        """Push model, tokenizer and card; on every process. Arguments are those of transformers' `push_to_hub`."""
        trainer, folder = self.trainer, self.hub_folder
        if trainer.hub_model_id is None:  # in a run that was not asked to push: named after the run's folder
            trainer.init_hf_repo(token=token, private=private)
        trainer.save_model(str(folder), _internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        if is_peft_model(trainer.model):
            # The adapter as it began, to which KL is measured, serves the run, and nobody who loads its result.
            for name in set(trainer.model.peft_config) - {trainer.model.active_adapter}:
                shutil.rmtree(folder / name, ignore_errors=True)
        self.write_card(folder, dataset_name=dataset_name, tags=tags)
        trainer._finish_current_push()
        return upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=str(folder),
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            revision=revision,
        )

    @contextlib.contextmanager
    def from_hub_folder(self, checkpoint: Path) -> Iterator[None]:
        """Let transformers push a checkpoint within: it copies files to `args.output_dir`, and uploads that folder."""
        args, folder = self.trainer.args, self.hub_folder
        self.write_card(folder)
        if (checkpoint / CRITIC).is_dir():  # transformers takes the model's files alone
            shutil.copytree(checkpoint / CRITIC, folder / CRITIC, dirs_exist_ok=True)
        run, args.output_dir = args.output_dir, str(folder)
        try:
            yield
        finally:
            args.output_dir = run


class _CardOfCheckpoint(TrainerCallback):
    def __init__(self, publisher: Publisher):
        self.publisher = publisher

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.publisher.write_card(Path(args.output_dir))


def publish(trainer: Any, *, base_model: str | None, dataset_name: str | None, report: Path | None = None) -> None:
    """Write README.md into the run directory, and push model, tokenizer and card where `push_to_hub` asks for it.

    On every process, once training has ended and its result was evaluated.

    Args:
        trainer: one of rlseq's.
        base_model: what was trained on, a hub id or path; None for a new model.
        dataset_name: a hub id or path.
        report: the evaluation's report.md; None, or a file that is not there, where nothing was evaluated.
    """
    text = report.read_text(encoding="utf-8") if report is not None and report.is_file() else ""
    publisher: Publisher = trainer.publisher
    publisher.base_model, publisher.dataset_name, publisher.report = base_model, dataset_name, text
    publisher.write_card(Path(trainer.args.output_dir))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        if trainer.is_world_process_zero():
            print(f"pushed to the hub: {trainer.hub_model_id}", flush=True)


def _adapter_base(model: Any) -> str | None:
    """What an adapter's weights are loaded on, as its configuration names it; None for a whole model."""
    if not is_peft_model(model):
        return None
    return model.active_peft_config.base_model_name_or_path or ""
