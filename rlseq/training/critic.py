"""The critic of PPO: a value head on its own backbone, or on the policy's, inside the one prepared module.

It is a submodule of the policy, so that one wrapped forward gives log-probs and values: accelerate prepares one
model, DDP sees one call a micro-batch, FSDP2 and DeepSpeed take no second one. On disk it is apart: a folder
`critic/`, and no key of it among the policy's weights.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from rlseq.engine.model.info import attention_of, base_of
from rlseq.engine.model.load import load_model
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.errors import ModelError
from rlseq.training.models import WEIGHT_FILES, check_model_path

NAME = "rlseq_critic"  # of the submodule
FOLDER = "critic"  # of a checkpoint
HEAD_FILE = "value_head.safetensors"


@dataclass
class PolicyOutput(ModelOutput):
    """What the policy returns with `return_values`: log-probs and entropies, (R, S-1), and values, (R, S).

    On a CPU the first two are `logits`, (R, S-1, 2), as `scored_head` makes them.

    It is a dict too, whose method `values` DDP calls: no field may have that name.
    """

    logits: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None


class ValueHead(nn.Linear):
    """A linear layer that computes in float32 or wider, under autocast too: bfloat16 tells 0.902 from 0.906 at best."""

    def forward(self, states: Tensor) -> Tensor:
        """(R, S, H) -> (R, S, 1)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Critic(nn.Module):
    """Values of the states after each token, (R, S): a linear head on hidden states.

    The head starts at 0 and is told the mean reward of the first rollouts (`begin_at`), so a critic that has learned
    nothing else is the batch baseline. Left to learn that mean by gradient, a backbone that starts as the policy's
    would first lose what it knows: every state pulls it the same way.

    Args:
        hidden_size: of the states.
        backbone: what computes them; None: the policy's own trunk does.
        trunk_gradient: with the policy's trunk, whether the value loss trains it too.
    """

    def __init__(self, hidden_size: int, backbone: PreTrainedModel | None = None, trunk_gradient: bool = False):
        super().__init__()
        self.backbone = backbone
        self.value_head = ValueHead(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.trunk_gradient = trunk_gradient

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(R, S, H) -> (R, S), in float32 or wider."""
        return self.value_head(hidden_states).squeeze(-1)

    @property
    def is_new(self) -> bool:
        """Whether the head is as it was made: it says 0 of every state."""
        return not (self.value_head.weight.any() or self.value_head.bias.any())

    @torch.no_grad()
    def begin_at(self, value: float) -> None:
        """Let a new critic say the mean reward of every state, rather than have it move its backbone to get there."""
        self.value_head.bias.fill_(value)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights, as `split_weights` returns them, so that `build_critic` and `load` read them back."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {name: x.contiguous().cpu() for name, x in _under("value_head.", weights).items()}
        if self.backbone is not None:
            self.backbone.save_pretrained(folder, state_dict=_under("backbone.", weights))
        save_file(head, folder / HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            ModelError: the folder has none, or of another critic.
        """
        check_kind(folder, "shared" if self.backbone is None else "separate")
        try:
            self.value_head.load_state_dict(load_file(folder / HEAD_FILE))
            if self.backbone is not None:
                saved = load_model(folder, what="a critic", kind=AutoModel, dtype=self.value_head.weight.dtype)
                self.backbone.load_state_dict(saved.state_dict())
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{folder} holds no critic of this kind: {first_line(error)}") from error

    def supports_packing(self, longest: int) -> tuple[bool, str]:
        """Whether a backbone of its own gives packed rows what it gives each sequence alone, as the policy must too."""
        return (True, "") if self.backbone is None else supports_packing(_WithLogits(self.backbone), longest)


class _WithLogits(nn.Module):
    """A backbone as the check of packing asks for it: its hidden states stand for logits."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config

    def forward(self, **inputs) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.backbone(**inputs).last_hidden_state)


def build_critic(
    policy: PreTrainedModel,
    kind: str,
    name_or_path: str | None = None,
    *,
    trunk_gradient: bool = False,
) -> Critic:
    """A critic for a policy, before adapters are put on that.

    Args:
        policy: the causal language model, as it starts.
        kind: "separate" (a backbone of its own: that of `name_or_path`, or a copy of the policy's) or "shared".
        name_or_path: a critic that a run saved (its `critic/`, or the checkpoint or run that holds it), or, for a
            separate one, any model.
        trunk_gradient: of a shared critic.

    Raises:
        ModelError: the path holds no critic of this kind, or one that does not fit the policy.
    """
    check_critic_path(kind, name_or_path)
    folder = critic_folder(name_or_path)
    if kind == "shared":
        critic = Critic(policy.config.get_text_config().hidden_size, trunk_gradient=trunk_gradient)
    else:
        backbone = _copy_of_trunk(policy) if name_or_path is None else _load_backbone(folder or name_or_path, policy)
        critic = Critic(backbone.config.get_text_config().hidden_size, backbone.requires_grad_(True))
    critic.to(next(policy.parameters()).device, policy.dtype)
    if folder is not None:
        try:
            critic.value_head.load_state_dict(load_file(folder / HEAD_FILE))
        except RuntimeError as error:  # of another width
            raise ModelError(f"the critic of {name_or_path!r} does not fit this model: {first_line(error)}") from error
    return critic


def _copy_of_trunk(policy: PreTrainedModel) -> PreTrainedModel:
    if getattr(policy, "is_quantized", False):
        raise ModelError(
            "a quantised policy cannot be copied to a critic that trains; give --critic shared, or "
            "--critic_name_or_path a model that is loaded whole"
        )
    if isinstance(policy, PeftModel):  # the critic starts as the adapted policy, but trains whole
        return copy.deepcopy(policy).merge_and_unload().get_decoder()
    return copy.deepcopy(policy.get_decoder())


def _load_backbone(name_or_path: str | Path, policy: PreTrainedModel) -> PreTrainedModel:
    same = {"dtype": policy.dtype, "attn_implementation": attention_of(policy)}  # they are given one batch
    backbone = load_model(str(name_or_path), what="a critic", kind=AutoModel, **same)
    sizes = [model.config.get_text_config().vocab_size for model in (backbone, policy)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the critic {str(name_or_path)!r} has another vocabulary than the policy ({sizes[0]} and {sizes[1]} "
            "tokens); a critic reads the policy's tokens"
        )
    return backbone


def check_critic_path(kind: str, name_or_path: str | None) -> None:
    """Fail early on a path from which no critic of this kind can start; a hub id is left for the hub to answer.

    Raises:
        ModelError: says what is there, and what was expected.
    """
    if name_or_path is None:
        return
    folder = critic_folder(name_or_path)
    if folder is not None:
        check_kind(folder, kind)
    elif kind == "shared":
        raise ModelError(f"{name_or_path!r} holds no value head ({HEAD_FILE}) for a shared critic")
    else:
        check_model_path(name_or_path)


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a saved critic of the other kind: its head reads another trunk's states."""
    found = "separate" if any((folder / name).is_file() for name in WEIGHT_FILES) else "shared"
    if found != kind:
        raise ModelError(f"{folder} holds a {found} critic, but --critic is {kind}; give --critic {found}")


def critic_folder(name_or_path: str | None) -> Path | None:
    """The folder in which a run saved a critic, at a path or in its `critic/`; None where there is none."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return next((folder for folder in (path, path / FOLDER) if (folder / HEAD_FILE).is_file()), None)


class _Values:
    """The hooks of a policy by which a call with `return_values=True` returns its critic's values too.

    A shared critic reads the hidden states that pass through the policy's decoder.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None  # of the call under way, where it asks for values
        self.states: Tensor | None = None  # what passed through the decoder in it

    def begin(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        asked = kwargs.pop("return_values", False)
        self.inputs, self.states = (kwargs if asked else None), None
        return args, kwargs

    def see(self, _: nn.Module, __: tuple, outputs: Any) -> None:
        if self.inputs is not None:
            self.states = outputs.last_hidden_state

    def end(self, policy: nn.Module, _: tuple, outputs: Any) -> Any:
        if self.inputs is None:
            return outputs
        critic, inputs, states = getattr(base_of(policy), NAME), self.inputs, self.states
        self.inputs = self.states = None
        if critic.backbone is not None:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
            states = critic.backbone(**inputs, use_cache=False).last_hidden_state
        elif not critic.trunk_gradient:
            states = states.detach()
        found = {name: getattr(outputs, name, None) for name in ("logits", "log_probs", "entropy")}
        return PolicyOutput(**found, state_values=critic(states))


def attach(policy: PreTrainedModel | PeftModel, critic: Critic) -> None:
    """Make a critic a submodule of the policy and let a call return values too, where `return_values` asks."""
    base_of(policy).add_module(NAME, critic)
    values = _Values()
    policy.register_forward_pre_hook(values.begin, with_kwargs=True)
    base_of(policy).get_decoder().register_forward_hook(values.see)
    policy.register_forward_hook(values.end)


def is_critic(parameter_name: str) -> bool:
    """Whether a parameter or a key of the policy's state belongs to the critic inside it."""
    return f"{NAME}." in parameter_name


def split_weights(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's own weights, and the critic's by their names in `Critic`."""
    policy = {name: x for name, x in state_dict.items() if not is_critic(name)}
    critic = {name.partition(f"{NAME}.")[2]: x for name, x in state_dict.items() if is_critic(name)}
    return policy, critic


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
