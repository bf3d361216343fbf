"""A checkpoint to resume from is refused where the run names another model, before anything is touched."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model
from tiny_task import tiny_tokenizer, tiny_trainer

from rlseq.config.training import GRPOConfig, ModelArguments, NewModelArguments, RunArguments
from rlseq.errors import ModelError
from rlseq.training.run.compatibility import check_compatible
from rlseq.training.run.recipe import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    tiny_trainer(path, max_steps=1, save_strategy="steps", save_steps=1, report_to="none").train()
    return path


def model_folder(path, *, family="llama", tokenizer=None, **changes):
    tiny_model(family, **changes).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path


def other_words():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Z"])
    return tokenizer


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 32}, "hidden_size 16, not 32"),
        ({"vocab_size": 40}, "vocab_size 23, not 40"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, not 3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings False, not True"),
        ({"rope_theta": 5e5}, "rope"),
        ({"family": "gpt2"}, "model_type 'llama', not 'gpt2'"),
        ({"tokenizer": other_words()}, r"1 tokens of the vocabulary, such as 'Z' \(id None, not 23\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_what_differs(changes, said, run, tmp_path):
    with pytest.raises(ModelError, match=said):
        check_compatible(run / "checkpoint-1", str(model_folder(tmp_path / "other", **changes)))


def test_how_a_model_was_begun_and_saved_makes_no_other_model_of_it(run, tmp_path):
    other = model_folder(tmp_path / "same", seed=3, initializer_range=0.02, attention_dropout=0.1, use_cache=False)
    check_compatible(run / "checkpoint-1", str(other))


def test_a_whole_model_does_not_go_on_as_an_adapter(run, tmp_path):
    with pytest.raises(ModelError, match=r"a whole model, but the run trains an adapter"):
        check_compatible(run / "checkpoint-1", str(model_folder(tmp_path / "same")), use_peft=True)


def test_opening_a_run_refuses_it_and_drops_nothing_of_the_run(run, tmp_path):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n")
    config = GRPOConfig(output_dir=str(run), resume_from_checkpoint="latest", num_generations=4)
    other = model_folder(tmp_path / "other", hidden_size=32)
    with pytest.raises(ModelError, match="hidden_size"):
        open_run(config, RunArguments(), ModelArguments(model_name_or_path=str(other)))
    new = NewModelArguments(new_model={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 4})
    with pytest.raises(ModelError, match="num_hidden_layers 2, not 4"):
        open_run(config, RunArguments(), new)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 and not (run / "config.yaml").exists()
    same = model_folder(tmp_path / "same")
    directory = open_run(config, RunArguments(), ModelArguments(model_name_or_path=str(same)))
    assert directory.resume_from == run / "checkpoint-1"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    directory.release()
