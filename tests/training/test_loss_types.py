"""The losses by `loss_type` against TRL's own computation, on random ragged micro-batches: values, gradients, log."""

import functools
from collections import defaultdict

import pytest
import torch
import trl
from test_grpo import padded_batch
from tiny_shapes import tiny_shape
from tiny_task import as_micro_batch, tiny_trainer
from trl.trainer.utils import FusedCausalLMOutput

from rlseq.config.validation.inherited import LOSS_TYPES
from rlseq.training.update.forward import Scores

ROWS, LONGEST = 5, 7
SEEDS = range(4)


def random_batch(seed, *, tools=False, per_token=False):
    """A ragged micro-batch as TRL reads it, and the log-probs and entropies that a model gives it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=generator)
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    logprobs = -noise(ROWS, LONGEST).abs() * mask
    inputs = {
        "prompt_ids": torch.ones(ROWS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "completion_ids": torch.full((ROWS, LONGEST), 3),
        "completion_mask": mask,
        "prompt_index": torch.arange(ROWS),
        "advantages": noise(ROWS, LONGEST) * mask if per_token else noise(ROWS),
        "old_per_token_logps": (logprobs + 0.3 * noise(ROWS, LONGEST)) * mask,
        "ref_per_token_logps": (logprobs + 0.5 * noise(ROWS, LONGEST)) * mask,
        "num_items_in_batch": mask.sum() * 3.0,
    }
    if tools:
        inputs["tool_mask"] = (torch.rand(ROWS, LONGEST, generator=generator) < 0.7).long()
        inputs["tool_mask"][:, 0] = 1
    inputs["sampling_per_token_logps"] = (inputs["old_per_token_logps"] + 0.3 * noise(ROWS, LONGEST)) * mask
    return inputs, logprobs, noise(ROWS, LONGEST).abs() * mask


def computed(trainer, compute, logprobs, entropies):
    """The loss of a computation, its gradient and what it logs."""
    leaves = [x.clone().requires_grad_() for x in (logprobs, entropies)]
    trainer._metrics["train"], trainer._entropy_window_stats = defaultdict(list), None
    coefficient, entropy = trainer.entropy_coef, trainer._last_world_entropy
    loss = compute(*leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    state = [trainer.entropy_coef, trainer._last_world_entropy]
    trainer.entropy_coef, trainer._last_world_entropy = coefficient, entropy
    log = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss, [torch.zeros_like(logprobs) if g is None else g for g in gradients], log, state


def equals_trl(trainer, inputs, logprobs, entropies):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2

    def of_trl(logprobs, entropies):
        def model(**_):
            return FusedCausalLMOutput(loss=None, log_probs=logprobs, entropy=entropies)

        return trl.GRPOTrainer._compute_loss(trainer, model, inputs)

    expected = computed(trainer, of_trl, logprobs, entropies)
    batch = as_micro_batch(inputs)
    loss = functools.partial(trainer.loss.policy_gradient.loss, batch=batch, kl_coef=trainer.beta)
    found = computed(trainer, lambda *x: loss(Scores(*x)), logprobs, entropies)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-5)
    counted = batch.mask
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine[counted], theirs[counted], atol=1e-6, rtol=1e-5)
        assert (mine[~counted] == 0).all()
    assert found[2] == {name: pytest.approx(x, abs=1e-6, nan_ok=True) for name, x in expected[2].items()}
    assert found[3] == pytest.approx(expected[3], abs=1e-6)
    return found


SETTINGS = {
    "plain": {},
    "one-sided clip": {"epsilon": 0.1, "epsilon_high": 0.3},
    "two-sided clip": {"delta": 1.05},
    "KL": {"beta": 0.1, "use_bias_correction_kl": False},
    "KL times the ratio": {"beta": 0.1, "use_bias_correction_kl": True},
    "entropy quantile": {"top_entropy_quantile": 0.4},
    "entropy bonus": {"entropy_coef": 0.05, "top_entropy_quantile": 0.6},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 0.7},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "tools": {"tools": True},
    "advantages a token": {"per_token": True},
    "everything": {
        "beta": 0.1,
        "entropy_coef": 0.05,
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": 0.01,
        "delta": 1.5,
        "tools": True,
        "per_token": True,
    },
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_gradient_and_log_equal_those_of_trl(tmp_path, monkeypatch, name, loss_type, level):
    settings = dict(SETTINGS[name])
    of_batch = {key: settings.pop(key) for key in ("tools", "per_token") if key in settings}
    beta = settings.pop("beta", 0.0)
    trainer = tiny_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    trainer.beta = beta  # afterwards: the reference's log-probs are random
    for key, value in settings.items():
        monkeypatch.setattr(trainer.args, key, value)
        monkeypatch.setattr(trainer, key, value, raising=False)
    trainer.epsilon_low, trainer.epsilon_high = settings.get("epsilon", 0.2), settings.get("epsilon_high", 0.2)
    trainer._entropy_bonus_enabled = bool(trainer.entropy_coef)
    for seed in SEEDS:
        inputs, logprobs, entropies = random_batch(seed, **of_batch)
        _, gradients, *_ = equals_trl(trainer, inputs, logprobs, entropies)
        assert gradients[0].abs().max() > 1e-4
    del inputs["old_per_token_logps"]  # on policy
    equals_trl(trainer, inputs, logprobs, entropies)


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [(name, mode) for name in LOSS_TYPES for mode in MODES[: 2 if name == "vespo" else 4]],  # TRL refuses the others
)
def test_a_generators_ratio_weighs_the_loss_as_it_does_in_trl(tmp_path, loss_type, mode):
    trainer = tiny_trainer(tmp_path, loss_type=loss_type)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = 0.7, 1.3
    for seed in SEEDS:
        inputs, *scores = random_batch(seed, tools=True)
        inputs["importance_sampling_ratio"] = trainer.batches.importance_ratio(as_micro_batch(inputs))
        assert (inputs["importance_sampling_ratio"] != 1).any()
        equals_trl(trainer, inputs, *scores)


def test_a_router_s_loss_and_its_gradient_equal_those_of_trl(tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_shape("mixtral"), router_aux_loss_coef=0.5)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs = padded_batch() | {"advantages": torch.tensor([1.0, -0.5, 0.25])}
    inputs["num_items_in_batch"] = torch.tensor(7.0)
    found = []
    for compute, batch in (
        (trainer.micro_batch_loss, as_micro_batch(inputs)),
        (lambda *x: trl.GRPOTrainer._compute_loss(trainer, *x), inputs),
    ):
        trainer._metrics["train"].clear()
        loss = compute(trainer.model, batch)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
        gradient = torch.cat([g.flatten() for g in gradients if g is not None])
        found.append((loss, gradient, torch.tensor(trainer._metrics["train"]["aux_loss"])))
    assert found[0][2] > 0.1
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
