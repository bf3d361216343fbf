"""FSDP2: two processes that share the weights are one process that has them whole.

accelerate leaves processes on CPUs data-parallel where FSDP is asked for (rlseq/training/run/launch.py refuses that).
The only stand-in here is for that one decision; what shards, trains, saves and loads is accelerate's and torch's own
code, with gloo in the place of NCCL.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from forks import end_of, fork, run_ranks
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import EOS, tiny_model
from tiny_ppo import load, saved_model, tiny_ppo
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlseq.config.training import ModelArguments
from rlseq.data.prompts import build_prompts
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Greedy, Sample
from rlseq.errors import ConfigError, ModelError
from rlseq.recipes.rollouts import check_reloaded
from rlseq.training.averaging import WeightAverage
from rlseq.training.critic import NAME, attach, build_critic
from rlseq.training.run.checkpoints import find_defect
from rlseq.training.run.directory import RunDirectory
from rlseq.training.trl.sharding import whole_weights
from rlseq.training.update.forward import forward

# What recipes/accelerate/fsdp2.yaml becomes in the environment of a process.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
GLOBAL_ROWS = 8
COMMON = {
    "max_steps": 2,
    "max_completion_length": 100,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,  # Adam divides a gradient near 0 by its size, and so would rounding be
    "learning_rate": 1e-2,
    "report_to": "none",
}


def let_cpus_shard() -> None:
    """Have accelerate take FSDP2 for these processes, as it does for GPUs."""
    os.environ.update(FSDP2)
    begin = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def evaluator(model):
    """Mean log-prob of the references; the ranks take unequal numbers of forwards to tell."""
    prompts = build_prompts(ROWS, tiny_tokenizer())
    rows = [p.prompt_ids for p in prompts], [(*p.prompt_ids[:-1], EOS) for p in prompts]
    for _ in range(1 + PartialState().process_index):
        scores = score(model, *rows)
    return {"logprob": torch.cat(scores).mean().item()}


def trainer_of(kind, out, start, processes):
    settings = {**COMMON, "per_device_train_batch_size": GLOBAL_ROWS // processes, "model": load(start)}
    if kind == "ppo":
        more = {"evaluator": evaluator}
        return tiny_ppo(out, more=more, eval_strategy="steps", eval_steps=1, beta=0.1, **settings)
    if kind == "lora":
        settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    else:
        settings["beta"] = 0.1  # a reference model, sharded too
    torch.manual_seed(0)  # of the adapters
    return tiny_trainer(out, num_generations=2, **settings)


def run(kind, out, start, *, processes, resume=None):
    """Train and leave checkpoints, rollouts and the trainer's log in `out`."""

    def act():
        if processes > 1:
            let_cpus_shard()
        trainer = trainer_of(kind, out, start, processes)
        trainer.train(resume)
        if processes > 1:
            assert isinstance(trainer.model, FSDPModule)
            assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
            with pytest.raises(ConfigError, match="set it to 0 under FSDP"):
                WeightAverage(trainer, 0.9)
            trainer.save_model(str(out))
            found = check_reloaded(trainer, RunDirectory(out), ModelArguments(str(start)))
            assert [one.same for one in found] == [True] * trainer.accelerator.is_main_process
            assert all(one.difference < 1e-5 and one.tokens > 8 for one in found)
        if trainer.accelerator.is_main_process:
            (out / "log.json").write_text(json.dumps(trainer.state.log_history))

    saved_model(start)
    log = out.with_suffix(".log")
    if processes == 1:
        assert end_of(fork(act, log)) == 0, log.read_text()[-3000:]
    else:
        run_ranks(processes, act, log)


def rollouts(out, step):
    return [json.loads(line) for line in (out / f"rollouts/{step:06d}.jsonl").read_text().splitlines()]


def weights(checkpoint):
    return {
        f"{path.name}:{n}": x for path in sorted(checkpoint.rglob("*.safetensors")) for n, x in load_file(path).items()
    }


@pytest.mark.parametrize("kind", ["grpo", "ppo", "lora"])
def test_a_sharded_run_samples_learns_and_saves_what_one_process_does(tmp_path, kind):
    one, two = tmp_path / "one", tmp_path / "two"
    run(kind, one, tmp_path / "start", processes=1)
    run(kind, two, tmp_path / "start", processes=2)
    sampled = {step: rollouts(one, step) for step in (1, 2)}
    longest = [max(r["length"] for r in rows) for rows in (sampled[1][:4], sampled[1][4:])]
    assert longest[0] != longest[1]  # the ranks decoded unequal numbers of steps
    for step in (1, 2):
        assert [r["completion"] for r in rollouts(two, step)] == [r["completion"] for r in sampled[step]]
    logs = [json.loads((out / "log.json").read_text()) for out in (one, two)]
    for mine, theirs in zip(*logs, strict=True):
        for name in {"loss", "grad_norm", "kl", "reward", "entropy", "eval_logprob", "critic/value_loss"} & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), name
    assert any("grad_norm" in line for line in logs[0])
    assert any("eval_logprob" in line for line in logs[0]) == (kind == "ppo")
    begun, expected, found = (weights(out / f"checkpoint-{n}") for out, n in ((one, 1), (one, 2), (two, 2)))
    assert expected.keys() == found.keys()
    assert any(name.startswith("value_head") for name in found) == (kind == "ppo")
    assert all("lora" in name for name in found) == (kind == "lora")  # adapters alone
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    assert max((expected[name] - begun[name]).abs().max() for name in expected) > 1e-3
    assert find_defect(two / "checkpoint-2") is None
    if kind == "lora":
        return
    plain = AutoModelForCausalLM.from_pretrained(two / "checkpoint-2")
    held = load_file(two / "checkpoint-2/model.safetensors")
    assert not any(NAME in name for name in held)
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(x, held[name], rtol=0, atol=0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["grpo", "ppo", "lora"])
def test_a_sharded_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, kind):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(kind, whole, tmp_path / "start", processes=2)
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    run(kind, resumed, tmp_path / "start", processes=2, resume=str(resumed / "checkpoint-1"))
    expected, found = weights(whole / "checkpoint-2"), weights(resumed / "checkpoint-2")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    assert rollouts(resumed, 2) == rollouts(whole, 2)


@pytest.mark.soak
@pytest.mark.parametrize(
    "rename", [lambda name: None if "layers.1." in name else name, lambda name: f"_orig_mod.{name}"]
)
@pytest.mark.parametrize("kind", ["grpo", "ppo", "lora"])
def test_a_sharded_run_does_not_resume_without_weights_of_its_checkpoint(tmp_path, kind, rename):
    out, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-1"
    run(kind, out, tmp_path / "start", processes=2)
    shutil.rmtree(out / "checkpoint-2")
    file = checkpoint / "pytorch_model_fsdp.bin"
    held = torch.load(file, weights_only=True)
    torch.save({rename(name): weight for name, weight in held.items() if rename(name)}, file)

    def act():
        let_cpus_shard()
        with pytest.raises(ModelError, match=r"lacks \d+ of the model's weights \(.*Resume from another checkpoint$"):
            trainer_of(kind, out, tmp_path / "start", 2).train(str(checkpoint))

    run_ranks(2, act, tmp_path / "resumed.log")


# -- torch's fully_shard alone


def policy_with_critic():
    model = tiny_model(initializer_range=0.1)
    critic = build_critic(model, "separate")
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(1))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    attach(model, critic)
    return model


def scores_and_gradients(model, prompts):
    """One forward of the policy and the critic inside it, and a backward of a sum that asks for all they give."""
    model.zero_grad()
    completions = [(7, 9, EOS), (11, EOS), (5,), (6, 6, 8, EOS)]
    asked = {"packs": True, "pad_id": 0, "dtype": torch.float32, "device": torch.device("cpu"), "values": True}
    found = forward(model, prompts, completions, 4, **asked)
    loss = -found.logprobs.sum() + (found.values**2).sum() + found.last_values.sum() - 0.1 * found.entropies.sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return loss.detach(), found, grads


def check_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].logprobs, expected[1].logprobs)
    torch.testing.assert_close(found[1].values, expected[1].values)
    assert found[2].keys() == expected[2].keys() and any(NAME in name for name in found[2])
    for name, gradient in expected[2].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[2][name], gradient, msg=name)


def check_sharded_policy():
    """What each of the two ranks does."""
    rank = PartialState().process_index
    prompts = build_prompts(ROWS, tiny_tokenizer())
    ids = [prompts[i].prompt_ids for i in (0, 0, 1, 2)]
    model = policy_with_critic()
    whole = policy_with_critic()
    whole.load_state_dict(model.state_dict())
    for layer in [*model.model.layers, *getattr(model, NAME).backbone.layers]:
        fully_shard(layer)
    fully_shard(model)
    expected = scores_and_gradients(whole, ids)
    options = {"num_samples": 3, "stop_ids": [EOS], "seed": 0}
    limit = 4 + 20 * rank  # unequal numbers of steps
    names, rows = [p.prompt_ids for p in prompts[: 1 + rank]], [(7, 9, EOS)] * (1 + rank)

    def uses(model):
        sampled = sample(model, prompts[rank:], max_new_tokens=limit, strategy=Sample(), **options)
        greedy = sample(model, prompts[rank:], max_new_tokens=limit, strategy=Greedy(), **options | {"num_samples": 1})
        scored = [score(model, names, rows) for _ in range(1 + rank)]  # an evaluation's, of this rank's share of rows
        return sampled, greedy, torch.cat(scored[-1])

    # Before the first forward, as a run's first rollouts are, and after it.
    for _ in range(2):
        with torch.no_grad(), whole_weights(model):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            found = uses(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        mine = uses(whole)
        assert found[:2] == mine[:2]
        torch.testing.assert_close(found[2], mine[2])
        check_equal(scores_and_gradients(model, ids), expected)
    longest = gather_object([max(len(r.completion_ids) for group in found[0] for r in group)])
    assert longest[0] < longest[1]

    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:  # the others get none
        kept = whole.state_dict()
        assert gathered.keys() == kept.keys() and all(torch.equal(gathered[name], x) for name, x in kept.items())


def test_a_sharded_policy_and_its_critic_give_what_whole_ones_give(tmp_path):
    run_ranks(2, check_sharded_policy, tmp_path / "log")
