"""Advantages and policy losses of the user's own, by path, tried on a small random batch before a model loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlseq.errors import ConfigError, TrainingError
from rlseq.losses.masking import describe
from rlseq.training.tools import find_callable

P, G, B, T = 4, 4, 3, 5  # of the batches on which functions are tried
NAN = float("nan")


class OwnAdvantage:
    """A function (P, G) rewards -> (P, G) advantages.

    Args:
        spec: `path/to/file.py:function` or `package.module:function`.

    Raises:
        ConfigError: it is not found, or does not do on a small batch what advantages must.
    """

    ARGUMENTS = ("rewards_PG",)

    def __init__(self, spec: str):
        self.name = f"advantage {spec!r}"
        self.function = find_callable("advantage", spec)
        rewards = torch.rand(P, G, generator=torch.Generator().manual_seed(0))
        rewards[1] = 1.0  # all equal
        rewards[2, 1] = NAN  # a reward abstained
        rewards[3] = NAN
        advantages = _tried(self.name, self.function, self.ARGUMENTS, [rewards])
        if wrong := self._wrong(advantages, rewards):
            raise ConfigError(f"{self.name} {wrong}")

    def of(self, rewards_PG: Tensor) -> Tensor:
        """(P, G) advantages, 0 where a reward abstained.

        Raises:
            TrainingError: they are of another shape or not finite.
        """
        advantages = self.function(rewards_PG.clone())
        if wrong := self._wrong(advantages, rewards_PG):
            raise TrainingError(f"{self.name} {wrong}", on_every_rank=True)
        return torch.where(rewards_PG.isnan(), 0.0, advantages.detach().to(rewards_PG))

    def _wrong(self, advantages: Any, rewards: Tensor) -> str:
        if wrong := _wrong_shape(advantages, rewards.shape, "(P, G), as rewards_PG"):
            return wrong
        present = ~rewards.isnan()
        if advantages[present].isfinite().all():
            return ""
        return (
            "returned an advantage that is not finite where the reward is: rewards_PG holds NaN where every reward "
            "abstained (nanmean leaves them out), and groups whose rewards are all equal (their deviation is 0)."
        )


class OwnPolicyLoss:
    """A function of log-probs, old log-probs, advantages and mask, (B, T) each, -> (B, T) losses of the tokens.

    Args, Raises: as for `OwnAdvantage`.
    """

    ARGUMENTS = ("logprobs_BT", "old_logprobs_BT", "advantages_BT", "mask_BT")

    def __init__(self, spec: str):
        self.name = f"policy_loss {spec!r}"
        self.function = find_callable("policy_loss", spec)
        generator = torch.Generator().manual_seed(0)
        old = -torch.rand(B, T, generator=generator)
        logprobs = (old + 0.2 * torch.randn(B, T, generator=generator)).clamp(max=0.0).requires_grad_()
        advantages = torch.randn(B, 1, generator=generator).expand(B, T).contiguous()
        mask = torch.arange(T) < torch.tensor([T, 2, 0])[:, None]  # no token of the last row is trained
        losses = _tried(self.name, self.function, self.ARGUMENTS, [logprobs, old, advantages, mask])
        if wrong := _wrong_shape(losses, mask.shape, "(B, T), one loss per token, as logprobs_BT"):
            raise ConfigError(f"{self.name} {wrong}")
        if not losses[mask].isfinite().all():
            raise ConfigError(f"{self.name} returned a loss that is not finite for a token that is trained.")
        (gradient,) = torch.autograd.grad(losses[mask].sum(), logprobs) if losses.requires_grad else (None,)
        if gradient is None or not gradient.any():
            raise ConfigError(
                f"{self.name} has no gradient: compute the losses from logprobs_BT without .detach(), .item() or "
                "torch.no_grad()."
            )
        if not gradient.isfinite().all():
            raise ConfigError(
                f"{self.name} has a gradient that is not finite. Where mask_BT is False, put a number into what is "
                "divided or taken the logarithm of, not only into the result (torch.where passes NaN gradients on)."
            )

    def of(self, logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T) losses, 0 where the mask is False; advantages are (B,) or (B, T).

        Raises:
            TrainingError: they are of another shape.
        """
        by_token = advantages if advantages.ndim == 2 else advantages[:, None].expand(mask_BT.shape)
        losses = self.function(logprobs_BT, old_logprobs_BT.detach(), by_token.detach(), mask_BT)
        if wrong := _wrong_shape(losses, mask_BT.shape, "(B, T), one loss per token, as logprobs_BT"):
            raise TrainingError(f"{self.name} {wrong}")
        return torch.where(mask_BT, losses, 0.0)


def check_own_functions(config: Any) -> None:
    """Load and try the functions that `advantage` and `policy_loss` name.

    Raises:
        ConfigError: says which, what is wrong with it, and what to do.
    """
    if config.advantage is not None:
        OwnAdvantage(config.advantage)
    if config.policy_loss is not None:
        OwnPolicyLoss(config.policy_loss)


def _tried(name: str, function: Callable, names: Sequence[str], given: Sequence[Tensor]) -> Any:
    """What a function returns for a small batch, which it must return again, and leave as it was."""
    wanted = f"{getattr(function, '__name__', 'f')}({', '.join(names)})"
    try:
        inspect.signature(function).bind(*given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be called: {error}; expected {wanted}.") from error
    results = []
    for _ in range(2):
        arguments = [x.clone() for x in given]  # a clone carries the gradient on to what is given
        try:
            results.append(function(*arguments))
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise ConfigError(
                f"{name} raised {type(error).__name__} on a small batch: {said}. It is called as {wanted}, with "
                f"shapes {', '.join(str(tuple(x.shape)) for x in given)}."
            ) from error
        for argument, before, one in zip(names, given, arguments, strict=True):
            if not _same(one, before):
                raise ConfigError(f"{name} changes {argument}, which others read: compute on a copy of it (.clone()).")
    first, second = results
    if torch.is_tensor(first) and torch.is_tensor(second) and not _same(first, second):
        raise ConfigError(
            f"{name} returned other numbers when it was called again with the same: it may hold no state and no "
            "randomness, or a resumed run would be another."
        )
    return first


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN equal to NaN."""
    if one.shape != two.shape:
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _wrong_shape(result: Any, shape: torch.Size, words: str) -> str:
    if not torch.is_tensor(result):
        return f"returned a {type(result).__name__}; expected a tensor {words}."
    if result.shape != shape or not result.is_floating_point():
        return f"returned {describe(result)} for {tuple(shape)}; expected floats of shape {words}."
    return ""
