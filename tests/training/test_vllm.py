"""vLLM itself on a CPU, in the trainer's process and as a server: `make vllm`, in an environment of its own.

The oracle of a log-prob is a plain forward of transformers, without cache, padding or rlseq, of the policy as it was
when the round was sampled.
"""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import VOCAB, tiny_model
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from trl.generation import vllm_client, vllm_generation

from rlseq.errors import ConfigError
from rlseq.training.trl.vllm_cpu import vllm_on_cpu

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")
layers = pytest.importorskip("vllm.model_executor.layers.utils")

pytestmark = pytest.mark.soak
# A gigabyte of cache in place of half of the memory, no threads bound to cores, graphs traced but not compiled.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
SHAPE = {"hidden_size": 64, "head_dim": 32, "tie_word_embeddings": True}  # vLLM's attention on a CPU takes no less
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
OF_A_GROUP = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
REWARD = "def short(completion):\n    return -float(len(completion.split()))\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", initializer_range=0.1, **SHAPE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def short(completion: str) -> float:
    return -float(len(completion.split()))


def logprobs_of(model, prompt, completion):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float()
    each = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (T, V)
    return each.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def mismatch(model, generated):
    """The largest difference, over the tokens of a round, of vLLM's log-prob from the model's."""
    prompts, completions, logprobs, _ = generated
    return max(
        (logprobs_of(model, prompt, ids) - torch.tensor(each)[:, 0]).abs().max().item()
        for prompt, ids, each in zip(prompts, completions, logprobs, strict=True)
    )


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_each_round_is_sampled_from_the_weights_of_its_step(tmp_path, monkeypatch, checkpoint, adapter):
    # In float32, as the trainer's: rounding of bfloat16, which TRL leaves vLLM to choose, would hide small changes.
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm.LLM, dtype="float32"))
    trainer = tiny_trainer(
        tmp_path,
        rewards=[short],
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        tokenizer=tiny_tokenizer(),
        peft_config=adapter,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_steps=3,
        learning_rate=5e-2,
        logging_steps=1,
        report_to="none",
    )
    engine, policy, rounds, off, stale = trainer.vllm_generation, trainer.model, [], [], []
    generate = engine.generate

    def keep(*args, **kwargs):
        generated = generate(*args, **kwargs)
        off.append(mismatch(policy, generated))
        stale.extend(mismatch(policy, before) for before in rounds[-1:])
        rounds.append(generated)
        return generated

    monkeypatch.setattr(engine, "generate", keep)
    trainer.train()

    assert len(off) == 3 and max(off) < 1e-4
    assert len(stale) == 2 and min(stale) > 1e-2  # of the weights of the step before
    logged = [line["sampling/sampling_logp_difference/max"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx(off, abs=1e-5)

    with torch.no_grad():  # a head that reads nothing: every token is as likely as another
        next(p for name, p in policy.named_parameters() if name.endswith("model.norm.weight")).zero_()
    engine.sync_weights()
    _, _, logprobs, _ = generate([[5, 4]] * 4, None, 4)
    assert all(value == pytest.approx(-math.log(VOCAB), abs=1e-5) for row in logprobs for (value,) in row)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """vLLM's server with the checkpoint in float32; `vllm serve` does not start where the distribution is vllm-cpu."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--max-model-len", "64", "--max-num-seqs", "8", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "nccl"}']
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(60)


def server_trainer(tmp_path, checkpoint, server):
    return tiny_trainer(
        tmp_path,
        rewards=[short],
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        tokenizer=tiny_tokenizer(),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server,
        vllm_server_timeout=900,
        max_steps=1,
        logging_steps=1,
        report_to="none",
    )


def test_a_server_is_refused_where_no_gpu_could_send_it_weights(tmp_path, checkpoint, server):
    with pytest.raises(ConfigError, match=r"needs a CUDA device, got 'cpu.* On a CPU give --vllm_mode colocate"):
        server_trainer(tmp_path, checkpoint, server)


def test_a_server_samples_a_round_but_for_the_weights(tmp_path, monkeypatch, checkpoint, server):
    # What takes a GPU is left out: the server loaded the weights that the first round has.
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", lambda self, metadata, parameters: None)
    trainer = server_trainer(tmp_path, checkpoint, server)
    engine, off = trainer.vllm_generation, []
    generate = engine.generate

    def keep(*args, **kwargs):
        generated = generate(*args, **kwargs)
        off.append(mismatch(trainer.model, generated))
        return generated

    monkeypatch.setattr(engine, "generate", keep)
    trainer.train()
    (step,) = (line for line in trainer.state.log_history if "loss" in line)
    assert len(off) == 1 and off[0] < 1e-4
    assert step["sampling/sampling_logp_difference/max"] == pytest.approx(off[0], abs=1e-5)
    assert len(read_lines(tmp_path / "rollouts" / "000001.jsonl")) == 16


def test_what_vllm_can_only_run_packed_is_refused():
    args = types.SimpleNamespace(use_vllm=True, vllm_mode="colocate")
    by_vllm = layers.dispatch_cpu_unquantized_gemm
    experts, dense = (types.SimpleNamespace(config=config()) for config in (MixtralConfig, LlamaConfig))
    with pytest.raises(ConfigError, match="packs the weights of a mixture of experts"), vllm_on_cpu(args, experts):
        pass
    with pytest.raises(ConfigError, match="packs the weights of Conv1d"), vllm_on_cpu(args, dense):
        layers.dispatch_cpu_unquantized_gemm(torch.nn.Conv1d(2, 2, 2), remove_weight=True)
    assert layers.dispatch_cpu_unquantized_gemm is by_vllm


def run_recipe(folder, name, *flags):
    command = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", "recipes/grpo.py"]
    command += ["--output_dir", str(folder / name), "--evaluate", "false", "--num_cpu_threads", "1", *map(str, flags)]
    # Tests before this one started vLLM in this process, which leaves the address of its group in the environment.
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    return folder / name


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_samples_what_it_would_have_sampled(tmp_path, checkpoint):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rewards.py").write_text(REWARD)
    config = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(tmp_path / "data"),
        "reward_funcs": [f"{tmp_path}/rewards.py:short"],
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
        "logging_steps": 1,
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(config))
    settings = ["--config", tmp_path / "grpo.yaml"]
    whole = run_recipe(tmp_path, "whole", *settings, "--max_steps", 4)
    stopped = run_recipe(tmp_path, "stopped", *settings, "--max_steps", 2)
    run_recipe(tmp_path, "stopped", *settings, "--max_steps", 4, "--resume_from_checkpoint", "true")
    generated = [
        [record["completion"] for file in sorted((run / "rollouts").glob("*.jsonl")) for record in read_lines(file)]
        for run in (whole, stopped)
    ]
    assert len(generated[0]) == 4 * 8 and generated[0] == generated[1]
    ends = [load_file(run / "model.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(ends[0][name], x) for name, x in ends[1].items())


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no SmolLM2 here: make model")
def test_the_extraction_recipe_trains_an_adapter_on_what_vllm_samples(tmp_path):
    flags = ["--config", "recipes/extraction/grpo.yaml", "--use_vllm", "true", "--vllm_mode", "colocate"]
    flags += ["--vllm_max_model_length", 512, "--max_steps", 2, "--per_device_train_batch_size", 8]
    run = run_recipe(tmp_path, "run", *flags, "--max_completion_length", 24, "--save_strategy", "no")
    steps = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert len(steps) == 2
    for step in steps:  # bfloat16 beside float32, in nats a token
        assert 0 < step["sampling/sampling_logp_difference/mean"] < 0.06
        assert step["sampling/sampling_logp_difference/max"] < 0.5
    assert len(read_lines(run / "rollouts" / "000001.jsonl")) == 8
