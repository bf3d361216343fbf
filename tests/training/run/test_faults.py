"""What happens when something fails in a run: each fault is caused for real, as near to its source as can be."""

from __future__ import annotations

import copy
import json
import math
import resource
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_ppo import saved_model, tiny_ppo
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer
from transformers import PrinterCallback, TrainerCallback, TrainerState

from rlseq.config.training import SFTConfig
from rlseq.errors import ConfigError, RlseqError, TrainingError
from rlseq.training.averaging import WeightAverage
from rlseq.training.run.callbacks import MetricsWriter
from rlseq.training.run.checkpoints import find_defect, newest_whole_checkpoint
from rlseq.training.run.launch import run_recipe
from rlseq.training.trl.sft import SFTTrainer


def tiny_sft(path, **settings):
    """An SFT trainer on the rows of tiny_task.py, 4 a step."""
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "no", "use_cpu": True}
    defaults |= {"disable_tqdm": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "output_dir": str(path)}
    data = datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["references"][0]} for r in ROWS])
    args = SFTConfig(**{**defaults, **settings})
    return SFTTrainer(
        model=tiny_model("llama", initializer_range=0.1),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def tiny_grpo(path, **settings):
    return tiny_trainer(path, **{"max_steps": 4, "report_to": "none", **settings})


def ppo(path, **settings):
    return tiny_ppo(path, **{"max_steps": 4, **settings})


def break_at(trainer, module, steps, how):
    """Spoil what a module returns in the updates of these steps (counted from 1): `how` of its output."""

    def hook(_module, _inputs, output):
        updating = torch.is_grad_enabled() and trainer.state.global_step + 1 in steps
        return how(output) if updating else None

    module.register_forward_hook(hook)


class Watch(TrainerCallback):
    """Copies, after each step, of everything that a step moves."""

    def __init__(self, trainer, average=None):
        self.trainer, self.average, self.seen = trainer, average, []

    def on_train_begin(self, *_, **__):
        self.seen = [self.copy()]

    def on_step_end(self, *_, **__):
        self.seen.append(self.copy())

    def copy(self):
        weights = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        averages = {name: p.clone() for name, p in self.average.average.items()} if self.average else {}
        return weights, copy.deepcopy(self.trainer.optimizer.state_dict()["state"]), averages


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def embedding(trainer):
    return trainer.model.get_input_embeddings()


def critic_head(trainer):
    return trainer.critic.value_head


# -- numbers that are not finite


@pytest.mark.parametrize(
    "make, place, how",
    [
        pytest.param(tiny_grpo, embedding, lambda x: x * math.nan, id="GRPO, NaN"),
        pytest.param(tiny_grpo, embedding, lambda x: x / 0, id="GRPO, inf"),
        pytest.param(ppo, embedding, lambda x: x * math.nan, id="PPO, its policy"),
        pytest.param(ppo, critic_head, lambda x: x * math.nan, id="PPO, its critic"),
        pytest.param(ppo, critic_head, lambda x: x * 1e30, id="PPO, a value loss that overflows"),
        pytest.param(tiny_sft, embedding, lambda x: x * math.nan, id="SFT"),
    ],
)
def test_a_step_that_is_not_finite_moves_nothing_and_the_next_one_does(make, place, how, tmp_path, capsys):
    trainer = make(tmp_path)
    trainer.add_callback(MetricsWriter(tmp_path / "metrics.jsonl"))
    trainer.add_callback(average := WeightAverage(trainer, 0.5))
    trainer.add_callback(watch := Watch(trainer, average))
    break_at(trainer, place(trainer), {2}, how)
    trainer.train()
    weights, optimizer, averages = zip(*watch.seen, strict=True)
    for state in (weights, optimizer, averages):
        moved = [not same(before, after) for before, after in pairwise(state)]
        assert moved == [True, False, True, True]
    assert all(p.isfinite().all() for p in weights[-1].values())
    logged = [line for line in lines(tmp_path / "metrics.jsonl") if not line.get("summary")]
    assert [line.get("skipped_steps") for line in logged] == [None, 1, None, None]
    assert [line["loss"] is None for line in logged] == [False, True, False, False]
    (folder,) = (tmp_path / "skipped").iterdir()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning, optimizer step")]
    assert len(said) == 1 and "step 2 was skipped" in said[0] and str(folder) in said[0]


def test_a_step_whose_gradient_overflows_under_a_finite_loss_is_skipped(tmp_path):
    trainer = tiny_grpo(tmp_path, max_steps=5)
    embedding(trainer).weight.register_hook(lambda gradient: gradient * 1e38)  # finite numbers whose squares are not
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(TrainingError, match=r"3 in a row.*--learning_rate"):
        trainer.train()
    assert same(before, trainer.model.state_dict()) and trainer.state.global_step == 2
    assert len(list((tmp_path / "skipped").iterdir())) == 3


def test_the_batch_of_a_skipped_step_is_kept_with_what_it_earned(tmp_path):
    trainer = tiny_grpo(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    break_at(trainer, embedding(trainer), {3}, lambda x: x * math.nan)
    trainer.train()
    folder = tmp_path / "skipped" / "step-000003"
    kept, sampled = lines(folder / "rank-0.jsonl"), lines(tmp_path / "rollouts" / "000003.jsonl")
    assert len(kept) == len(sampled) == 16 and {row["step"] for row in kept} == {3}
    names = ("prompt_key", "prompt", "completion", "values", "total")

    def readable(rows):
        return sorted(
            json.dumps([[row[name] for name in names], round(row["advantage"], 5)], sort_keys=True) for row in rows
        )

    assert readable(kept) == readable(sampled)
    assert [row["micro_batch"] for row in kept] == [0] * 8 + [1] * 8 and kept[0]["loss"] is None
    tensors = load_file(folder / "rank-0.safetensors")
    assert tensors["1.mask"].sum(1).tolist() == [len(row["completion_ids"]) for row in kept[8:]]
    assert all(tuple(row["prompt_ids"]) in {prompt.prompt_ids for prompt in trainer.prompts} for row in kept)
    assert tensors["0.advantages"].tolist() == pytest.approx([row["advantage"] for row in kept[:8]])


def test_the_batch_that_sft_skipped_can_be_read(tmp_path):
    trainer = tiny_sft(tmp_path)
    break_at(trainer, embedding(trainer), {1}, lambda x: x * math.nan)
    trainer.train()
    rows = lines(tmp_path / "skipped" / "step-000001" / "rank-0.jsonl")
    texts = {f"{row['prompt']}{row['references'][0]}".replace(" ", "") for row in ROWS}
    kept = {row["text"].replace(" ", "").replace("<pad>", "").replace("<eos>", "") for row in rows}
    assert len(rows) == 4 and kept < texts


def test_a_run_ends_only_after_skipped_steps_in_a_row(tmp_path):
    trainer = tiny_grpo(tmp_path, max_steps=6, max_skipped_steps=2)
    break_at(trainer, embedding(trainer), {1, 3, 5, 6}, lambda x: x * math.nan)
    with pytest.raises(TrainingError, match=r"step 6 was skipped.*2 in a row"):
        trainer.train()


def test_skipped_steps_are_counted_where_several_steps_are_logged_together(tmp_path):
    trainer = tiny_grpo(tmp_path, max_steps=8, logging_steps=4)
    break_at(trainer, embedding(trainer), {2, 4}, lambda x: x * math.nan)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line.get("skipped_steps") for line in logged] == [2, None]
    assert math.isnan(logged[0]["loss"]) and math.isfinite(logged[1]["loss"])


def test_a_run_may_not_end_at_zero_skipped_steps(tmp_path):
    with pytest.raises(ConfigError, match="max_skipped_steps is 0"):
        tiny_grpo(tmp_path, max_skipped_steps=0)


# -- memory


def too_much(*_):
    torch.empty(2**50)  # a pebibyte: more than addresses reach


def out_of_device_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def exit_of(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_recipe(main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("fail", [too_much, out_of_device_memory])
@pytest.mark.parametrize("phase", ["sampling rollouts", "scoring the rollouts", "the update"])
def test_memory_that_runs_out_ends_with_where_and_what_to_lower(phase, fail, tmp_path, capsys):
    model = saved_model(tmp_path / "start")
    trainer = tiny_trainer(tmp_path / "run", model=model, beta=0.1, report_to="none")
    module = trainer.ref_model if phase.startswith("scoring") else trainer.model
    embeddings = trainer.accelerator.unwrap_model(module).get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: fail() if torch.is_grad_enabled() == (phase == "the update") else None)
    code, said = exit_of(trainer.train, capsys)
    assert code == 1 and said.count("error:") == 1 and "Traceback" not in said
    assert f"out of memory in {phase}" in said
    assert "max_completion_length" in said and "per_device_train_batch_size" in said
    assert ("--num_generations" in said) == (phase == "sampling rollouts")
    assert ("--gradient_checkpointing" in said) == (phase != "sampling rollouts")
    assert ("20.00 GiB" in said) == (fail is out_of_device_memory)


@pytest.mark.parametrize("make, place", [(ppo, critic_head), (tiny_sft, embedding)])
def test_memory_of_critics_and_of_teacher_forcing_too(make, place, tmp_path):
    trainer = make(tmp_path)
    break_at(trainer, place(trainer), {1}, too_much)
    with pytest.raises(TrainingError, match=r"in the update.*--gradient_accumulation_steps \(1\)"):
        trainer.train()


def test_memory_that_runs_out_beside_training_names_the_evaluation(capsys):
    code, said = exit_of(too_much, capsys)
    assert code == 1 and "--eval_batch_size" in said and "--max_kv_gb" in said and "DefaultCPUAllocator" in said


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_recipe(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


# -- disk


@pytest.fixture
def longest_file():
    """Sets a limit to the length of files, as a disk that fills in the middle of one; None: none.

    A test lifts it itself: what pytest reports of it goes to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def checkpointed(path, make=tiny_grpo, **settings):
    trainer = make(
        path, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **settings}
    )
    trainer.remove_callback(PrinterCallback)  # its output is a file, too
    return trainer


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class FillDisk(TrainerCallback):
    """Once checkpoint-1 is saved: from then on, files stay shorter than the one named, as it is there."""

    def __init__(self, limit, name):
        self.limit, self.name, self.saved = limit, name, None

    def on_save(self, args, *_, **__):
        if self.saved is None:
            self.saved = contents(Path(args.output_dir) / "checkpoint-1")
            self.limit(len(self.saved[self.name]) - 1)


@pytest.mark.parametrize("make", [tiny_grpo, ppo, tiny_sft])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_leaves_the_last_checkpoint_and_no_part_of_the_next(name, make, tmp_path, longest_file):
    trainer = checkpointed(tmp_path, make)
    trainer.add_callback(filled := FillDisk(longest_file, name))
    check_that_checkpoint_1_stays(trainer, filled, tmp_path, longest_file)


def test_a_disk_that_fills_in_the_last_file_of_a_checkpoint_too(tmp_path, longest_file, monkeypatch):
    write = TrainerState.save_to_json

    def full(state, path):
        longest_file(100 if state.global_step == 2 else None)
        write(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    trainer = checkpointed(tmp_path)
    trainer.add_callback(filled := FillDisk(lambda _: None, "trainer_state.json"))
    check_that_checkpoint_1_stays(trainer, filled, tmp_path, longest_file)


def check_that_checkpoint_1_stays(trainer, filled, path, limit):
    try:
        with pytest.raises(TrainingError) as failed:
            trainer.train()
    finally:
        limit(None)
    assert str(path / "checkpoint-2") in str(failed.value) and "GB free" in str(failed.value)
    assert [p.name for p in path.iterdir() if "checkpoint" in p.name] == ["checkpoint-1"]
    assert contents(path / "checkpoint-1") == filled.saved
    assert newest_whole_checkpoint(path) == (path / "checkpoint-1", [])


def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_whole(tmp_path, longest_file):
    trainer = checkpointed(tmp_path, max_steps=1)
    trainer.train()
    whole = contents(tmp_path / "checkpoint-1")
    longest_file(4000)
    try:
        with pytest.raises(TrainingError):
            trainer._save_checkpoint(trainer.model, None)
    finally:
        longest_file(None)
    assert contents(tmp_path / "checkpoint-1") == whole and find_defect(tmp_path / "checkpoint-1") is None
    (tmp_path / "checkpoint-1" / "stale").touch()
    trainer._save_checkpoint(trainer.model, None)
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    assert find_defect(tmp_path / "checkpoint-1") is None
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts/000001.partial"])
def test_a_log_that_cannot_be_written_ends_the_run_with_its_path(name, tmp_path, capsys):
    trainer = tiny_grpo(tmp_path)
    trainer.add_callback(MetricsWriter(tmp_path / "metrics.jsonl"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/dev/full")
    code, said = exit_of(trainer.train, capsys)
    assert code == 1 and "No space left on device" in said and "GB free" in said
    assert str(tmp_path / name.replace("partial", "jsonl")) in said and "Traceback" not in said


def test_a_run_directory_that_turns_into_something_else_ends_the_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    trainer = tiny_grpo(tmp_path)
    trainer.add_callback(MetricsWriter(tmp_path / "file" / "metrics.jsonl"))
    code, said = exit_of(trainer.train, capsys)
    assert code == 1 and "file/metrics.jsonl" in said and "--output_dir" in said


def test_every_error_says_what_it_exits_with():
    assert issubclass(TrainingError, RlseqError) and (TrainingError("x").exit_code, RlseqError.exit_code) == (1, 2)
