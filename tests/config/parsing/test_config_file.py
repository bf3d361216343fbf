"""The file of a run's settings: every one is written, and reading it repeats the run."""

import dataclasses

import pytest
import trl
import yaml
from test_parser import CPU, parse
from transformers.trainer_utils import SchedulerType

from rlseq.config.parsing.config_file import changed_values
from rlseq.config.parsing.parser import RecipeParser, resolved_values, write_config
from rlseq.config.parsing.values import plain


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--generation_batch_size", "32", "--num_generations", "4"],
        ["--steps_per_generation", "2"],
        [
            "--lr_scheduler_type",
            "cosine",
            "--lr_scheduler_kwargs",
            '{"num_cycles": 1}',
            "--learning_rate",
            "1e-6",
        ],
        ["--accelerator_config", '{"split_batches": false}', "--report_to", "none", "--seed", "7"],
        ["--eval_strategy", "steps", "--scale_rewards", "false", "--reward_weights", "1", "0.5"],
        ["--gradient_checkpointing", "false", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
    ],
)
def test_a_written_configuration_repeats_the_run(tmp_path, flags):
    parser = RecipeParser([trl.GRPOConfig, trl.ModelConfig])
    first = parser.parse(["--output_dir", str(tmp_path / "ü run"), *CPU, *flags])
    write_config(tmp_path / "config.yaml", *first)
    again = parser.parse(["--config", str(tmp_path / "config.yaml")])
    for before, after in zip(first, again, strict=True):
        for each in dataclasses.fields(before):
            assert getattr(before, each.name) == getattr(after, each.name), each.name
    assert resolved_values(*first) == resolved_values(*again)


def test_settings_that_are_not_those_on_file_are_told(tmp_path):
    parser = RecipeParser([trl.GRPOConfig, trl.ModelConfig])
    write_config(tmp_path / "config.yaml", *parser.parse([*CPU, "--beta", "0.5"]))
    assert changed_values(tmp_path / "config.yaml", *parser.parse([*CPU, "--beta", "0.5"])) == {}
    other = parser.parse([*CPU, "--learning_rate", "0.25", "--beta", "0.5", "--model_name_or_path", "x"])
    assert changed_values(tmp_path / "config.yaml", *other) == {
        "learning_rate": (1e-06, 0.25),
        "model_name_or_path": (None, "x"),
    }


def test_a_written_configuration_repeats_teacher_forcing(tmp_path):
    parser = RecipeParser([trl.SFTConfig])
    (first,) = parser.parse([*CPU, "--packing", "true", "--optim", "adamw_torch", "--warmup_steps", "0.1"])
    write_config(tmp_path / "config.yaml", first)
    (again,) = parser.parse(["--config", str(tmp_path / "config.yaml")])
    for each in dataclasses.fields(first):
        assert getattr(first, each.name) == getattr(again, each.name), each.name


def test_every_setting_is_written_and_a_flag_still_changes_what_depends_on_it(tmp_path):
    parser = RecipeParser([trl.GRPOConfig])
    (first,) = parser.parse(CPU)
    write_config(tmp_path / "config.yaml", first)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    left_out = {"resume_from_checkpoint", "hub_token"}
    assert set(written) == {each.name for each in dataclasses.fields(first)} - left_out | {"format_version"}
    (longer,) = parser.parse(["--config", str(tmp_path / "config.yaml"), "--gradient_accumulation_steps", "4"])
    assert longer.generation_batch_size == 4 * first.generation_batch_size


def test_what_the_machine_decided_is_written_beside_the_setting(tmp_path):
    (parsed,) = RecipeParser([trl.GRPOConfig]).parse(CPU)
    write_config(tmp_path / "config.yaml", parsed)
    assert "report_to: none  # here: []" in (tmp_path / "config.yaml").read_text().splitlines()


def test_secrets_and_orders_to_one_process_are_not_written(tmp_path):
    flags = [*CPU, "--hub_token", "hf_secret", "--resume_from_checkpoint", "latest"]
    (parsed,) = RecipeParser([trl.GRPOConfig]).parse(flags)
    write_config(tmp_path / "config.yaml", parsed)
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text and "latest" not in text


def test_a_field_changed_after_parsing_is_written_as_changed():
    own = parse("--rows", "3")[0]
    own.rows = 5
    assert resolved_values(own)["rows"] == 5


def test_a_configuration_built_without_the_parser_can_be_read_back(tmp_path):
    built = trl.GRPOConfig(output_dir="x", bf16=False, use_cpu=True, lr_scheduler_type=SchedulerType.COSINE)
    write_config(tmp_path / "config.yaml", built)
    (again,) = RecipeParser([trl.GRPOConfig]).parse(["--config", str(tmp_path / "config.yaml")])
    assert again.generation_batch_size == built.generation_batch_size
    assert again.lr_scheduler_type == SchedulerType.COSINE


def test_a_set_of_a_yaml_file_is_written_as_a_list_in_order():
    assert plain(yaml.safe_load("!!set {b, a}")) == ["a", "b"]
