"""What a run's result is, for the reader: README.md beside its weights, and the push of both to the hub.

create_model_card      the card, where TRL writes one of its own: at every checkpoint, and before a push
_push_from_checkpoint  a push during training (`hub_strategy`)
push_to_hub            the push of the result, by `publish` once it has been evaluated

A model's repository gets the model, its tokenizer and the card, of PPO the critic too. transformers uploads the folder
it saves to, which in a run holds every rollout and evaluated row too, so pushes go by way of a folder of their own,
RUN/hub/.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import psutil
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from trl.trainer.utils import get_config_model_id

from rlseq import __version__
from rlseq.common.escapes import visible
from rlseq.training.critic import FOLDER as CRITIC

HUB_FOLDER = "hub"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_FINDINGS = ("What is generated", "How likely the references are")  # sections of report.md that the card repeats
_SIGNATURE = "Signature"
_VERSIONS = ("trl", "transformers", "torch")
_LAUNCHERS = {
    "accelerate": ["accelerate"],
    "accelerate-launch": ["accelerate-launch"],
    "accelerate.commands.launch": ["accelerate", "launch"],
}


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


class ModelCardMixin(Trainer):
    """For TRL's trainers: the card says what rlseq knows, and a push holds the model, its tokenizer and the card."""

    card_facts = CardFacts()
    _pushing = False

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **_: Any) -> None:
        if not self.is_world_process_zero():
            return
        facts, folder = self.card_facts, Path(self.args.output_dir)
        method = type(self).__name__.removesuffix("Trainer")
        suite = getattr(self, "suite", None)
        given = [tags] if isinstance(tags, str) else list(tags or ())
        given = [tag for tag in given if tag not in self._tag_names]  # TRL's, by which PPO here is its GRPO
        card = model_card(
            model_name=model_name or folder.absolute().name,
            method=method,
            base_model=facts.base_model or get_config_model_id(self.model.config) or None,
            dataset_name=facts.dataset_name or dataset_name,
            rewards=list(zip(suite.names, suite.weights, strict=True)) if suite is not None else [],
            report=facts.report,
            command=launch_command(),
            where=self.hub_model_id or str(self.args.output_dir),
            adapter_of=_adapter_base(self.model),
            tags=["trl", method.lower(), *given],
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(str(card), encoding="utf-8")

    def push_to_hub(self, commit_message="End of training", blocking=True, **kwargs: Any):
        if self.hub_model_id is None:  # by hand, in a run that was not asked to push: named after the run's folder
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        kwargs.setdefault("model_name", _model_name(self.args))
        with self._output_into_hub_folder():
            return super().push_to_hub(commit_message, blocking, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        with self._output_into_hub_folder():
            self.create_model_card(_model_name(self.args))
            if (critic := Path(checkpoint_folder) / CRITIC).is_dir():  # transformers takes the model's files alone
                shutil.copytree(critic, Path(self.args.output_dir) / CRITIC, dirs_exist_ok=True)
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self._pushing and is_peft_model(self.model):
            # The adapter as it began, to which KL is measured, serves the run, and nobody who loads its result.
            for name in set(self.model.peft_config) - {self.model.active_adapter}:
                shutil.rmtree(Path(output_dir or self.args.output_dir) / name, ignore_errors=True)

    @contextlib.contextmanager
    def _output_into_hub_folder(self) -> Iterator[None]:
        run = self.args.output_dir
        self.args.output_dir, self._pushing = str(Path(run) / HUB_FOLDER), True
        try:
            yield
        finally:
            self.args.output_dir, self._pushing = run, False


def publish(
    trainer: ModelCardMixin, *, base_model: str | None, dataset_name: str | None, report: Path | None = None
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
    trainer.create_model_card(_model_name(trainer.args))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        if trainer.is_world_process_zero():
            print(f"pushed to the hub: {trainer.hub_model_id}", flush=True)


def model_card(
    *,
    model_name: str,
    method: str,
    base_model: str | None,
    dataset_name: str | None,
    rewards: Sequence[tuple[str, float]],
    report: str,
    command: Sequence[str],
    where: str,
    adapter_of: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of one result.

    Args:
        method: GRPO, PPO or SFT.
        base_model, dataset_name: hub ids or paths; the metadata, which the hub checks, has hub ids alone.
        rewards: (name, weight) of each that was optimised.
        report: the text of report.md, from which headline, tables of values and signature are taken; or "".
        command: its words, the values of tokens left out.
        where: what to load it by, a hub id or path.
        adapter_of: of an adapter's weights, the base that they are loaded on, a hub id or path, which the metadata
            name as the base; "" where it has no name. None: the weights are a whole model's.
    """
    data = ModelCardData(
        base_model=_hub_id(adapter_of or base_model),
        datasets=_hub_id(dataset_name),
        library_name="transformers" if adapter_of is None else "peft",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["rlseq", "generated_from_trainer", *tags])),
    )
    found = report_sections(report)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        model_name=model_name,
        method=method,
        base_model=base_model,
        dataset_name=dataset_name,
        rewards=rewards,
        findings="\n\n".join(
            filter(None, [found.get(""), *(f"### {name}\n\n{found[name]}" for name in _FINDINGS if name in found)])
        ),
        signature=found.get(_SIGNATURE, ""),
        command=shlex.join(command),
        where=where,
        adapter_of=adapter_of,
        versions={"rlseq": __version__} | {n: importlib.metadata.version(n) for n in _VERSIONS},
    )
    return ModelCard(visible(text) + "\n")


def report_sections(report: str) -> Mapping[str, str]:
    """Heading -> text of each section of a report.md; what stands before the first, the headline, is under ""."""
    parts = re.split(r"^## (.+)$", re.sub(r"\A# .*\n", "", report), flags=re.M)
    return {"": parts[0].strip()} | {
        name.strip(): text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def launch_command() -> list[str]:
    """The words of the command that started this process, its launcher's where there is one, tokens left out."""
    words = ["python", *sys.argv]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        started_by = parent.cmdline() if parent is not None else []
        for i, word in enumerate(started_by):
            if Path(word).name in _LAUNCHERS:
                words = [*_LAUNCHERS[Path(word).name], *started_by[i + 1 :]]
                break
    if words[0] == "python" and Path(words[1]).is_absolute():  # an installed command, or `python -m`
        script = Path(words[1])
        inside = script.is_relative_to(Path.cwd())
        words[:2] = ["python", str(script.relative_to(Path.cwd()))] if inside else [script.name]
    return _without_tokens(words)


def _without_tokens(words: Sequence[str]) -> list[str]:
    kept, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_token = re.fullmatch(r"--\w*[-_]token", name) is not None
        kept.append("HIDDEN" if hide else f"{name}=HIDDEN" if is_token and equals else word)
        hide = is_token and not equals
    return kept


def _hub_id(name: str | None) -> str | None:
    """The name if it can be one on the hub: nothing local, and of the hub's form."""
    if name is None or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _adapter_base(model: Any) -> str | None:
    """What an adapter's weights are loaded on, as its configuration names it; None for a whole model."""
    if not is_peft_model(model):
        return None
    return model.active_peft_config.base_model_name_or_path or ""


def _model_name(args: Any) -> str:
    return args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).absolute().name
