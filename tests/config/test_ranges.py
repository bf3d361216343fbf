"""A setting's range stands at its field: flags, YAML and Python read it there, and each default is declared once."""

from __future__ import annotations

import dataclasses

import pytest

from rlseq.config.arguments import (
    DataArguments,
    EvaluateArguments,
    EvaluationArguments,
    RejectionArguments,
    RewardArguments,
    TrainingEvaluationArguments,
)
from rlseq.config.fields import RANGE
from rlseq.config.training import ModelArguments, PPOConfig, SFTConfig
from rlseq.config.validation.validate import check_ranges
from rlseq.errors import ConfigError
from rlseq.evaluation.settings import ContrastSettings

OUTSIDE = {
    (DataArguments, "train_rows"): (0, "--train_rows is 0; expected at least 1"),
    (RewardArguments, "max_error_rate"): (1.5, "--max_error_rate is 1.5; expected a share, 0 to 1"),
    (RejectionArguments, "temperature"): (float("inf"), "--temperature is inf; expected a finite number above 0"),
    (EvaluateArguments, "max_new_tokens"): (0, "--max_new_tokens is 0; expected at least 1"),
    (TrainingEvaluationArguments, "resamples"): (0, "--resamples is 0; expected at least 1"),
    (ContrastSettings, "eval_batch_size"): (0, "--eval_batch_size is 0; expected at least 1"),
    (ContrastSettings, "max_kv_gb"): (-1.0, "--max_kv_gb is -1.0; expected a number above 0"),
    (ContrastSettings, "likelihood_context"): (1, "--likelihood_context is 1; expected at least 2"),
    (ContrastSettings, "study_rows"): (0, "--study_rows is 0; expected at least 1"),
    (ContrastSettings, "tune_rows"): (-3, "--tune_rows is -3; expected at least 1"),
    (ContrastSettings, "prefix_lengths"): ((2, 0), "--prefix_lengths holds 0; expected each to be at least 1"),
    (PPOConfig, "gamma"): (1.5, "gamma is 1.5; expected 0 to 1"),
    (PPOConfig, "temperature"): (0.0, "temperature is 0.0; expected a finite number above 0"),  # a field of TRL's
}


@pytest.mark.parametrize("case", OUTSIDE, ids=lambda case: f"{case[0].__name__}.{case[1]}")
def test_a_number_outside_its_range_is_refused_by_its_flag(case):
    settings, name = case
    value, message = OUTSIDE[case]
    with pytest.raises(ConfigError) as error:
        check_ranges(settings(**{name: value}))
    assert str(error.value) == message


def test_the_edges_of_a_range_are_inside():
    RewardArguments(max_error_rate=0.0), RewardArguments(max_error_rate=1.0)
    DataArguments(train_rows=1)
    check_ranges(ContrastSettings(max_kv_gb=float("inf"), likelihood_context=2, study_rows=None))


def test_not_a_number_is_in_no_range():
    with pytest.raises(ConfigError, match="--max_error_rate is nan"):
        RewardArguments(max_error_rate=float("nan"))


def test_python_has_the_defaults_and_ranges_of_the_flags():
    flags = {f.name: f for part in (EvaluateArguments, EvaluationArguments) for f in dataclasses.fields(part)}
    others = {"studies": (), "tune_split": None}  # a library measures no study unless told to, and has no splits
    for field in dataclasses.fields(ContrastSettings):
        if field.name == "quantization":  # of training alone, which quantises as it trained
            continue
        flag = flags[field.name]
        default = flag.default if flag.default is not dataclasses.MISSING else tuple(flag.default_factory())
        assert field.default == others.get(field.name, default), field.name
        assert field.metadata.get(RANGE) is flag.metadata.get(RANGE), field.name


def test_the_flags_of_an_evaluation_become_its_settings():
    given = EvaluationArguments(eval_batch_size=7, studies=["none"], temperatures=[0.5])
    settings = ContrastSettings.of(EvaluateArguments(seed=3, max_new_tokens=5), given, max_new_tokens=9)
    assert (settings.seed, settings.eval_batch_size, settings.max_new_tokens) == (3, 7, 9)
    assert (settings.studies, settings.temperatures, settings.strategies) == ((), (0.5,), ("greedy", "sample", "beam"))


def test_a_training_run_calls_the_seed_of_its_evaluation_eval_seed():
    names = [{f.name for f in dataclasses.fields(part)} for part in (TrainingEvaluationArguments, EvaluateArguments)]
    assert [name & {"seed", "eval_seed"} for name in names] == [{"eval_seed"}, {"seed"}]


@pytest.mark.parametrize(
    ("settings", "declared", "name"),
    [
        (ModelArguments, EvaluateArguments, "allow_missing_weights"),
        (SFTConfig, EvaluateArguments, "chat_template_kwargs"),
        (RejectionArguments, RewardArguments, "reward_funcs"),
        (RejectionArguments, RewardArguments, "max_error_rate"),
    ],
)
def test_a_setting_of_two_commands_has_one_default_range_and_form(settings, declared, name):
    one, other = ({f.name: f for f in dataclasses.fields(part)}[name] for part in (settings, declared))
    assert one.default == other.default
    of_its_own = {"help", "needs", "conflicts"}
    assert one.metadata.keys() - of_its_own == other.metadata.keys() - of_its_own
    assert all(one.metadata[key] == other.metadata[key] for key in other.metadata.keys() - of_its_own)
