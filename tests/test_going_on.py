"""What a run says of its learning rate when it resumes with another schedule, and what it refuses to draw by."""

import json
from types import SimpleNamespace

import pytest

from rlseq.errors import ConfigError
from rlseq.training.config import GRPOConfig
from rlseq.training.recipe import _schedule_change

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
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    warmup = changed.get("warmup_steps", (0, 0))[1]
    config = SimpleNamespace(
        max_steps=20, num_train_epochs=3, warmup_steps=warmup, lr_scheduler_type=kind, lr_scheduler_kwargs=None
    )
    said = _schedule_change(tmp_path, config, changed)
    assert words in said and bool(words) == bool(said)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop_strings": ["\n"]}, "stop strings .* are not served in training"),
        ({"num_beams": 2}, r"num_beams \(generation_kwargs\) cannot be used in training"),
        ({"no_repeat_ngram_size": 2}, r"no_repeat_ngram_size \(generation_kwargs\)"),
    ],
)
@pytest.mark.parametrize("sampler", [True, False])
def test_what_trl_cannot_draw_by_is_refused_without_the_advice_to_let_it(tmp_path, given, words, sampler):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(output_dir=str(tmp_path), generation_kwargs=given, rlseq_sampler=sampler, **BATCH)
