"""What a run says of its learning rate when it resumes with another schedule, and what it refuses to sample by."""

import json
from types import SimpleNamespace

import pytest
from tiny_task import tiny_trainer
from transformers import TrainerCallback

from rlseq.config.training import GRPOConfig
from rlseq.errors import ConfigError
from rlseq.training.run.recipe import _schedule_change

COUNTED = {"num_train_epochs": 4, "lr_scheduler_kwargs": None}
BATCH = {"num_generations": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("linear", {"max_steps": (10, 20)}, "at step 10 from 0 to 0.5 of learning_rate"),  # 1 - 10/10, 1 - 10/20
        ("constant", {"lr_scheduler_type": ("linear", "constant")}, "at step 10 from 0.5 to 1 of"),
        ("linear", {"warmup_steps": (0, 15)}, "at step 10 from 0.5 to 0.6667 of"),  # 10/15 of the warm-up
        ("linear", {"beta": (0.0, 0.1)}, ""),
    ],
)
def test_a_new_schedule_is_named_with_the_jump_of_the_rate(tmp_path, kind, changed, words):
    before = changed.get("max_steps", (20, 20))[0]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 10, "max_steps": before}))
    warmup = changed.get("warmup_steps", (0, 0))[1]
    config = SimpleNamespace(max_steps=20, warmup_steps=warmup, lr_scheduler_type=kind, **COUNTED)
    said = _schedule_change(tmp_path, config, changed, None)
    assert words in said and bool(words) == bool(said)


@pytest.mark.parametrize(
    ("changed", "steps", "words"),
    [
        ({"num_train_epochs": (2, 4)}, 40, "at step 10 from 0.5 to 0.75 of learning_rate"),  # 1 - 10/20, 1 - 10/40
        ({"max_steps": (20, -1)}, 40, "at step 10 from 0.5 to 0.75 of"),
        ({"warmup_steps": (0, 0.5)}, 20, "at step 10 from 0.5 to 1 of"),  # the last of 10 steps of warm-up
        ({"train_rows": (None, 20)}, 40, "at step 10 from 0.5 to 0.75 of"),  # epochs of another length
        ({"num_train_epochs": (2, 4)}, None, "to where step 10 of that is"),
        ({"beta": (0.0, 0.1)}, 20, ""),
        ({"beta": (0.0, 0.1)}, None, ""),
    ],
)
def test_so_is_one_that_is_counted_in_epochs(tmp_path, changed, steps, words):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 10, "max_steps": 20}))
    warmup = changed.get("warmup_steps", (0, 0))[1]
    config = SimpleNamespace(max_steps=-1, warmup_steps=warmup, lr_scheduler_type="linear", **COUNTED)
    said = _schedule_change(tmp_path, config, changed, steps)
    assert words in said and bool(words) == bool(said)


def test_the_first_step_after_resuming_is_made_at_the_rate_of_the_new_schedule(tmp_path):
    settings = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    tiny_trainer(tmp_path, max_steps=2, **settings).train()
    trainer, made = tiny_trainer(tmp_path, max_steps=4, **settings), []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **_):
            made.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Rates())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}
    assert rates == pytest.approx({1: 0.01, 2: 0.005, 3: 0.005, 4: 0.0025})  # 0.01 (1 - n/2), then 0.01 (1 - n/4)
    assert made == pytest.approx([0.005, 0.0025])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop_strings": ["\n"]}, "generation_kwargs sets stop_strings, .*: give --stop_strings"),
        ({"num_beams": 2}, r"num_beams \(generation_kwargs\) cannot be used in training"),
        ({"no_repeat_ngram_size": 2}, r"no_repeat_ngram_size \(generation_kwargs\)"),
    ],
)
@pytest.mark.parametrize("sampler", [True, False])
def test_what_trl_cannot_sample_by_is_refused_without_the_advice_to_let_it(tmp_path, given, words, sampler):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(output_dir=str(tmp_path), generation_kwargs=given, rlseq_sampler=sampler, **BATCH)
