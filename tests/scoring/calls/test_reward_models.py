"""Reward models: a classifier's logits as a reward."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_rollouts import rollout

from rlseq.errors import RewardError
from rlseq.scoring import load_rewards


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("scorer")
    words = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<unk>", "<eos>", "user", "assistant", "a", "b", "c", "d"])},
            unk_token="<unk>",
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8, num_labels=1, max_position_embeddings=32, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def logit(folder, text):
    """One text alone through the plain model: no batch, no padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = 1
    with torch.no_grad():
        return model(ids).logits[0, 0].item()


def test_a_model_path_is_a_reward_whose_scores_are_the_models_logits(model_folder):
    suite = load_rewards([model_folder])
    assert suite.names == [Path(model_folder).name]
    rollouts = [rollout("b c"), rollout("d d d a b"), rollout("")]
    values = suite.score(rollouts, {"prompt": ["a ", "b ", "c d"]}).values[suite.names[0]]
    expected = [logit(model_folder, text) for text in ("a b c", "b d d d a b", "c d")]
    assert values == pytest.approx(expected, abs=1e-5)
    assert len(set(values)) == 3


def test_reward_model_scores_do_not_depend_on_the_batch_size(model_folder):
    rollouts, prompts = [rollout("b c"), rollout("d d d a b"), rollout("a")], ["a ", "b ", "c "]
    by_size = [
        load_rewards([{"func": "reward_model", "kwargs": {"model": model_folder, "batch_size": size}}])
        .score(rollouts, {"prompt": prompts})
        .totals
        for size in (1, 2, 3)
    ]
    assert by_size[0] == pytest.approx(by_size[1], abs=1e-5)
    assert by_size[0] == pytest.approx(by_size[2], abs=1e-5)


def test_reward_model_uses_the_chat_template_for_chat_data(model_folder):
    suite = load_rewards([model_folder])
    chat = rollout("c d", messages=[{"role": "assistant", "content": "c d"}])
    totals = suite.score([chat], {"prompt": [[{"role": "user", "content": "a b"}]]}).totals
    assert totals == pytest.approx([logit(model_folder, "user a b assistant c d")], abs=1e-5)


def test_reward_model_keeps_the_end_of_a_text_that_is_too_long(model_folder):
    spec = {"func": "reward_model", "kwargs": {"model": model_folder, "max_length": 3}}
    totals = load_rewards([spec]).score([rollout("c d")], {"prompt": ["a a a b "]}).totals
    assert totals == pytest.approx([logit(model_folder, "b c d")], abs=1e-5)


def test_reward_model_heeds_the_limit_that_the_tokenizer_alone_knows(tmp_path, model_folder):
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=8, num_labels=1, max_position_embeddings=10, pad_token_id=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)  # positions start at 2: it can use 8
    AutoTokenizer.from_pretrained(model_folder, model_max_length=8, pad_token="<eos>").save_pretrained(tmp_path)
    totals = load_rewards([str(tmp_path)]).score([rollout("c d " * 8)], {"prompt": ["a "]}).totals
    assert totals == pytest.approx([logit(str(tmp_path), "c d c d c d c d")], abs=1e-5)


def test_reward_model_computes_in_the_dtype_it_is_told(model_folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_folder)("a b c", return_tensors="pt")["input_ids"]
    half = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    half.config.pad_token_id = 1
    with torch.no_grad():
        expected = half(ids).logits[0, 0].item()
    assert expected != pytest.approx(logit(model_folder, "a b c"), abs=1e-7)  # bfloat16 shows
    spec = {"func": "reward_model", "kwargs": {"model": model_folder, "dtype": "bfloat16", "device": "cpu"}}
    assert load_rewards([spec]).score([rollout("b c")], {"prompt": ["a "]}).totals == [expected]


def test_reward_model_gives_the_label_it_is_asked_for_and_names_one_that_is_not_there(tmp_path, model_folder):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=8, num_labels=2, pad_token_id=1, **sizes)).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with torch.no_grad():
        both = model(torch.tensor([[4, 5]])).logits[0].tolist()
    for label in (0, 1):
        suite = load_rewards([{"func": "reward_model", "kwargs": {"model": str(tmp_path), "label": label}}])
        assert suite.score([rollout("b")], {"prompt": ["a "]}).totals == pytest.approx([both[label]], abs=1e-5)
    suite = load_rewards([{"func": "reward_model", "kwargs": {"model": str(tmp_path), "label": 2}}])
    with pytest.raises(RewardError, match=r"label is 2, but .* has 2 labels"):
        suite.score([rollout("b")], {"prompt": ["a "]})


def test_a_model_without_a_trained_head_is_an_error_and_no_random_number(tmp_path, model_folder):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "causal")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "causal")
    with pytest.raises(RewardError, match=r"lacks 1 of the model's weights \(score.weight\), which .* Give a trained"):
        load_rewards([str(tmp_path / "causal")]).score([rollout("a")], {"prompt": ["b "]})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_reward_model_saved_under_wrapped_names_scores_as_its_own(prefix, tmp_path, model_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_folder, tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "model.safetensors"
    save_file({prefix + name: weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    score = load_rewards([str(tmp_path / "wrapped")]).score([rollout("a")], {"prompt": ["b "]})
    assert score.values["wrapped"] == pytest.approx([logit(model_folder, "b a")], abs=1e-5)


# llm_judge
