"""Checkpoints that cannot read the data are refused by name before any of them is loaded."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from tiny_shapes import tiny_shape
from tiny_task import ROWS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import RobertaConfig

from rlseq.config.arguments import STUDIES, EvaluationArguments, TrainingEvaluationArguments
from rlseq.errors import DataError, ModelError, RewardError
from rlseq.evaluation.measure import checkpoint
from rlseq.evaluation.run import ContrastSettings, contrast
from rlseq.evaluation.studies import table
from rlseq.scoring import load_rewards

BAD = {
    "too short a context": ({"n_positions": 4}, r"'b' .*\n  context: \d of \d rows may exceed 4 tokens"),
    "too short for a completion": (
        {"n_positions": 9},
        r"may exceed 9 tokens .* completion 7\)\. To do: lower max_new_tok",
    ),
    "fewer rows than tokens": ({"vocab_size": 20}, r"'b' .*\n  vocabulary: 23 tokens, but an embedding of 20 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_cannot_read_the_data_is_refused_before_any_is_loaded(case, tmp_path, monkeypatch):
    changes, message = BAD[case]
    for name, kind in (("a", {}), ("b", changes)):
        tiny_model("gpt2", **kind).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=7, studies=())
    with load_rewards(["exact_match"]) as suite, pytest.raises(ModelError, match=message):
        contrast({"a": tmp_path / "a", "b": tmp_path / "b"}, ROWS, suite, settings=settings, quiet=True)


def test_prompts_that_end_with_the_end_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    end = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = end
    tokenizer.save_pretrained(tmp_path)
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=4, studies=())
    with load_rewards(["exact_match"]) as suite, pytest.raises(ModelError, match=r"BOS: 8 of 8 prompts end with <eos>"):
        contrast({"a": tmp_path}, ROWS, suite, settings=settings, quiet=True)


def saved(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_without_room_for_the_longest_completion_is_refused_before_any_is_loaded(tmp_path, monkeypatch):
    models = {"a": saved(tmp_path / "a", tiny_model("gpt2", n_positions=20))}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=17, studies=())
    said = r"3 of 8 rows may exceed 20 tokens .*lower max_new_tokens to 16"  # a prompt of 4 tokens leaves 16
    with load_rewards(["exact_match"]) as suite, pytest.raises(ModelError, match=said):
        contrast(models, ROWS, suite, settings=settings, quiet=True)


def test_exact_search_of_a_model_with_states_is_refused_before_any_is_loaded(tmp_path, monkeypatch):
    models = {"a": saved(tmp_path / "a", tiny_model()), "b": saved(tmp_path / "b", tiny_shape("mamba2"))}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=4, studies=("map",))
    with load_rewards(["exact_match"]) as suite, pytest.raises(ModelError, match=r"\(mamba2\) keeps states.*Use beam"):
        contrast(models, ROWS, suite, settings=settings, quiet=True)


def test_images_are_refused_before_any_model_is_loaded(tmp_path, monkeypatch):
    models = {"a": saved(tmp_path / "a", tiny_model())}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    rows = [{**ROWS[0], "image": None}, {**ROWS[1], "image": "x.png"}]
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=4, studies=())
    said = r"^row 1: column 'image' holds an image, but rlseq serves only text"
    with load_rewards(["exact_match"]) as suite, pytest.raises(DataError, match=said):
        contrast(models, rows, suite, settings=settings, quiet=True)


def test_encoders_whose_positions_are_counted_otherwise_are_refused_before_they_load(tmp_path):
    RobertaConfig(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = ContrastSettings(strategies=("greedy",), max_new_tokens=4, studies=())
    with (
        load_rewards(["exact_match"]) as suite,
        pytest.raises(ModelError, match="'roberta' count positions from their padding id on"),
    ):
        contrast({"a": tmp_path}, ROWS, suite, settings=settings, quiet=True)


@pytest.mark.parametrize("which", ["rows", "tuning_rows"])
def test_a_reward_that_fails_on_one_row_is_found_before_any_model_is_loaded(which, tmp_path, monkeypatch):
    models = {"a": saved(tmp_path / "a", tiny_model())}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    others = [{**row, "prompt": f"a {row['prompt']}"} for row in ROWS]  # no row is both chosen on and evaluated
    data = {"rows": list(ROWS), "tuning_rows": others}
    data[which][6] = {**data[which][6], "references": []}
    strategies = ("greedy", "sample:temperature=0.5/1.0")
    settings = ContrastSettings(strategies=strategies, max_new_tokens=4, studies=(), tune_split="train")
    said = r"^tried on row 7 of 8, which has nothing in 'references': reward 'exact_match' raised"
    with load_rewards(["exact_match"]) as suite, pytest.raises(RewardError, match=said):
        contrast(models, suite=suite, settings=settings, quiet=True, **data)


def test_default_studies_decode_and_score_nothing_and_all_are_those_there_are():
    assert sorted(STUDIES) == sorted(table.STUDIES)
    assert ContrastSettings.of(EvaluationArguments(studies=["all"])).studies == STUDIES
    default = ContrastSettings.of(EvaluationArguments()).studies
    assert default == ContrastSettings.of(TrainingEvaluationArguments()).studies == ("ranking",)
