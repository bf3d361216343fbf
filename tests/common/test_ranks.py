"""An exception of any kind on one of two processes (gloo) ends both, with what it was, wherever it is raised."""

from __future__ import annotations

import operator
import os
import time

import pytest
import torch
from forks import end_of_ranks
from tiny import tiny_model
from tiny_task import ROWS, shares_letters, tiny_tokenizer, tiny_trainer
from transformers import TrainerCallback

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.prompts import build_prompts
from rlseq.errors import RewardError, RlseqError, TrainingError
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.evaluation.measure import checkpoint as measuring
from rlseq.evaluation.measure.checkpoint import measure
from rlseq.evaluation.results import folder
from rlseq.evaluation.run import contrast
from rlseq.evaluation.settings import ContrastSettings
from rlseq.evaluation.studies.table import STUDIES
from rlseq.scoring import load_rewards
from rlseq.training.run.launch import run_recipe
from rlseq.training.selection.rejection import sample_candidates
from rlseq.training.trl.batch import rollouts

SECONDS = 60  # far less than a collective waits (30 minutes)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory left on purpose")


def key_error(*_, **__):
    raise KeyError("lost on purpose")


def prompts():
    return build_prompts(ROWS, tiny_tokenizer())


def trained(folder, spoil, **settings):
    """A run of two steps in which `spoil` does something to the trainer of one process."""

    def act():
        options = {"per_device_train_batch_size": 8, "max_steps": 2, "report_to": "none", **settings}
        trainer = tiny_trainer(folder, **options)
        spoil(trainer)
        trainer.train()

    return act


def in_sampling(folder):
    return trained(folder, lambda _: _on_one_rank(rollouts, "sample", out_of_memory))


def in_scoring(folder):
    return trained(folder, lambda trainer: _on_one_rank(trainer.suite, "_table", key_error))


def in_the_loss(folder):
    return trained(folder, lambda trainer: _on_one_rank(trainer, "micro_batch_loss", key_error))


def in_the_update_where_gradients_are_exchanged(folder):
    def spoil(trainer):
        if _chosen():
            first = next(p for p in trainer.model.parameters() if p.requires_grad)
            first.register_hook(out_of_memory)

    return trained(folder, spoil)


def in_an_evaluation_during_training(folder):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_evaluate = True

    def spoil(trainer):
        suite = load_rewards([shares_letters])
        trainer.evaluator = ValidationEvaluator(prompts(), tiny_tokenizer(), suite, max_new_tokens=4)
        trainer.add_callback(Ask())
        _on_one_rank(trainer.evaluator.suite, "_table", key_error)

    return trained(folder, spoil)


def in_saving(folder):
    return trained(
        folder,
        lambda trainer: _on_one_rank(trainer.resume_state, "save", key_error),
        save_strategy="steps",
        save_steps=1,
    )


def in_the_callbacks(folder):
    return trained(folder, lambda trainer: _on_one_rank(trainer.callback_handler, "on_step_end", key_error))


def _study(name):
    def place(_folder):
        def act():
            _on_one_rank(STUDIES[name], "measure", key_error, frozen=True)
            settings = ContrastSettings(strategies=("greedy",), max_new_tokens=3, studies=(name,))
            measure(tiny_model("llama"), prompts(), tiny_tokenizer(), load_rewards([shares_letters]), settings)

        return act

    return place


def in_candidates_for_rejection(_folder):
    def act():
        suite = load_rewards([shares_letters])
        _on_one_rank(suite, "_table", key_error)
        options = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 3, "seed": 0}
        sample_candidates(tiny_model("llama"), prompts(), suite, tiny_tokenizer(), **options)

    return act


FAILING = "FAILING_RANK"


def _chosen():
    return os.environ["RANK"] == os.environ[FAILING]


def _on_one_rank(owner, name, fails, frozen=False):
    if _chosen():
        (object.__setattr__ if frozen else setattr)(owner, name, fails)


PLACES = {
    "sampling": in_sampling,
    "scoring": in_scoring,
    "the loss": in_the_loss,
    "the backward pass": in_the_update_where_gradients_are_exchanged,
    "an evaluation during training": in_an_evaluation_during_training,
    "saving": in_saving,
    "a callback": in_the_callbacks,
    "a study of rows": _study("ranking"),
    "candidates": in_candidates_for_rejection,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_on_one_process_ends_both_with_what_it_was(place, tmp_path, monkeypatch):
    monkeypatch.setenv(FAILING, "1")
    codes = end_of_ranks(2, lambda: run_recipe(PLACES[place](tmp_path)), tmp_path / "log.txt", SECONDS)
    said = (tmp_path / "log.txt").read_text()
    assert all(code > 0 for code in codes), (codes, said[-3000:])
    assert "on purpose" in said and any(line.startswith("error: rank 1") for line in said.splitlines()), said[-3000:]


def test_a_study_that_the_first_process_measures_for_all_ends_all(tmp_path, monkeypatch):
    monkeypatch.setenv(FAILING, "0")
    act = _study("lookahead")(tmp_path)

    def caught():
        with pytest.raises(KeyError if os.environ["RANK"] == "0" else TrainingError, match="lost on purpose"):
            act()

    assert end_of_ranks(2, caught, tmp_path / "log.txt", SECONDS) == [0, 0], (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("rank", "owner", "name"), [("1", measuring, "load_checkpoint"), ("0", folder, "_refusal")])
def test_an_evaluation_that_a_script_calls_ends_on_both_with_what_it_was(rank, owner, name, tmp_path, monkeypatch):
    monkeypatch.setenv(FAILING, rank)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def act():
        _on_one_rank(owner, name, key_error)
        settings = ContrastSettings(strategies=("greedy",), max_new_tokens=3, resamples=20)
        suite = load_rewards([shares_letters])
        with pytest.raises((KeyError, TrainingError), match="lost on purpose"):
            options = {"settings": settings, "output_dir": tmp_path / "out", "quiet": True}
            contrast({"it": tmp_path / "model"}, ROWS, suite, **options)
        if os.environ["RANK"] == "0":
            time.sleep(3)  # it keeps the store, where the other reads why

    assert end_of_ranks(2, act, tmp_path / "log.txt", SECONDS) == [0, 0], (tmp_path / "log.txt").read_text()


def with_evaluator(folder, **settings):
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "report_to": "none", **settings}
    trainer = tiny_trainer(folder, **options)
    trainer.evaluator = ValidationEvaluator(
        prompts(), tiny_tokenizer(), load_rewards([shares_letters]), max_new_tokens=4
    )
    return trainer


@pytest.mark.parametrize(
    ("rank", "owner", "name"),
    [("1", "evaluator.suite", "_table"), ("0", "callback_handler", "on_evaluate"), ("0", "model", "save_pretrained")],
)
def test_what_a_script_calls_outside_of_training_ends_on_both_with_it(rank, owner, name, tmp_path, monkeypatch):
    monkeypatch.setenv(FAILING, rank)

    def act():
        trainer = with_evaluator(tmp_path / "run")
        _on_one_rank(operator.attrgetter(owner)(trainer) if owner else trainer, name, key_error)
        begun = time.monotonic()
        with pytest.raises((KeyError, TrainingError), match="lost on purpose"):
            trainer.save_model()
            for _ in range(2):  # the others hear of it at the next exchange
                trainer.evaluate()
        assert time.monotonic() - begun < SECONDS / 2
        if os.environ["RANK"] == "0":
            time.sleep(3)  # it keeps the store, where the other reads why

    assert end_of_ranks(2, act, tmp_path / "log.txt", SECONDS) == [0, 0], (tmp_path / "log.txt").read_text()


def test_what_rlseq_raises_on_purpose_is_raised_on_the_others_as_it_is_and_the_group_goes_on(tmp_path):
    def act():
        rank = int(os.environ["RANK"])
        with pytest.raises(RewardError, match=r"^no such column$"), raise_on_all_ranks():
            if rank == 1:
                raise RewardError("no such column")
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total.item() == 2

    assert end_of_ranks(2, act, tmp_path / "log.txt", SECONDS) == [0, 0], (tmp_path / "log.txt").read_text()


def test_a_failure_between_two_collectives_is_found_by_a_process_within_one(tmp_path):
    def act():
        rank = int(os.environ["RANK"])
        with pytest.raises((KeyError, RlseqError)) as caught, raise_on_all_ranks(exchange=False):
            torch.distributed.all_reduce(torch.ones(1))
            if rank == 1:
                raise KeyError("lost")
            torch.distributed.barrier()
        assert str(caught.value) == ("'lost'" if rank == 1 else "rank 1 failed with KeyError: 'lost'")

    assert end_of_ranks(2, act, tmp_path / "log.txt", SECONDS) == [0, 0], (tmp_path / "log.txt").read_text()


def test_one_process_alone_keeps_its_exceptions():
    for exchange in (True, False):
        with pytest.raises(KeyError, match="lost"), raise_on_all_ranks(exchange=exchange):
            raise KeyError("lost")
