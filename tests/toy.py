"""A policy whose every completion can be listed: three tokens, at most two a completion, seven completions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlseq.training.trl.batch.rollouts
from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Greedy
from rlseq.training.grpo import GRPOTrainer
from rlseq.types import Rollout

A, B, STOP = 0, 1, 2
LONGEST = 2
COMPLETIONS = [(STOP,), *itertools.product((A, B), (A, B, STOP))]
REWARDS = dict(zip(COMPLETIONS, (0.3, -1.0, 0.5, 2.0, 0.0, -0.25, 1.0), strict=True))
PROMPT = (A,)
ROWS = [{"prompt": "a ", "references": ["b"]}, {"prompt": "b a ", "references": ["b", "a"]}]  # the first is PROMPT


def table(completion_ids):
    """The reward: one number per completion, looked up."""
    return REWARDS[tuple(completion_ids)]


def toy_model(seed=0):
    fields = {"vocab_size": 3, "pad_token_id": STOP, "bos_token_id": None, "eos_token_id": STOP}
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    # float64 keeps rounding out of the gradients, though TRL's fused head computes log-probs in float32
    return tiny_model("llama", seed=seed, initializer_range=0.5, dtype=torch.float64, **fields, **size)


def toy_trainer(tmp_path, *, model=None, rows=ROWS[:1], rewards=(table,), **settings):
    """rlseq's trainer on the toy policy, unscaled and normalised by a constant unless told otherwise."""
    tokens = Tokenizer(models.WordLevel({"a": A, "b": B, "<eos>": STOP}, unk_token="b"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<eos>", eos_token="<eos>", unk_token="b", padding_side="left"
    )
    defaults = {
        "output_dir": str(tmp_path),
        "num_generations": 2,
        "max_completion_length": LONGEST,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if settings.get("objective", "policy_gradient") != "policy_gradient":
        del defaults["loss_type"], defaults["scale_rewards"]
    if settings.get("objective") in ("expected_accuracy", "max_rl"):
        defaults["num_generations"] = 1  # it samples nothing
    settings = {**defaults, **settings}
    if len(rows) == 1 and settings["num_generations"] == 1:  # TRL takes no batch of one row: a twin fills it
        rows = rows * 2
    settings.setdefault("per_device_train_batch_size", settings["num_generations"] * len(rows))
    trainer = GRPOTrainer(
        model if model is not None else toy_model(),
        list(rewards),
        GRPOConfig(**settings),
        build_prompts(rows, tokenizer),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


# the exact quantities, by one plain forward of each completion


def token_logprobs(model, prompt_ids, completion):
    """Log-prob of each token, (T,), of one completion alone."""
    ids = torch.tensor([[*prompt_ids, *completion]])
    logprobs = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def exact_logprobs(model, prompt_ids):
    """Log-prob () of every completion."""
    return {y: token_logprobs(model, prompt_ids, y).sum() for y in COMPLETIONS}


def gradient(loss, model):
    """The gradient of a scalar by all parameters, flat."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in found])


def expected_reward(model, prompt_ids, rewards=REWARDS):
    return sum(logprob.exp() * rewards[y] for y, logprob in exact_logprobs(model, prompt_ids).items())


def groups(model, prompt_ids, size) -> Iterable[tuple[tuple, float]]:
    """Every multiset of N completions, and its probability under the model."""
    probs = {y: logprob.exp().item() for y, logprob in exact_logprobs(model, prompt_ids).items()}
    for group in itertools.combinations_with_replacement(COMPLETIONS, size):
        orders = math.factorial(size) // math.prod(math.factorial(n) for n in Counter(group).values())
        yield group, orders * math.prod(probs[y] for y in group)


# the trainer's step on completions that the test chose


def fake_sampler(monkeypatch, chosen: Sequence[Sequence[tuple]]):
    """From now on the trainer's sampler gives these completions, one list per prompt; greedy stays greedy."""

    def given(model, prompts, *, strategy, **settings):
        if isinstance(strategy, Greedy):
            return sample(model, prompts, strategy=strategy, **settings)
        return [
            [rollout(model, prompt, i, y) for i, y in enumerate(completions)]
            for prompt, completions in zip(prompts, chosen, strict=True)
        ]

    monkeypatch.setattr(rlseq.training.trl.batch.rollouts, "sample", given)


def rollout(model, prompt, number, completion):
    with torch.no_grad():
        logprobs = tuple(token_logprobs(model, prompt.prompt_ids, completion).tolist())
    return Rollout(
        prompt_key=prompt.key,
        sample=number,
        completion_ids=completion,
        loss_mask=(True,) * len(completion),
        logprobs=logprobs,
        text="",
        text_with_special_tokens="",
        messages=None,
        finish_reason="stop" if completion[-1] == STOP else "length",
        strategy="chosen",
    )


def step_loss(trainer, monkeypatch, *chosen):
    """The loss that the trainer would step on, had it sampled these completions of its prompts."""
    fake_sampler(monkeypatch, chosen)
    rows = [trainer.train_dataset[i] for i, completions in enumerate(chosen) for _ in completions]
    return trainer.micro_batch_loss(trainer.model, trainer.make_batch(rows).trained)


def step_gradient(trainer, monkeypatch, *chosen):
    return gradient(step_loss(trainer, monkeypatch, *chosen), trainer.model)


def mean_gradient(trainer, monkeypatch):
    """The gradient's mean over every sample of the first prompt's group."""
    every = groups(trainer.model, trainer.prompts[0].prompt_ids, trainer.args.num_generations)
    return sum(p * step_gradient(trainer, monkeypatch, group) for group, p in every)
