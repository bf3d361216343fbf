"""A teacher's divergence in the loss: its values, its gradients against listed samples, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model
from tiny_ppo import tiny_ppo
from tiny_task import VOCABULARY, save_model, tiny_tokenizer, tiny_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import COMPLETIONS, PROMPT, exact_logprobs, gradient, groups, mean_gradient, toy_model, toy_trainer
from transformers import CohereConfig, CohereForCausalLM, PreTrainedTokenizerFast

from rlseq.engine.model.load import load_model
from rlseq.errors import ConfigError, ModelError

# -- against the exact quantities of the toy policy -------------------------------------------------------------------

PREFIXES = [(), (0,), (1,)]


def save_toy_teacher(folder):
    teacher = toy_model(seed=1)
    teacher.save_pretrained(folder)
    toy_trainer(folder / "run").processing_class.save_pretrained(folder)
    return teacher


def distillation(tmp_path, **settings):
    teacher = save_toy_teacher(tmp_path / "teacher")
    options = {"objective": "distillation", "teacher_name_or_path": str(tmp_path / "teacher"), **settings}
    return toy_trainer(tmp_path / "run", rewards=(), **options), teacher


def next_logprobs(model, prefix):
    return model(input_ids=torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].log_softmax(-1)


def kl_at(student, teacher, kind):
    """The divergence after each prefix, from whole logits."""
    found = {}
    for prefix in PREFIXES:
        p, q = next_logprobs(student, prefix), next_logprobs(teacher, prefix).detach()
        found[prefix] = (p.exp() * (p - q)).sum() if kind == "reverse_kl" else (q.exp() * (q - p)).sum()
    return found


def prefixes_of(y):
    return [y[:t] for t in range(len(y))]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_the_loss_is_the_mean_divergence_over_sampled_prefixes_held_as_given(tmp_path, monkeypatch, kind):
    trainer, teacher = distillation(tmp_path, teacher_divergence=kind)
    D = kl_at(trainer.model, teacher, kind)
    expected = 0.0
    for group, probability in groups(trainer.model, PROMPT, 2):
        prefixes = [prefix for y in group for prefix in prefixes_of(y)]
        expected = expected + probability * sum(D[prefix] for prefix in prefixes) / len(prefixes)
    found = mean_gradient(trainer, monkeypatch)
    torch.testing.assert_close(found, gradient(expected, trainer.model), rtol=1e-4, atol=1e-6)


def test_the_reward_is_the_gradient_of_the_kl_of_whole_sequences_and_the_loss_is_not(tmp_path, monkeypatch):
    trainer, teacher = distillation(tmp_path, teacher_signal="reward", teacher_coef=2.0)
    log_p, log_q = (exact_logprobs(model, PROMPT) for model in (trainer.model, teacher))
    kl = 2 * sum(log_p[y].exp() * (log_p[y] - log_q[y].detach()) for y in COMPLETIONS)
    exact = gradient(kl, trainer.model)
    torch.testing.assert_close(mean_gradient(trainer, monkeypatch), exact, rtol=1e-4, atol=1e-6)
    # the loss on the same prefixes, summed over a sequence as here, leaves out the sampling term
    D = kl_at(trainer.model, teacher, "reverse_kl")
    held = 2 * sum(log_p[y].exp().detach() * sum(D[prefix] for prefix in prefixes_of(y)) for y in COMPLETIONS)
    assert (gradient(held, trainer.model) - exact).abs().max() > 1e-3


def test_the_reward_is_also_the_gradient_of_the_expected_sum_of_another_divergence(tmp_path, monkeypatch):
    trainer, teacher = distillation(tmp_path, teacher_signal="reward", teacher_divergence="forward_kl")
    log_p, D = exact_logprobs(trainer.model, PROMPT), kl_at(trainer.model, teacher, "forward_kl")
    expected = sum(log_p[y].exp() * sum(D[prefix] for prefix in prefixes_of(y)) for y in COMPLETIONS)
    exact = gradient(expected, trainer.model)
    torch.testing.assert_close(mean_gradient(trainer, monkeypatch), exact, rtol=1e-4, atol=1e-6)


# -- trainers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path):
    save_model(tmp_path / "teacher", seed=5)
    return str(tmp_path / "teacher")


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def plain_divergence(trainer, teacher, temperature=1.0):
    """The mean reverse KL over the trained tokens of the last batch, a whole forward per completion."""
    student, judge = tiny_model("llama", initializer_range=0.1), load_model(teacher)
    total, count = 0.0, 0
    trained = trainer.batch.trained
    for prompt, completion in zip(trained.prompt_ids, trained.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (student, judge))
        p, q = (p / trainer.temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
        total, count = total + (p.exp() * (p - q)).sum().item(), count + len(completion)
    return total / count


@pytest.mark.parametrize("pack_updates", [True, False])
@pytest.mark.parametrize("temperatures", [{}, {"temperature": 0.7, "teacher_temperature": 1.5}])
def test_the_logged_divergence_is_that_of_one_forward_per_completion(tmp_path, teacher, pack_updates, temperatures):
    settings = {"learning_rate": 0.0, "max_steps": 1, "pack_updates": pack_updates, "reference_loss_coef": 0.1}
    trainer = tiny_trainer(tmp_path / "run", teacher_name_or_path=teacher, **settings, **temperatures)
    trainer.train()
    (found,) = logged(trainer, "teacher_divergence")
    expected = plain_divergence(trainer, teacher, temperatures.get("teacher_temperature", 1.0))
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_teacher_alone_needs_no_reward_and_brings_the_student_near(tmp_path, teacher):
    trainer = tiny_trainer(
        tmp_path / "run", rewards=(), objective="distillation", teacher_name_or_path=teacher, max_steps=30
    )
    trainer.train()
    found = logged(trainer, "teacher_divergence")
    assert len(found) == 30 and found[-1] < 0.5 * found[0]
    assert not logged(trainer, "reward")


def test_one_sample_per_prompt_is_enough_for_a_teacher_alone(tmp_path, teacher):
    settings = {"objective": "distillation", "num_generations": 1, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tmp_path / "run", rewards=(), teacher_name_or_path=teacher, **settings)
    trainer.train()
    assert len(logged(trainer, "teacher_divergence")) == 2


def test_the_teacher_is_frozen_in_eval_mode_and_asked_once_a_batch(tmp_path, teacher, monkeypatch):
    trainer = tiny_trainer(
        tmp_path / "run", teacher_name_or_path=teacher, num_iterations=2, max_steps=2, per_device_train_batch_size=16
    )
    before = {name: weight.clone() for name, weight in trainer.teacher.model.state_dict().items()}
    calls = []
    trainer.teacher.model.get_decoder().register_forward_hook(lambda *_: calls.append(None))
    trainer.train()
    assert len(calls) == 1  # both updates are on one batch
    assert not trainer.teacher.model.training
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.teacher.model.state_dict().items())


@pytest.mark.parametrize("teacher_signal", ["loss", "reward"])
def test_an_update_does_not_depend_on_the_micro_batch_split(tmp_path, teacher, teacher_signal):
    settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 1, "teacher_signal": teacher_signal}
    weights = []
    for rows in (16, 4, 2):
        trainer = tiny_trainer(
            tmp_path / str(rows),
            teacher_name_or_path=teacher,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=16 // rows,
            **settings,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_model("llama", initializer_range=0.1).parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    for split in weights[1:]:
        torch.testing.assert_close(split, weights[0], atol=2e-5, rtol=0)


def test_ppo_adds_it_beside_the_reward(tmp_path, teacher):
    trainer = tiny_ppo(tmp_path / "run", teacher_name_or_path=teacher, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "teacher_divergence")) == 2 and logged(trainer, "critic/value_loss")


def test_a_lora_student_shares_its_base_with_the_teacher(tmp_path, teacher):
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), "max_steps": 3}
    shared = tiny_trainer(tmp_path / "a", model=load_model(teacher), teacher_name_or_path=teacher, **lora)
    apart = tiny_trainer(
        tmp_path / "b", model=load_model(teacher), teacher_name_or_path=teacher, teacher_dtype="float32", **lora
    )
    assert shared.teacher.is_shared and not apart.teacher.is_shared
    for trainer in (shared, apart):
        trainer.train()
    found, expected = logged(shared, "teacher_divergence"), logged(apart, "teacher_divergence")
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-6) and found[-1] > 1e-5  # the base itself, then away from it


# -- refusals ----------------------------------------------------------------------------------------------------------


def other_tokenizer(vocabulary=None, **special):
    vocabulary = vocabulary or {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def merging_tokenizer(merges):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3, "<eos>": 4}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), eos_token="<eos>")


def test_another_tokenizer_is_refused_by_name_before_a_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("rlseq.training.teacher.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    moved = {token: i for i, token in enumerate([*VOCABULARY[:5], *reversed(VOCABULARY[5:])])}
    cases = {
        "18 tokens of the vocabulary, such as 'A'": other_tokenizer(moved),
        "the special token eos_token_id 1, not 2": other_tokenizer(eos_token="<bos>"),
    }
    for number, (message, tokenizer) in enumerate(cases.items()):
        save_model(tmp_path / str(number), tokenizer=tokenizer)
        with pytest.raises(ModelError, match=f"has another tokenizer than the model: .*{message}"):
            tiny_trainer(tmp_path / "run", teacher_name_or_path=str(tmp_path / str(number)))


def test_other_merges_are_another_tokenizer():
    from rlseq.training.teacher import tokenizer_differences

    first, second = merging_tokenizer([("a", "b"), ("b", "a")]), merging_tokenizer([("b", "a"), ("a", "b")])
    assert tokenizer_differences(first, second) == ["the merges"]
    assert tokenizer_differences(first, first) == []
    assert tokenizer_differences(tiny_tokenizer(), tiny_tokenizer()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "distillation", "teacher_name_or_path": None}, "distillation needs a teacher"),
        ({"objective": "expected_accuracy"}, "objective expected_accuracy samples none"),
        ({"teacher_coef": 0.0}, "teacher_coef is 0.0; expected a number above 0"),
        ({"teacher_jsd_beta": 0.3}, "no effect without teacher_divergence jsd"),
        ({"teacher_divergence": "jsd", "teacher_jsd_beta": 1.0}, "expected above 0 and below 1"),
        ({"teacher_name_or_path": None, "teacher_signal": "reward"}, "no effect without --teacher_name_or_path"),
        ({"cast_lm_head_to_fp32": True}, "leave out cast_lm_head_to_fp32"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_trainer(tmp_path, **{"teacher_name_or_path": "teacher", **settings})


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no model at"):
        tiny_trainer(tmp_path, teacher_name_or_path=str(tmp_path / "nothing"))


def test_a_teacher_whose_logits_are_scaled_is_refused(tmp_path):
    size = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    CohereForCausalLM(CohereConfig(logit_scale=0.5, **size, **heads)).save_pretrained(tmp_path / "scaled")
    tiny_tokenizer().save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConfigError, match="scales, caps or quantises its logits"):
        tiny_trainer(tmp_path / "run", teacher_name_or_path=str(tmp_path / "scaled"))
