"""A script of TRL's runs with its import changed: arguments, defaults, rewards and rows are TRL's."""

import inspect

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from tiny import tiny_config, tiny_model
from tiny_chat import chat_model, chat_tokenizer
from tiny_task import ROWS, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

import rlseq
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError, RlseqError

SIZES = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, "max_steps": 1}
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def settings_of_trl(path, **more):
    return trl.GRPOConfig(output_dir=str(path), use_cpu=True, bf16=False, **{**SIZES, **QUIET, **more})


def dataset():
    return Dataset.from_list([{"prompt": row["prompt"], "answer": row["references"][0]} for row in ROWS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk, as a script names it."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", initializer_range=0.1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def test_the_arguments_are_trl_s_in_trl_s_order():
    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    for ours in (rlseq.GRPOTrainer, rlseq.PPOTrainer):
        parameters = inspect.signature(ours.__init__).parameters
        assert list(parameters)[: len(theirs)] == theirs
        own = [p for name, p in parameters.items() if name not in theirs]
        assert [p.name for p in own] == ["rollouts_dir", "evaluator"] and all(p.kind is p.KEYWORD_ONLY for p in own)


def test_a_script_of_trl_trains_with_its_import_changed(tmp_path, folder):
    seen = []

    def shares_letters(prompts, completions, completion_ids, answer, trainer_state, log_metric, **columns):
        assert set(columns) >= {"log_extra"} and len(prompts) == len(completion_ids) == len(answer) == 8
        seen.extend(zip(prompts, answer, strict=True))
        log_metric("mine", 7.0)
        wanted = [set(text.split()) for text in answer]
        return [float(len(w & set(text.split()))) for w, text in zip(wanted, completions, strict=True)]

    def short(completions, **kwargs):
        return [-float(len(text.split())) for text in completions]

    trainer = rlseq.GRPOTrainer(
        model=folder,
        reward_funcs=[shares_letters, short],
        args=settings_of_trl(tmp_path / "run", reward_weights=[1.0, 0.5]),
        train_dataset=dataset(),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(
        logged["rewards/shares_letters/mean"] + 0.5 * logged["rewards/short/mean"], abs=1e-6
    )
    assert logged["mine"] == 7.0
    assert set(seen) <= {(row["prompt"], row["references"][0]) for row in ROWS} and len(seen) == 8
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_settings_of_trl_keep_trl_s_values_and_rlseq_s_own_are_at_their_defaults(tmp_path, folder):
    args = settings_of_trl(tmp_path)
    given = dict(vars(args))
    trainer = rlseq.GRPOTrainer(folder, "constant", args, dataset())
    kept = {name: getattr(trainer.args, name) for name in given}
    assert kept == given and not trainer.args.disable_dropout and trainer.args.gradient_checkpointing
    assert vars(args) == given and type(args) is trl.GRPOConfig  # the script's own object is left alone
    assert trainer.args.objective == "policy_gradient" and trainer.args.pack_updates
    assert trainer.args.max_skipped_steps == rlseq.GRPOConfig(output_dir=str(tmp_path)).max_skipped_steps


def test_no_settings_are_the_defaults_of_rlseq(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = rlseq.GRPOTrainer(folder, "constant", train_dataset=dataset())
    assert type(trainer.args) is rlseq.GRPOConfig and trainer.args.output_dir == "runs/run"


def test_the_dtype_of_model_init_kwargs_is_the_loaded_model_s(tmp_path, folder):
    for given in ("bfloat16", torch.bfloat16):
        args = settings_of_trl(tmp_path, model_init_kwargs={"dtype": given})
        assert rlseq.GRPOTrainer(folder, "constant", args, dataset()).model.dtype == torch.bfloat16
    assert rlseq.GRPOTrainer(folder, "constant", settings_of_trl(tmp_path), dataset()).model.dtype == torch.float32


def test_conversational_rows_reach_rewards_as_trl_hands_them_over(tmp_path):
    tokenizer = chat_tokenizer()
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], "word": "x"},
        {"prompt": [{"role": "user", "content": "ho"}], "word": "y"},
    ]
    calls = []

    def judge(prompts, completions, word, **columns):
        calls.append((prompts, completions, word))
        return [float(len(completion[0]["content"])) for completion in completions]

    args = settings_of_trl(tmp_path, shuffle_dataset=False)
    trainer = rlseq.GRPOTrainer(chat_model(tokenizer), judge, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    ((prompts, completions, word),) = calls
    assert [prompts[0], prompts[4]] == [row["prompt"] for row in rows] and [word[0], word[4]] == ["x", "y"]
    assert all([message["role"] for message in completion] == ["assistant"] for completion in completions)


def test_eval_rows_are_measured_greedy_and_sampled(tmp_path, folder):
    def length(completions, answer, **columns):
        return [float(len(text.split())) for text in completions]

    args = settings_of_trl(
        tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, num_generations_eval=2
    )
    trainer = rlseq.GRPOTrainer(folder, length, args, dataset(), eval_dataset=dataset().select(range(3)))
    trainer.train()
    (found,) = [line for line in trainer.state.log_history if "eval_greedy/reward" in line]
    assert {"eval_sample/reward", "eval_greedy/length", "eval_sample/reward/length"} <= found.keys()
    assert trainer.evaluator.settings.samples_per_row == 2 and len(trainer.evaluator.prompts) == 3
    assert trainer.evaluate()["eval_greedy/reward"] == found["eval_greedy/reward"]  # no step since


def test_the_best_checkpoint_of_a_script_goes_by_the_sampled_reward(tmp_path, folder):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    args = settings_of_trl(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **best)
    trainer = rlseq.GRPOTrainer(folder, "constant", args, dataset(), eval_dataset=dataset())
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_sample/reward", True)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_rewards_may_be_named_and_loaded_models(tmp_path, folder):
    judge = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).eval()
    judge.save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    (tmp_path / "mine.py").write_text("def brief(completion):\n    return -float(len(completion))\n")
    rewards = [
        loaded,
        str(tmp_path / "judge"),
        f"{tmp_path}/mine.py:brief",
        "constant",
        rlseq.load_rewards(["constant"]),
    ]
    trainer = rlseq.GRPOTrainer(folder, rewards[:-1], settings_of_trl(tmp_path / "run"), dataset())
    assert trainer.suite.names == ["judge", "judge-2", "brief", "constant"]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/judge/mean"] == pytest.approx(logged["rewards/judge-2/mean"], rel=1e-5)
    assert logged["rewards/judge/std"] > 0
    suite = rlseq.load_rewards(["constant"])
    assert rlseq.GRPOTrainer(folder, suite, settings_of_trl(tmp_path / "b"), dataset()).suite is suite


def test_ppo_takes_the_same_arguments(tmp_path, folder):
    def length(completions, **columns):
        return [float(len(text.split())) for text in completions]

    sizes = {**SIZES, "num_generations": 1}
    args = rlseq.PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **sizes, **QUIET)
    trainer = rlseq.PPOTrainer(model=folder, reward_funcs=length, args=args, train_dataset=dataset())
    trainer.train()
    assert "critic/value_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": 7}, "model is 7; expected a path, a hub id or a loaded model"),
        ({"model": "./nowhere"}, "there is no model at './nowhere'"),
        ({"reward_funcs": None}, "reward_funcs is missing; expected a function"),
        ({"reward_funcs": "constnt"}, "no reward is called 'constnt'. Did you mean"),
        ({"args": trl.SFTConfig}, "args is a trl.SFTConfig; expected an rlseq.GRPOConfig or a trl.GRPOConfig"),
        ({"args": {"trust_remote_code": True}}, "trust_remote_code is not served"),
        ({"args": {"top_k": 5}}, "top_k cannot be used in training"),
        (
            {"args": {"model_init_kwargs": {"use_cache": False}}},
            "model_init_kwargs has use_cache; rlseq's",
        ),
        ({"train_dataset": None}, "train_dataset is missing; expected a datasets.Dataset"),
        ({"train_dataset": [{"prompt": "a"}]}, "train_dataset is a list; expected a datasets.Dataset"),
        (
            {"train_dataset": IterableDataset.from_generator(lambda: iter(()))},
            "is a datasets.IterableDataset; expected",
        ),
        ({"train_dataset": Dataset.from_list([{"question": "a"}])}, "the data has no column 'prompt'"),
        ({"eval_dataset": {"a": dataset()}}, "eval_dataset is a dict of a; name the rows yourself"),
        ({"processing_class": 3}, "processing_class is a int; expected the model's tokenizer"),
        ({"model": "module"}, "processing_class is missing, and the model was loaded from no folder"),
        ({"model": "module", "args": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "the model is loaded already, and"),
        ({"args": {"metric_for_best_model": "eval_nll"}, "eval_dataset": dataset()}, "'nll', which is not measured"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_is_not_served_is_refused_in_one_line(tmp_path, folder, given, words):
    args = given.get("args", {})
    given = {"model": folder, "reward_funcs": "constant", "train_dataset": dataset(), **given}
    if given["model"] == "module":
        given["model"] = tiny_model()
    given["args"] = settings_of_trl(tmp_path, **args) if isinstance(args, dict) else args(bf16=False, use_cpu=True)
    with pytest.raises(RlseqError) as error:
        rlseq.GRPOTrainer(**given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_ppo_has_settings_of_its_own(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"args is a trl\.GRPOConfig; expected an rlseq\.PPOConfig, which takes the"):
        rlseq.PPOTrainer(folder, "constant", settings_of_trl(tmp_path), dataset())


def test_prompts_and_a_dataset_of_the_same_rows_train_the_same(tmp_path, folder):
    rows = dataset()
    tokenizer = tiny_tokenizer()

    def length(completions, **columns):
        return [float(len(text.split())) for text in completions]

    weights = []
    for name, given in {"rows": rows, "prompts": build_prompts(rows, tokenizer)}.items():
        trainer = rlseq.GRPOTrainer(folder, length, settings_of_trl(tmp_path / name), given)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
