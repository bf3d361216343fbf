"""PPO on the made-up task of tiny_task.py: a trainer, rollouts that a test chose, and what plain forwards say."""

from __future__ import annotations

import copy

import torch
from tiny import EOS, tiny_model
from tiny_task import ROWS, shares_letters, tiny_tokenizer

import rlseq.training.trl.batch.rollouts
from rlseq.config.training import PPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.training.ppo import PPOTrainer
from rlseq.types import Rollout

LONGEST = 6


def ppo_settings(tmp_path, **settings):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "max_completion_length": LONGEST,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return PPOConfig(**{**defaults, **settings})


def tiny_ppo(
    tmp_path, *, family="llama", rewards=(shares_letters,), model=None, rows=ROWS, head=0.3, more=None, **settings
):
    """A PPO trainer; its value head is random (deviation `head`) rather than 0, so that values say something."""
    tokenizer = tiny_tokenizer()
    trainer = PPOTrainer(
        model if model is not None else tiny_model(family, initializer_range=0.1),
        list(rewards),
        ppo_settings(tmp_path, **settings),
        build_prompts(rows, tokenizer),
        processing_class=tokenizer,
        rollouts_dir=tmp_path / "rollouts",
        **(more or {}),
    )
    if head:
        randomise_head(trainer, head)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def randomise_head(trainer, deviation=0.3):
    noise = torch.Generator().manual_seed(5)
    head = trainer.critic.value_head
    with torch.no_grad():
        head.weight.copy_(deviation * torch.randn(head.weight.shape, generator=noise))
        head.bias.fill_(0.2)


def saved_model(path, family="llama"):
    """A tiny model on disk, as a reference model needs it: TRL loads that by its path."""
    tiny_model(family, initializer_range=0.1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return load(path)


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# rollouts that a test chose


def fake_sampler(monkeypatch, trainer, completions):
    """From now on the sampler gives completions[i] of the i-th prompt, whenever it is asked; log-probs are real."""
    place = {prompt.key: i for i, prompt in enumerate(trainer.prompts)}

    def given(model, prompts, *, samples, **_):
        return [
            [rollout(model, p, i, completions[place[p.key]]) for i in of]
            for p, of in zip(prompts, samples, strict=True)
        ]

    monkeypatch.setattr(rlseq.training.trl.batch.rollouts, "sample", given)


def rollout(model, prompt, number, completion):
    with torch.no_grad():
        logprobs = plain_logprobs(model, prompt.prompt_ids, completion)
    return Rollout(
        prompt_key=prompt.key,
        sample=number,
        completion_ids=tuple(completion),
        loss_mask=(True,) * len(completion),
        logprobs=tuple(logprobs.tolist()),
        text=" ".join("x" for _ in completion),
        text_with_special_tokens="",
        messages=None,
        finish_reason="stop" if completion[-1] == EOS else "length",
        strategy="chosen",
    )


def generated(trainer, indices):
    """The generated batch of these rows of the data set, as training gets it."""
    return trainer.make_batch([trainer.train_dataset[i] for i in indices]).trained


# what plain forwards of one sequence say


def plain_logprobs(model, prompt, completion):
    """(T,) log-probs of a completion's tokens by one forward without padding, TRL's fused head left out."""
    ids = torch.tensor([[*prompt, *completion]])
    states = model.get_decoder()(input_ids=ids).last_hidden_state
    logprobs = model.lm_head(states)[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def plain_values(trunk, head, prompt, completion):
    """(T + 1,) values of the states before each token, and after the last."""
    states = trunk(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
    return (states @ head.weight[0] + head.bias)[len(prompt) - 1 :]


def values_of(trainer, prompt, completion):
    critic = trainer.critic
    trunk = critic.backbone if critic.backbone is not None else trainer._causal_model().get_decoder()
    with torch.no_grad():
        return plain_values(copy.deepcopy(trunk).eval(), critic.value_head, prompt, completion)


def double_sum_gae(rewards, values, after, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} by its definition, for one sequence of lists; `after` is V behind the last token."""
    T, following = len(rewards), [*values[1:], after]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, T)) for t in range(T)]


def policy_and_critic(trainer):
    """Copies of the weights, parted."""
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return (
        {name: p for name, p in weights.items() if "rlseq_critic" not in name},
        {name: p for name, p in weights.items() if "rlseq_critic" in name},
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
