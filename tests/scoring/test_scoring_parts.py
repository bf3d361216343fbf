"""Several processes score parts of one step: failures are judged over all parts, and an error ends all of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_rollouts import rollout

from rlseq import load_rewards
from rlseq.errors import RewardError


def fragile(completion):
    if completion == "bad":
        raise ValueError("cannot read this")
    return 1.0


class Processes:
    """Threads that stand for processes: `gather` returns everybody's object, in rank order, and may hang like one."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.given = [None] * count
        self.calls = [0] * count

    def gather(self, rank):
        def gather(mine):
            self.calls[rank] += 1
            self.given[rank] = mine
            self.barrier.wait()
            everything = list(self.given)
            self.barrier.wait()
            return everything

        return gather

    def run(self, parts, spec, **options):
        """What each process's `score` gave: a table or an error."""

        def score(rank):
            suite = load_rewards([spec], **options)
            rollouts = [rollout(text, key=f"rank-{rank}-row-{i}") for i, text in enumerate(parts[rank])]
            columns = {"prompt": ["q"] * len(rollouts)}
            try:
                return suite.score(rollouts, columns, gather=self.gather(rank))
            except RewardError as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(score, range(self.count)))


ABSTAINING = {"func": fragile, "on_error": "abstain"}


def test_few_failures_of_a_step_are_allowed_although_they_are_many_of_one_part():
    # 2 of 40 are the 5 % that are allowed; of the first part alone they are 20 %
    parts = [["bad"] * 2 + ["good"] * 8, ["good"] * 30]
    processes = Processes(2)
    tables = processes.run(parts, ABSTAINING, max_error_rate=0.05)
    assert [table.failures for table in tables] == [{"fragile": 2}, {"fragile": 0}]
    assert [len(table.totals) for table in tables] == [10, 30]
    assert processes.calls == [1, 1]
    with pytest.raises(RewardError, match="failed on 2 of 10 completions"):  # one process alone
        load_rewards([ABSTAINING]).score([rollout(t, key="k") for t in parts[0]], {"prompt": ["q"] * 10})


def test_many_failures_of_a_step_end_all_processes_with_the_same_message_also_those_without_any():
    # 1 of 10 each: a lone failure in any part, but 3 of 40 in all
    parts = [["good"] * 10, *[["good"] * 9 + ["bad"]] * 3]
    errors = Processes(4).run(parts, ABSTAINING, max_error_rate=0.05)
    assert {type(error) for error in errors} == {RewardError}
    assert len({str(error) for error in errors}) == 1
    assert "failed on 3 of 40 completions" in str(errors[0])
    assert "'rank-1-row-9'" in str(errors[0])  # the first failure, and where


def test_one_failure_of_a_whole_step_is_no_proof():
    tables = Processes(2).run([["bad"], ["good"]], ABSTAINING, max_error_rate=0.05)
    assert [table.values["fragile"] for table in tables] == [[None], [1.0]]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_error_in_one_process_ends_all_with_that_error(where):
    parts = [["good"] * 2, ["good"] * 2, ["good"] * 2]
    parts[where] = ["good", "bad"]
    errors = Processes(3).run(parts, fragile)
    assert {type(error) for error in errors} == {RewardError}
    assert {str(error) for error in errors} == {str(errors[where])}
    assert "cannot read this" in str(errors[0])
    assert f"'rank-{where}-row-1'" in str(errors[0])


def test_an_error_that_is_no_rewards_fault_ends_all_processes_too(monkeypatch):
    def broken(*arguments, **more):
        raise KeyError("a bug")

    processes, errors = Processes(2), []

    def score(rank):
        suite = load_rewards([fragile])
        if rank == 0:
            monkeypatch.setattr(suite.rewards[0].executor, "run", broken)
        try:
            suite.score([rollout("good", key="k")], {"prompt": ["q"]}, gather=processes.gather(rank))
        except Exception as error:
            errors.append(error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(score, range(2)))
    assert sorted(type(error).__name__ for error in errors) == ["KeyError", "RewardError"]


def test_a_part_without_rollouts_takes_part():
    tables = Processes(2).run([[], ["good"]], fragile)
    assert [table.totals for table in tables] == [[], [1.0]]
