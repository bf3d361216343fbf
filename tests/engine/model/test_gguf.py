"""GGUF files are models as any others: evaluated, trained, adapted and examined, and saved as plain safetensors."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny_task import tiny_trainer

from rlseq.cli.doctor import examine_model
from rlseq.cli.evaluate import evaluate, parse_models
from rlseq.config.arguments import DataArguments
from rlseq.config.training import ModelArguments
from rlseq.doctor.check import FAILED
from rlseq.engine.model.gguf_files import gguf_file, where_and_how
from rlseq.engine.model.load import load_model, load_tokenizer
from rlseq.errors import ConfigError, ModelError
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.evaluation.settings import ContrastSettings
from rlseq.training import models

pytest.importorskip("gguf", reason="the package that reads and writes GGUF files, of the extra gguf, is absent")
from tiny_gguf import EOS, PAD, write_gguf

ROWS = [{"prompt": prompt, "references": [prompt[::-1]]} for prompt in ("ab", "bcd", "c d")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(file, its weights by transformers' names as the gguf package restores them)."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[97, 98, 99, 100]])).logits


def test_a_model_has_the_weights_of_its_file_and_is_saved_as_plain_safetensors(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, expected = tiny
    model, tokenizer = load_model(file, dtype="float32"), load_tokenizer(file)
    held = model.state_dict()
    assert {name for name in expected if not held[name].equal(expected[name])} == set()
    assert set(held) - set(expected) == {"lm_head.weight"}  # tied: the file has no head
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.pad_token_id) == (EOS, PAD)
    assert again("a db")["input_ids"] == tokenizer("a db")["input_ids"]


def test_a_folder_with_one_file_is_that_file(tiny, tmp_path):
    file, _ = tiny
    assert gguf_file(file.parent) == file
    assert parse_models([str(file), f"folder={file.parent}"]) == {file.name: str(file), "folder": str(file.parent)}
    models.check_model_path(str(file))
    models.check_model_path(str(file.parent))
    assert torch.equal(logits(load_model(file.parent)), logits(load_model(file)))
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(q4.gguf, q8.gguf\): name one of them"):
        models.check_model_path(str(tmp_path))


def test_a_file_of_a_hub_repository_is_named_behind_its_id():
    assert where_and_how("me/small/q4.gguf") == ("me/small", {"gguf_file": "q4.gguf"})
    assert where_and_how("me/small") == ("me/small", {})
    models.check_model_path("me/small/q4.gguf")
    assert parse_models(["a=me/small/q4.gguf"]) == {"a": "me/small/q4.gguf"}
    with pytest.raises(ConfigError, match="there is no model at 'me/small/other'"):
        parse_models(["a=me/small/other"])


def test_without_the_package_the_message_names_the_extra(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"is a GGUF file, which needs gguf: pip install 'rlseq\[gguf\]'"):
        load_tokenizer(tiny[0])


def test_an_evaluation_of_a_file_gives_the_numbers_of_the_model_saved_from_it(tiny, tmp_path):
    file, _ = tiny
    load_model(file).save_pretrained(tmp_path / "plain")
    load_tokenizer(file).save_pretrained(tmp_path / "plain")
    results = evaluate(
        [f"file={file}", f"plain={tmp_path / 'plain'}"],
        DataArguments(dataset_name=str(write_rows(tmp_path)), eval_split="train"),
        ["exact_match"],
        settings=ContrastSettings(strategies=("greedy", "sample"), max_new_tokens=4, resamples=50),
        output_dir=str(tmp_path / "out"),
    )
    of_file, of_plain = (results["models"][name] for name in ("file", "plain"))
    assert of_file["likelihood"]["nll_per_token"]["value"] > 0
    assert {**of_file, "path": None} == {**of_plain, "path": None}


def write_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_trains_and_its_checkpoint_is_a_whole_model(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    file, expected = tiny
    arguments = ModelArguments(model_name_or_path=str(file))
    model, tokenizer = models.load_model(arguments), models.load_tokenizer(str(file))
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer(tmp_path, model=model, tokenizer=tokenizer, rewards=(distinct_letters,), **settings)
    trainer.train()
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert held[name].equal(trainer.model.state_dict()[name])
    assert not held[name].equal(expected[name])


def distinct_letters(completion: str) -> float:
    return float(len(set(completion)))


def test_an_adapter_names_the_file_as_its_base(tiny, tmp_path):
    import peft

    file, _ = tiny
    base = models.load_model(ModelArguments(model_name_or_path=str(file)))
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_checkpoint("tuned", str(tmp_path))), logits(adapted))
    assert not torch.equal(logits(load_checkpoint("base", str(file))), logits(adapted))


def test_the_doctor_examines_a_file(tiny):
    results = {result.check: result for result in examine_model(str(tiny[0]))}
    assert [check for check, result in results.items() if result.status == FAILED] == []
    assert "finite, in 1 gguf file" in results["weights"].found
    assert results["saving"].found == "logits survive, embeddings stay tied"
