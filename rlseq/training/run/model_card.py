"""What a run's result is, for the reader: the text of README.md beside its weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import psutil
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlseq import __version__
from rlseq.common.escapes import visible

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_FINDINGS = ("What is generated", "How likely the references are")  # sections of report.md that the card repeats
_SPEC = "Evaluation spec"
_VERSIONS = ("trl", "transformers", "torch")
_LAUNCHERS = {
    "accelerate": ["accelerate"],
    "accelerate-launch": ["accelerate-launch"],
    "accelerate.commands.launch": ["accelerate", "launch"],
}


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
        report: the text of report.md, from which headline, tables of values and spec are taken; or "".
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
        spec=found.get(_SPEC, ""),
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
