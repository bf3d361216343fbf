"""What fails on one process of several ends them all, with what failed: any exception, wherever it is raised.

Two ways to learn of it, since a process may only take part in a collective that the others take part in:

* a part of the work without collectives (drawing, scoring, an evaluation, a study) ends with an exchange, in which
  every process hears how the others fared: `raise_on_all_ranks()`;
* elsewhere (an update, a checkpoint, a whole run) the others may be within a collective. The process that fails says
  why in the store by which the processes found each other, and leaves the group; the collective then fails on the
  others, and they look there: `raise_on_all_ranks(exchange=False)`. Nothing is sent while nothing fails.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from rlseq.errors import RlseqError, TrainingError

_KEY = "rlseq/failure"
_SECONDS = 10.0  # that leaving the group may take, where this process's own collectives are pending
_left: list[Any] = []  # the stores of groups that this process has left
_FAILURES = (Exception, SystemExit)  # a KeyboardInterrupt reaches all processes of a terminal by itself


@contextlib.contextmanager
def raise_on_all_ranks(*, exchange: bool = True) -> Iterator[None]:
    """Raise on every process what the body raises on any; every process of the run enters it, in the same order.

    A process on which the body itself failed raises its own exception. The others raise that of the first process that
    failed: an `RlseqError` as it is, anything else as a `TrainingError` that names the process and the exception.

    Args:
        exchange: the body has no collectives but such as all processes finish or none does, so it may end with one.
            False: it may fail between any two.
    """
    if not exchange:  # it may hold the whole run, which finds the others only within
        with _told_through_store():
            yield
        return
    if _number() == 1:
        yield
        return
    own: BaseException | None = None
    try:
        yield
    except _FAILURES as error:
        own = error
    told: list[RlseqError | None] = [None] * _number()
    dist.all_gather_object(told, None if own is None else as_told(own))
    failures = [failure for failure in told if failure is not None]
    if failures:
        failure = failures[0] if own is None else own
        failure.known_to_all = True
        raise failure


def as_told(error: BaseException) -> RlseqError:
    """What the other processes raise for an exception of this one."""
    of_this_rank = isinstance(error, TrainingError) and not error.on_every_rank
    if isinstance(error, RlseqError) and not of_this_rank:
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    name, text = "" if of_this_rank else f" failed with {type(error).__name__}", str(error).strip()
    return TrainingError(f"rank {dist.get_rank()}{name}{': ' if text else ''}{text}", on_every_rank=True)


@contextlib.contextmanager
def _told_through_store() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if _number() == 1 or _known_to_all(error):  # alone, or an inner one has left the group already
            raise
        told = _read()
        if told is not None:  # this is what another's failure does to a collective of this process
            _leave()
            raise told from error
        _write(as_told(error))
        _leave()
        raise


def _known_to_all(error: BaseException) -> bool:
    return getattr(error, "known_to_all", False) or getattr(error, "on_every_rank", False)


def _number() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _read() -> RlseqError | None:
    with contextlib.suppress(Exception):  # the process that keeps the store may be gone: then nobody says why
        if _store().check([_KEY]):
            return pickle.loads(_store().get(_KEY))
    return None


def _write(failure: RlseqError) -> None:
    with contextlib.suppress(Exception):
        _store().set(_KEY, pickle.dumps(failure))


def _leave() -> None:
    """Leave the group without waiting for the others, so that the collectives they are in fail.

    The store lasts for as long as this process, which may be the one that keeps it for all.
    """
    with contextlib.suppress(Exception):
        _left.append(_store())
    thread = threading.Thread(target=_abort, daemon=True)
    thread.start()
    thread.join(_SECONDS)


def _abort() -> None:
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()
