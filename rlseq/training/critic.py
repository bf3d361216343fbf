"""The critic of PPO: a value head on its own backbone, or on the policy's, inside the one prepared module.

It is a submodule of the policy, so that one wrapped forward gives log-probs and values: accelerate prepares one
model, DDP sees one call a micro-batch, FSDP2 and DeepSpeed take no second one. On disk it is apart: a folder
`critic/`, and no key of it among the policy's weights.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from rlseq.errors import ModelError

NAME = "rlseq_critic"  # of the submodule
FOLDER = "critic"  # of a checkpoint
HEAD_FILE = "value_head.safetensors"


@dataclass
class PolicyOutput(ModelOutput):
    """What the policy's forward returns with `return_values`: (R, S-1), (R, S-1) and (R, S)."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None


class Critic(nn.Module):
    """Values of the states after each token, (R, S): a linear head on hidden states.

    The head starts at 0, so that a critic that has learned nothing says nothing: the first advantages are plain
    returns.

    Args:
        hidden_size: of the states.
        backbone: what computes them; None: the policy's own trunk does.
        trunk_gradient: with the policy's trunk, whether the value loss trains it too.
    """

    def __init__(self, hidden_size: int, backbone: PreTrainedModel | None = None, trunk_gradient: bool = False):
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.trunk_gradient = trunk_gradient

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(R, S, H) -> (R, S), in float32 or wider."""
        states = hidden_states.to(self.value_head.weight.dtype)
        values = self.value_head(states).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

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
        try:
            self.value_head.load_state_dict(load_file(folder / HEAD_FILE))
            if self.backbone is not None:
                saved = AutoModel.from_pretrained(folder, dtype=self.value_head.weight.dtype, use_safetensors=True)
                self.backbone.load_state_dict(saved.state_dict())
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{folder} holds no critic of this kind: {str(error).splitlines()[0]}") from error


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
        ModelError: the path holds no critic, or a separate one's states do not fit its head.
    """
    folder = critic_folder(name_or_path)
    dtype = next(policy.parameters()).dtype
    if kind == "shared":
        critic = Critic(policy.config.get_text_config().hidden_size, trunk_gradient=trunk_gradient)
        if name_or_path and folder is None:
            raise ModelError(f"{name_or_path!r} holds no value head ({HEAD_FILE}) for a shared critic")
    else:
        if name_or_path is None:
            backbone = copy.deepcopy(policy.get_decoder())
        else:
            try:
                source = str(folder or name_or_path)
                backbone = AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise ModelError(f"cannot load a critic from {name_or_path!r}: {str(error).splitlines()[0]}") from error
            if backbone.config.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
                raise ModelError(f"the critic {name_or_path!r} has another vocabulary than the policy")
        critic = Critic(backbone.config.get_text_config().hidden_size, backbone.requires_grad_(True))
    critic.to(next(policy.parameters()).device, dtype)
    if folder is not None:
        critic.value_head.load_state_dict(load_file(folder / HEAD_FILE))
    return critic


def critic_folder(name_or_path: str | None) -> Path | None:
    """The folder in which a run saved a critic, at a path or in its `critic/`; None where there is none."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return next((folder for folder in (path, path / FOLDER) if (folder / HEAD_FILE).is_file()), None)


def attach(policy: PreTrainedModel, critic: Critic) -> None:
    """Make a critic a submodule of the policy and let its forward return values too, where `return_values` asks.

    The policy has TRL's fused head already. The forward is looked into, not replaced: a shared critic reads the
    hidden states that pass through the policy's decoder.
    """
    policy.add_module(NAME, critic)
    inner_forward = policy.forward

    @functools.wraps(type(policy).forward)
    def forward(self, *args, return_values: bool = False, **kwargs):
        if not return_values:
            return inner_forward(*args, **kwargs)
        critic = getattr(self, NAME)
        if critic.backbone is None:
            passing: list[Tensor] = []
            hook = self.get_decoder().register_forward_hook(lambda _, __, out: passing.append(out.last_hidden_state))
            try:
                outputs = inner_forward(*args, **kwargs)
            finally:
                hook.remove()
            states = passing[-1] if critic.trunk_gradient else passing[-1].detach()
        else:
            outputs = inner_forward(*args, **kwargs)
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")}
            states = critic.backbone(**inputs, use_cache=False).last_hidden_state
        return PolicyOutput(log_probs=outputs.log_probs, entropy=outputs.entropy, values=critic(states))

    policy.forward = types.MethodType(forward, policy)


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
