"""The card of a run and the push of its result to the hub, for any of TRL's trainers.

A model's repository gets the model, its tokenizer and the card, of PPO the critic too. transformers uploads the folder
it saves to, which in a run holds every rollout and evaluated row too, so pushes go by way of a folder of their own,
RUN/hub/.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import upload_folder
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from trl.trainer.utils import get_config_model_id

from rlseq.training.critic import FOLDER as CRITIC
from rlseq.training.run.model_card import launch_command, model_card

HUB_FOLDER = "hub"


@dataclass(frozen=True)
class CardFacts:
    """What a trainer does not know of its own run.

    Attributes:
        base_model: what was trained on, a hub id or path; None for the name in the model's configuration.
        dataset_name: a hub id or path.
        report: the text of the evaluation's report.md; "" where nothing was evaluated.
    """

    base_model: str | None = None
    dataset_name: str | None = None
    report: str = ""


class PublishMixin(Trainer):
    """For TRL's trainers: the card says what rlseq knows, and a push holds the model, its tokenizer and the card."""

    card_facts = CardFacts()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_CardOfCheckpoint(self))

    def write_card(self, *, dataset_name: str | None = None, tags: str | list[str] | None = None) -> None:
        """Write README.md into the output directory, from the first process."""
        if not self.is_world_process_zero():
            return
        facts, folder = self.card_facts, Path(self.args.output_dir)
        method = type(self).__name__.removesuffix("Trainer")
        suite = getattr(self, "suite", None)
        hub_name = self.hub_model_id or self.args.hub_model_id
        card = model_card(
            model_name=hub_name.split("/")[-1] if hub_name else folder.absolute().name,
            method=method,
            base_model=facts.base_model or get_config_model_id(self.model.config) or None,
            dataset_name=facts.dataset_name or dataset_name,
            rewards=list(zip(suite.names, suite.weights, strict=True)) if suite is not None else [],
            report=facts.report,
            command=launch_command(),
            where=self.hub_model_id or str(self.args.output_dir),
            adapter_of=_adapter_base(self.model),
            tags=["trl", method.lower(), *([tags] if isinstance(tags, str) else tags or ())],
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(str(card), encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **_: Any,
    ) -> Any:
        """Push model, tokenizer and card; on every process. Arguments are those of transformers."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:  # in a run that was not asked to push: named after the run's folder
            self.init_hf_repo(token=token, private=private)
        with self._output_into_hub_folder():
            self.save_model(_internal_call=True)
            if not self.is_world_process_zero():
                return None
            folder = Path(self.args.output_dir)
            if is_peft_model(self.model):
                # The adapter as it began, to which KL is measured, serves the run, and nobody who loads its result.
                for name in set(self.model.peft_config) - {self.model.active_adapter}:
                    shutil.rmtree(folder / name, ignore_errors=True)
            self.write_card(dataset_name=dataset_name, tags=tags)
        self._finish_current_push()
        return upload_folder(
            repo_id=self.hub_model_id,
            folder_path=str(folder),
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        with self._output_into_hub_folder():
            self.write_card()
            if (critic := Path(checkpoint_folder) / CRITIC).is_dir():  # transformers takes the model's files alone
                shutil.copytree(critic, Path(self.args.output_dir) / CRITIC, dirs_exist_ok=True)
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _output_into_hub_folder(self) -> Iterator[None]:
        run = self.args.output_dir
        self.args.output_dir = str(Path(run) / HUB_FOLDER)
        try:
            yield
        finally:
            self.args.output_dir = run


class _CardOfCheckpoint(TrainerCallback):
    """Puts the card in place of the one that TRL writes as it saves a checkpoint."""

    def __init__(self, trainer: PublishMixin):
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.write_card()


def publish(
    trainer: PublishMixin, *, base_model: str | None, dataset_name: str | None, report: Path | None = None
) -> None:
    """Write README.md into the run directory, and push model, tokenizer and card where `push_to_hub` asks for it.

    On every process, once training has ended and its result was evaluated.

    Args:
        base_model: what was trained on, a hub id or path; None for a new model.
        dataset_name: a hub id or path.
        report: the evaluation's report.md; None, or a file that is not there, where nothing was evaluated.
    """
    text = report.read_text(encoding="utf-8") if report is not None and report.is_file() else ""
    trainer.card_facts = CardFacts(base_model, dataset_name, text)
    trainer.write_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        if trainer.is_world_process_zero():
            print(f"pushed to the hub: {trainer.hub_model_id}", flush=True)


def _adapter_base(model: Any) -> str | None:
    """What an adapter's weights are loaded on, as its configuration names it; None for a whole model."""
    if not is_peft_model(model):
        return None
    return model.active_peft_config.base_model_name_or_path or ""
