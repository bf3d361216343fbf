"""Adapters of one of a tied pair of embeddings."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import tiny_model
from tiny_task import tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from rlseq.config.training import ModelArguments
from rlseq.doctor.forward import check_adapter
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.training.models import load_model, write_merged

IDS = torch.tensor([[3, 4, 5, 6, 7]])
CHANGED = {
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
    "the head, whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding, whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both, whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(params=CHANGED.values(), ids=CHANGED)
def run(request, tmp_path):
    """An adapter on a model with tied embeddings, with every matrix of it away from its start."""
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **request.param))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "run")
    for name in ("base", "run"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / "run", logits(adapted)


def test_a_merged_adapter_of_tied_embeddings_gives_what_the_adapter_gives(run):
    folder, expected = run
    merged = write_merged(folder, ModelArguments(model_name_or_path=str(folder)))
    assert not torch.allclose(logits(load_checkpoint("base", str(folder.parent / "base"))), expected, atol=0.1)
    for model in (
        load_checkpoint("run", str(folder)),
        load_checkpoint("merged", str(merged)),
        AutoModelForCausalLM.from_pretrained(merged),
    ):
        assert torch.allclose(logits(model), expected, atol=1e-4)


def first_kl(model, folder):
    trainer = tiny_trainer(folder, model=model, beta=0.5, max_steps=1)
    trainer.train()
    return next(line["kl"] for line in trainer.state.log_history if "kl" in line)


TRAINED = [name for name in CHANGED if name != "LoRA of the head"]  # TRL trains none of the head


@pytest.mark.parametrize("run", [CHANGED[name] for name in TRAINED], ids=TRAINED, indirect=True)
def test_the_kl_to_an_adapter_of_tied_embeddings_begins_at_0(run, tmp_path):
    folder, _ = run
    model = load_model(ModelArguments(model_name_or_path=str(folder)))
    assert first_kl(model, tmp_path / "again") == pytest.approx(0, abs=1e-6)


def test_the_doctor_copies_all_of_an_adapter(run):
    model = load_model(ModelArguments(model_name_or_path=str(run[0])))
    assert check_adapter(model).status == "ok"
