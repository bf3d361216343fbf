"""What a user of TRL gives has an effect, or is refused in one line; the best checkpoint is the one asked for."""

from types import SimpleNamespace

import pytest
from tiny import tiny_model
from tiny_task import ROWS, tiny_tokenizer

import rlseq
from rlseq.config.training import SFTConfig
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.scoring import load_rewards
from rlseq.scoring.replay import read_rollouts, score_by_step
from rlseq.training.run.best import choose_best_by


def one(completions, **columns):
    return [1.0] * len(completions)


def ten(completions, **columns):
    return [10.0] * len(completions)


def settings(tmp_path, kind=rlseq.GRPOConfig, **more):
    common = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4}
    return kind(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", **common, **more
    )


def trainer_of(tmp_path, rewards=(one, ten), more=None, **given):
    tokenizer = tiny_tokenizer()
    suite = load_rewards(list(rewards))
    prompts = build_prompts(ROWS, tokenizer)
    more = {"processing_class": tokenizer, **(more or {})}
    return rlseq.GRPOTrainer(tiny_model(), suite, settings(tmp_path, **given), prompts, **more)


def test_reward_weights_of_the_settings_weigh_the_rewards(tmp_path):
    trainer = trainer_of(tmp_path, reward_weights=[0.7, 0.3], disable_tqdm=True)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(0.7 * 1 + 0.3 * 10)
    assert trainer.args.reward_weights == [0.7, 0.3]


def test_weights_of_the_suite_are_kept_and_leave_the_settings_alone(tmp_path):
    tokenizer, args = tiny_tokenizer(), settings(tmp_path)
    suite = load_rewards([one, ten], weights=[2.0, 0.5])
    prompts = build_prompts(ROWS, tokenizer)
    trainer = rlseq.GRPOTrainer(tiny_model(), suite, args, prompts, processing_class=tokenizer)
    assert trainer.suite.weights == [2.0, 0.5] and trainer.reward_weights.tolist() == [2.0, 0.5]
    assert args.reward_weights is None  # they serve another trainer with other rewards


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3, 4]])
def test_another_number_of_weights_than_rewards_is_refused(tmp_path, weights):
    with pytest.raises(ConfigError, match=rf"reward_weights has {len(weights)} numbers for 2 rewards \(one, ten\)"):
        trainer_of(tmp_path, reward_weights=weights)


def test_what_a_rollout_func_returns_beside_tokens_reaches_the_rewards(tmp_path):
    def told(completions, env_reward, **columns):
        return list(env_reward)

    def generate(prompts, trainer):
        n = len(prompts)
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[5 + i % 4, 6, 2] for i in range(n)]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[-0.5] * 3] * n,
            "env_reward": [float(i) for i in range(n)],
        }

    more = {"rollout_func": generate, "rollouts_dir": tmp_path / "rollouts"}
    trainer = trainer_of(tmp_path, rewards=(told,), more=more, disable_tqdm=True)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(sum(range(8)) / 8)
    assert score_by_step(trainer.suite, read_rollouts(tmp_path)).totals == [float(i) for i in range(8)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reward_processing_classes": ["tokenizer"]}, "reward_processing_classes is not served: a reward model reads"),
        ({"quantization_config": object()}, "quantization_config is not served: load the model by from_pretrained"),
        ({"environment_factory": object}, "environment_factory is not served: name it in args.environment"),
        ({"eval_dataset": ROWS, "evaluator": print}, "eval_dataset and evaluator both say what evaluate measures"),
    ],
)
def test_arguments_of_trl_without_effect_are_refused_with_what_to_give(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        trainer_of(tmp_path, more=more)


def test_rows_handed_to_evaluate_beside_an_evaluator_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, more={"evaluator": lambda model: {"x": 1.0}})
    assert trainer.evaluate() == {"eval_x": 1.0}
    with pytest.raises(ConfigError, match="leave out eval_dataset"):
        trainer.evaluate(eval_dataset=[{"nonsense": 1}])
    with pytest.raises(ConfigError, match="rollouts are not predicted"):
        trainer.predict(ROWS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_generations_eval": 2}, "num_generations_eval is 2, which has no effect: the evaluator measures"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8, which has no effect: updates are packed, not padded"),
        ({"cache_implementation": "static"}, "no effect without rlseq_sampler false"),
        ({"vllm_gpu_memory_utilization": 0.5}, "no effect without use_vllm"),
        ({"sapo_temperature_neg": 2.0}, "no effect without loss_type sapo"),
        ({"kl_estimator": "k3"}, "no effect without beta above 0"),
        ({"data_seed": 3}, "follows from seed alone"),
        ({"interpolation_weight": 0.1}, "interpolation_weight is 0.1, which has no effect without ema_decay above 0"),
        ({"max_tool_calling_iterations": 3}, "no effect without tools"),
        ({"num_completions_to_print": 3}, "no effect without log_completions"),
        ({"per_device_eval_batch_size": 4}, "per_device_eval_batch_size is 4, which has no effect: the evaluator"),
        ({"eval_steps": 5}, "eval_steps is 5, which has no effect without eval_strategy steps"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "no effect without eval_strategy steps"),
        ({"eval_delay": 2}, "no effect without eval_strategy steps or epoch"),
        ({"objective": "expected_accuracy"}, "num_generations is 4, which has no effect without an objective that"),
        ({"objective": "minimum_risk", "scale_rewards": "none"}, "no effect without objective policy_gradient"),
        (
            {"objective": "minimum_risk", "delta": 2.0, "loss_type": "grpo"},
            "delta is 2.0 and loss_type is grpo, which have no effect without objective policy_gradient. Leave them",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale_rewards": "none"}, "scale_rewards is none, which has no effect: PPO's advantages are against its"),
        ({"scale_rewards": "batch"}, "PPO's advantages are against its critic"),
        ({"per_device_eval_batch_size": 4}, "the evaluator measures"),
    ],
)
def test_settings_that_ppo_does_not_read_are_refused(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, rlseq.PPOConfig, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"per_device_eval_batch_size": 4}, "no effect without eval_strategy steps or epoch"),
        ({"eval_packing": True}, "no effect without eval_strategy steps or epoch"),
        ({"eval_steps": 5}, "no effect without eval_strategy steps"),
        ({"packing_strategy": "wrapped"}, "no effect without packing"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "no effect without loss_type nll"),
        ({"data_seed": 3, "train_sampling_strategy": "group_by_length"}, "without train_sampling_strategy random"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "no effect: the model is loaded by --dtype"),
        ({"dataset_text_field": "words"}, "no effect: examples are prompts and completions"),
        ({"include_for_metrics": ["inputs"]}, "no effect: the recipe computes no metrics"),
    ],
)
def test_settings_that_teacher_forcing_does_not_read_are_refused(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)


def test_settings_with_what_they_need_pass_and_defaults_pass(tmp_path):
    config = settings(tmp_path, loss_type="sapo", sapo_temperature_neg=2.0, beta=0.1, kl_estimator="k3")
    assert config.sapo_temperature_neg == 2.0
    config = settings(tmp_path, eval_strategy="steps", eval_steps=5, eval_delay=2)
    assert (config.eval_steps, config.eval_delay) == (5, 2)
    assert settings(tmp_path, rlseq.PPOConfig).num_generations == 4
    given = {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 4, "eval_packing": True}
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, packing_strategy="wrapped", **given)
    assert (config.eval_steps, config.per_device_eval_batch_size) == (5, 4)


def test_ppo_refuses_the_settings_of_grpo_by_name(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"args is a rlseq\.GRPOConfig; expected an rlseq\.PPOConfig"):
        rlseq.PPOTrainer(tiny_model(), one, settings(tmp_path), build_prompts(ROWS, tokenizer), None, tokenizer)


KNOWN = {"greedy/wer": False, "greedy/right": True, "greedy/length": None}


@pytest.mark.parametrize(
    ("measure", "asked", "higher"),
    [
        ("eval_greedy/wer", None, False),
        ("eval_greedy/wer", True, True),
        ("greedy/right", False, False),
        ("greedy/length", False, False),
        ("greedy/length", True, True),
        (None, None, True),
    ],
)
def test_the_best_checkpoint_goes_by_the_direction_that_was_asked_for(measure, asked, higher):
    given = {"metric_for_best_model": measure, "load_best_model_at_end": False}
    config = SimpleNamespace(**given, asked_direction=asked, greater_is_better=None)
    choose_best_by(config, KNOWN, "greedy/right")
    assert config.greater_is_better is higher


def test_a_measure_without_a_direction_needs_one():
    config = SimpleNamespace(
        metric_for_best_model="greedy/length",
        load_best_model_at_end=False,
        asked_direction=None,
        greater_is_better=True,
    )
    with pytest.raises(ConfigError, match="--greater_is_better true or false"):
        choose_best_by(config, KNOWN, "greedy/right")


TWO_OF_A_NAME = {
    f"{strategy}/{name}": True
    for strategy in ("greedy", "sample")
    for name in ("reward", "reward/acc", "corpus/acc", "reward/length", "length", "reward/own/a")
} | {"nll_per_token": False}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("greedy/reward/acc", "greedy/reward/acc"),
        ("eval_sample/corpus/acc", "sample/corpus/acc"),
        ("greedy/own/a", "greedy/reward/own/a"),
        ("greedy/length", "greedy/length"),  # as it stands there
        ("greedy/reward", "greedy/reward"),
        ("nll_per_token", "nll_per_token"),
    ],
)
def test_the_best_checkpoint_goes_by_a_short_name_that_one_measure_has(given, meant):
    config = SimpleNamespace(metric_for_best_model=given, load_best_model_at_end=False)
    choose_best_by(config, TWO_OF_A_NAME, "greedy/reward")
    assert config.metric_for_best_model == f"eval_{meant}"


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("eval_greedy/acc", ["greedy/reward/acc", "greedy/corpus/acc"]),
        ("acc", ["greedy/reward/acc", "greedy/corpus/acc", "sample/reward/acc", "sample/corpus/acc"]),
        ("own/a", ["greedy/reward/own/a", "sample/reward/own/a"]),
        ("reward/length", ["greedy/reward/length", "sample/reward/length"]),
        ("length", ["greedy/reward/length", "greedy/length", "sample/reward/length", "sample/length"]),
        ("reward", ["greedy/reward", "sample/reward"]),
    ],
)
def test_a_name_that_several_measures_have_is_refused_by_their_whole_names(given, keys):
    config = SimpleNamespace(metric_for_best_model=given, load_best_model_at_end=False)
    with pytest.raises(ConfigError) as error:
        choose_best_by(config, TWO_OF_A_NAME, "greedy/reward")
    name = given.removeprefix("eval_")
    assert str(error.value) == (
        f"metric_for_best_model is {name!r}, which may be {' or '.join(keys)}; write one of these"
    )


def test_the_direction_that_was_asked_for_is_told_from_the_one_transformers_fills_in(tmp_path):
    assert settings(tmp_path, metric_for_best_model="x").asked_direction is None
    assert settings(tmp_path, metric_for_best_model="x", greater_is_better=False).asked_direction is False
