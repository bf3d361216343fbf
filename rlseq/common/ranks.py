"""An exception on one process of a run ends all its processes, with the same message.

The others hear of it in one of two ways, because a collective needs all processes:

* work without collectives (sampling, scoring, an evaluation, a study) ends with an exchange of the exceptions:
  `raise_on_all_ranks()`;
* elsewhere (an update, a checkpoint, a whole run) the others may be within a collective. The failing process writes
  its exception to the store of the process group and leaves the group. The collective then fails on the others, and
  they read the store: `raise_on_all_ranks(exchange=False)`. Nothing is sent while nothing fails.
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
_SECONDS = 10.0  # that leaving the group may take while this process's own collectives are pending
_kept_stores: list[Any] = []  # of groups that this process has left
_FAILURES = (Exception, SystemExit)  # a KeyboardInterrupt reaches all processes of a terminal by itself


@contextlib.contextmanager
def raise_on_all_ranks(*, exchange: bool = True) -> Iterator[None]:
    """Raise on every process what the body raises on any; every process of the run enters it, in the same order.

    A process on which the body itself failed raises its own exception. The others raise that of the first process that
    failed: an `RlseqError` as it is, anything else as a `TrainingError` that names the process and the exception.

    Args:
        exchange: the body has no collectives, or only those that all processes finish or none does, so it may end with
            one. False: it may fail between any two.
    """
    if not exchange:  # the body may start the process group
        with _raise_through_store():
            yield
        return
    if _world_size() == 1:
        yield
        return
    own: BaseException | None = None
    try:
        yield
    except _FAILURES as error:
        own = error
    gathered: list[RlseqError | None] = [None] * _world_size()
    dist.all_gather_object(gathered, None if own is None else shared_error(own))
    failures = [failure for failure in gathered if failure is not None]
    if failures:
        failure = failures[0] if own is None else own
        failure.on_all_ranks = True
        raise failure


def shared_error(error: BaseException) -> RlseqError:
    """What the other processes raise for an exception of this one."""
    of_this_rank = isinstance(error, TrainingError) and not error.on_every_rank
    if isinstance(error, RlseqError) and not of_this_rank:
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    name, text = "" if of_this_rank else f" failed with {type(error).__name__}", str(error).strip()
    return TrainingError(f"rank {dist.get_rank()}{name}{': ' if text else ''}{text}", on_every_rank=True)


@contextlib.contextmanager
def _raise_through_store() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if _world_size() == 1 or _on_all_ranks(error):  # alone, or an inner one has left the group already
            raise
        first = _read()
        if first is not None:  # another process failed, and with it a collective of this one
            _leave_group()
            raise first from error
        _write(shared_error(error))
        _leave_group()
        raise


def _on_all_ranks(error: BaseException) -> bool:
    return getattr(error, "on_all_ranks", False) or getattr(error, "on_every_rank", False)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _read() -> RlseqError | None:
    with contextlib.suppress(Exception):  # the process that holds the store may be gone: then the reason is lost
        if _store().check([_KEY]):
            return pickle.loads(_store().get(_KEY))
    return None


def _write(failure: RlseqError) -> None:
    with contextlib.suppress(Exception):
        _store().set(_KEY, pickle.dumps(failure))


def _leave_group() -> None:
    """Leave the group without waiting for the others, so that the collectives they are in fail.

    The store is kept until this process ends, because it may hold it for all.
    """
    with contextlib.suppress(Exception):
        _kept_stores.append(_store())
    thread = threading.Thread(target=_abort, daemon=True)
    thread.start()
    thread.join(_SECONDS)


def _abort() -> None:
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()
