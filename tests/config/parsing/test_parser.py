"""Settings: what is taken, what is refused, and how it is said."""

import itertools
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import trl

from rlseq.config.parsing.parser import RecipeParser, resolved_values, working_batch_sizes
from rlseq.config.training import (
    DataArguments,
    GRPOConfig,
    ModelArguments,
    PPOConfig,
    RejectionArguments,
    RewardArguments,
    RunArguments,
    SFTConfig,
    TrainingEvaluationArguments,
)
from rlseq.errors import ConfigError, RewardError
from rlseq.training.run.launch import run_recipe

CPU = ["--bf16", "false", "--use_cpu", "true"]


@dataclass
class Own:
    """A recipe's own settings."""

    _argument_group_name = "own (rlseq)"

    dataset_name: str
    rows: int | None = None
    rewards: list[str | dict[str, Any]] | None = None
    model: dict | str | None = None
    colour: Literal["red", "green"] = "red"
    keep: bool = True
    folder: Path = Path("here")
    share: float = field(default=0.5, metadata={"help": "A share."})


def parse(*flags, types=(Own,)):
    return RecipeParser(types).parse(["--dataset_name", "d", *flags] if Own in types else list(flags))


def refusal(*flags, types=(Own,)):
    with pytest.raises(ConfigError) as caught:
        parse(*flags, types=types)
    assert "\n" not in str(caught.value) and "usage" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


# Flags


def test_an_unknown_flag_names_the_nearest():
    message = refusal("--colur", "red")
    assert "--colur" in message and "'--colour'" in message


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning-rat", "--learning_rat=1e-4"])
def test_an_abbreviation_is_refused(flag):
    flags = [flag, *([] if "=" in flag else ["1e-4"]), *CPU]
    assert "'--learning_rate'" in refusal(*flags, types=(trl.GRPOConfig,))


def test_a_hyphenated_flag_is_the_same_flag():
    assert parse("--dataset-name", "other")[0].dataset_name == "other"


def test_the_last_of_two_equal_flags_wins():
    assert parse("--rows", "1", "--rows", "2")[0].rows == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "x"], ["--rows", "int", "'x'"]),
        (["--rows"], ["--rows", "expected one argument"]),
        (["--colour", "gren"], ["--colour", "'gren'", "'green'"]),
        (["--keep", "perhaps"], ["--keep", "perhaps"]),
        (["--model", "{a: 1}"], ["--model", "JSON"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_a_bad_flag_says_what_was_given_and_expected(flags, words):
    message = refusal(*flags)
    assert all(word in message for word in words), message


def test_flags_reach_every_kind_of_field():
    own = parse(
        *[
            "--rows",
            "3",
            "--rewards",
            "a",
            "b",
            "--colour",
            "green",
            "--no_keep",
            "--folder",
            "there",
            "--share",
            "1e-1",
        ]
    )[0]
    assert own == Own("d", 3, ["a", "b"], None, "green", False, Path("there"), 0.1)
    assert parse("--rows", "none")[0].rows is None
    assert parse("--model", '{"hidden_size": 8}')[0].model == {"hidden_size": 8}
    assert parse("--model", "some/path")[0].model == "some/path"


def test_a_required_setting_may_come_from_the_file_and_is_asked_for_otherwise(config):
    with pytest.raises(ConfigError, match="--dataset_name"):
        RecipeParser([Own]).parse([])
    assert RecipeParser([Own]).parse(["--config", config("dataset_name: d")])[0].dataset_name == "d"


def test_the_hidden_args_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "recipe.args").write_text("--rows 5")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipe.py"), "--dataset_name", "d"])
    assert RecipeParser([Own]).parse()[0].rows is None


# YAML


def test_both_spellings_of_config_are_read_and_flags_override(config):
    path = config("rows: 3\nshare: 0.25")
    for spelling in (["--config", path], [f"--config={path}"]):
        own = parse(*spelling, "--rows", "4")[0]
        assert (own.rows, own.share) == (4, 0.25)


OVERRIDDEN = [
    (
        GRPOConfig,
        "eval_strategy: steps\neval_steps: 5\neval_delay: 2",
        "--eval_strategy no",
        {"eval_steps", "eval_delay"},
    ),
    (GRPOConfig, "loss_type: sapo\nsapo_temperature_neg: 2.0", "--loss_type dapo", {"sapo_temperature_neg"}),
    (GRPOConfig, "beta: 0.1\nkl_estimator: k3\nsync_ref_model: true", "--beta 0", {"kl_estimator", "sync_ref_model"}),
    (PPOConfig, "critic: shared\ncritic_trunk_gradient: true", "--critic separate", {"critic_trunk_gradient"}),
    (
        SFTConfig,
        "eval_strategy: epoch\nper_device_eval_batch_size: 4",
        "--eval_strategy no",
        {"per_device_eval_batch_size"},
    ),
]


@pytest.mark.parametrize(("settings", "text", "flags", "left_out"), OVERRIDDEN)
def test_what_a_flag_leaves_without_effect_in_the_file_is_left_out(config, settings, text, flags, left_out):
    path, (flag, value) = config(text), flags.split()
    (parsed,) = parse("--config", path, *CPU, flag, value, types=(settings,))
    default = settings(bf16=False, use_cpu=True)
    for name in left_out:
        assert getattr(parsed, name) == getattr(default, name)
        assert resolved_values(parsed)[name] == resolved_values(default)[name]
    (kept,) = parse("--config", path, *CPU, types=(settings,))
    assert all(getattr(kept, name) != getattr(default, name) for name in left_out)


@pytest.mark.parametrize("settings", [GRPOConfig, PPOConfig, SFTConfig])
def test_what_never_had_an_effect_is_refused_wherever_it_stands(config, settings):
    said = "eval_steps is 5.0, which has no effect without eval_strategy steps"
    in_file, strategy = config("eval_steps: 5"), ["--eval_strategy", "no"]
    assert said in refusal("--config", in_file, *CPU, types=(settings,))
    assert said in refusal("--config", in_file, *strategy, *CPU, types=(settings,))
    assert said in refusal("--eval_steps", "5", *strategy, *CPU, types=(settings,))
    evaluating = config("eval_strategy: steps\neval_steps: 10")
    assert said in refusal("--config", evaluating, "--eval_steps", "5", *strategy, *CPU, types=(settings,))


def test_the_default_config_is_read_only_when_no_other_is_named(config, tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("dataset_name: d\nrows: 1\nshare: 0.1")
    parser = RecipeParser([Own])
    assert parser.parse([], default_config=default)[0].rows == 1
    own = parser.parse(["--config", config("dataset_name: e\nrows: 2")], default_config=default)[0]
    assert (own.rows, own.share) == (2, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("row: 3", ["line 1", "'row'", "'rows'"]),
        ("dataset-name: d", ["'dataset-name'", "'dataset_name'"]),
        ("share: 0.5\nrows: 2.5", ["line 2", "rows", "2.5", "whole number"]),
        ("rows: '3'", ["rows", "'3'", "whole number"]),
        ("rows: true", ["rows", "True", "whole number"]),
        ("keep: 1", ["keep", "1", "true or false"]),
        ("share: a half", ["share", "'a half'", "number"]),
        ("dataset_name: 12", ["dataset_name", "12", "text", "quotes"]),
        ("dataset_name: ~", ["dataset_name", "None", "text"]),
        ("rewards: [[a]]", ["rewards", "list"]),
        ("colour: gren", ["'gren'", "'green'"]),
        ("env:\n  SECRET: 1", ["'env'", "environment"]),
        ("rows: [1", ["line", "not valid YAML"]),
        ("a: b: c", ["line 1", "not valid YAML"]),
        ("rows: 1\nshare: 0.1\nrows: 2", ["line 3", "twice", "line 1"]),
        ("- rows", ["name: value", "list"]),
        ("", ["name: value", "nothing"]),
        ("1: 2", ["key 1"]),
    ],
)
def test_a_bad_file_names_line_key_value_and_what_was_expected(config, text, words):
    message = refusal("--config", config(text))
    assert all(word in message for word in words), message


def test_a_missing_file_is_named_with_its_neighbour(config):
    path = config("rows: 1")
    assert "'run.yaml'" in refusal("--config", path.replace("run.yaml", "runs.yaml"))


def test_a_directory_is_not_a_config_file(tmp_path):
    assert "Cannot read" in refusal("--config", str(tmp_path))


def test_a_refusal_by_the_dataclass_keeps_its_message():
    message = refusal("--output_dir", "x", "--logging_steps", "0", *CPU, types=(trl.GRPOConfig,))
    assert "non-zero --logging_steps" in message


def test_an_error_of_rlseq_in_the_dataclass_passes_through():
    @dataclass
    class Refusing:
        def __post_init__(self):
            raise RewardError("mine")

    with pytest.raises(RewardError, match=r"^mine$"):
        RecipeParser([Refusing]).parse([])


def test_batches_that_do_not_divide_come_with_sizes_that_do():
    # 8 completions a generation and groups of 6: 6 and 12 completions hold whole groups, 4 and 8 divide 8.
    message = refusal("--num_generations", "6", *CPU, types=(trl.GRPOConfig,))
    assert "--per_device_train_batch_size 6 or 12" in message and "--num_generations 4 or 8" in message


def test_the_evaluation_of_rollouts_has_no_batch_that_must_divide():
    flags = ["--eval_strategy", "steps", "--num_generations", "6", "--per_device_train_batch_size", "6", *CPU]
    (config,) = RecipeParser([GRPOConfig]).parse(flags)
    assert config.per_device_eval_batch_size == 8


def divides(batch, generations, processes, steps, total):
    """GRPO's rule, as its documentation words it."""
    world = batch * processes
    rollouts = world * steps if total is None else total
    return generations >= 2 and rollouts % generations == 0 and rollouts % world == 0


def test_working_batch_sizes_are_the_nearest_that_divide():
    names = ["per_device_train_batch_size", "num_generations", "generation_batch_size"]
    sizes = itertools.product(range(1, 7), range(2, 8), (1, 2, 3), (1, 2), (None, 6, 20))
    checked = 0
    for batch, generations, processes, steps, total in sizes:
        given = dict(zip(names, (batch, generations, total), strict=True))
        answers = working_batch_sizes(**given, processes=processes, steps_per_generation=steps)
        if divides(batch, generations, processes, steps, total):
            assert answers == {}
            continue
        for name in names if total else names[:2]:

            def fits(size, name=name, given=given, processes=processes, steps=steps):
                changed = {**given, name: size}
                return divides(*(changed[n] for n in names[:2]), processes, steps, changed[names[2]])

            working = [size for size in range(1, 400) if fits(size)]
            below = [size for size in working if size < given[name]][-1:]
            above = [size for size in working if size > given[name]][:1]
            assert answers.get(name, []) == below + above, (given, processes, steps, name)
            checked += 1
    assert checked > 500


# Help and running


def test_help_puts_the_recipes_own_settings_first():
    text = RecipeParser([trl.GRPOConfig, Own]).format_help()
    titles = ["own (rlseq):", "GRPOConfig (trl):", "TrainingArguments (transformers):"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert "--share FLOAT" in text and "A share. (default: 0.5)" in text
    assert "--dataset-name" not in text and "--no_keep" not in text
    assert text.index("--num_generations INT") < places[2] < text.index("--weight_decay FLOAT")


def test_settings_that_cannot_work_end_with_the_message_alone_and_exit_2(capsys):
    def main():
        raise ConfigError("no such thing")

    with pytest.raises(SystemExit) as exit:
        run_recipe(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_only_the_first_process_of_a_launch_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def main():
        raise ConfigError("no such thing")

    with pytest.raises(SystemExit) as exit:
        run_recipe(main)
    assert exit.value.code == 2 and capsys.readouterr().err == ""


def test_a_recipe_ends_with_its_code_and_a_bug_keeps_its_traceback():
    for returned, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as exit:
            run_recipe(lambda returned=returned: returned)
        assert exit.value.code == code
    with pytest.raises(ZeroDivisionError):
        run_recipe(lambda: 1 // 0)


def test_a_recipe_process_prints_no_traceback_and_no_usage(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from rlseq.config.parsing.parser import RecipeParser\nfrom rlseq.training.run.launch import run_recipe\n"
        "@dataclass\nclass Settings:\n    rows: int = 1\n"
        "run_recipe(lambda: print(RecipeParser([Settings]).parse()))\n"
    )
    ended = subprocess.run([sys.executable, str(script), "--row", "1"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: Unknown flag --row. Did you mean '--rows'?\n"


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (DataArguments, {"train_rows": -1}, "--train_rows is -1; expected at least 1"),
        (DataArguments, {"eval_rows": 0}, "--eval_rows is 0"),
        (TrainingEvaluationArguments, {"eval_rows_during_training": -5}, "--eval_rows_during_training is -5"),
        (RunArguments, {"num_cpu_threads": 0}, "--num_cpu_threads is 0"),
        (RewardArguments, {"max_error_rate": 5}, "--max_error_rate is 5; expected a share, 0 to 1"),
        (RejectionArguments, {"max_error_rate": -1}, "--max_error_rate is -1"),
        (GRPOConfig, {"temperature": float("inf")}, "temperature is inf; expected a finite number"),
        (GRPOConfig, {"num_generations": None}, "num_generations is null"),
        (GRPOConfig, {"max_steps": 0}, "max_steps is 0; expected at least 1, or -1"),
        (SFTConfig, {"num_train_epochs": 0}, "num_train_epochs is 0; expected a number above 0"),
        (SFTConfig, {"max_length": -5}, "max_length is -5; expected at least 1"),
        (SFTConfig, {"save_total_limit": -1}, "save_total_limit is -1; expected at least 1"),
        (ModelArguments, {"use_peft": True, "lora_r": 0}, "--lora_r is 0; expected at least 1"),
        (
            ModelArguments,
            {"use_peft": True, "lora_dropout": 2.0},
            "--lora_dropout is 2.0; expected a number",
        ),
    ],
)
def test_numbers_that_would_be_taken_for_something_else_are_refused(settings, values, message):
    with pytest.raises(ConfigError, match=message):
        settings(**values)


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "https://hunter2@host/v1", "https://host/v1?key=hunter2"])
def test_a_password_in_a_url_is_refused_before_any_file_is_written(url):
    spec = f'{{"func": "llm_judge", "kwargs": {{"base_url": "{url}", "model": "m"}}}}'
    with pytest.raises(ConfigError, match="--reward_funcs holds a password or key") as refused:
        RecipeParser([RewardArguments]).parse(["--reward_funcs", spec])
    assert "hunter2" not in str(refused.value)
