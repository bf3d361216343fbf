"""Rollouts made of text, what rewards make of them, and reward files."""

from __future__ import annotations

import textwrap

from rlseq import load_rewards
from rlseq.types import Rollout


def rollout(text="", *, key="p", sample=0, ids=None, messages=None, finish="stop", logprobs=None) -> Rollout:
    """A rollout of one token per word unless told otherwise."""
    ids = tuple(range(len(text.split())) if ids is None else ids)
    logprobs = (-0.5,) * len(ids) if logprobs is None else tuple(logprobs)
    return Rollout(key, sample, ids, (True,) * len(ids), logprobs, text, f"{text}</s>", messages, finish, "sample")


def score(spec, completions, columns=None, *, max_error_rate=1.0, **options):
    """The reward table of some completions, texts or rollouts, each of a row of its own."""
    rollouts = [c if isinstance(c, Rollout) else rollout(c, key=f"row-{i}") for i, c in enumerate(completions)]
    with load_rewards([spec], max_error_rate=max_error_rate, **options) as suite:
        return suite.score(rollouts, {"prompt": ["q"] * len(rollouts), **(columns or {})})


def only(table, what):
    """This field of the table's only reward, such as "status"."""
    return getattr(table, what)[next(iter(table.values))]


def values(spec, completions, columns=None, **options):
    """Values of one reward, which may not fail."""
    return only(score(spec, completions, columns, max_error_rate=0.0, **options), "values")


def source_writer(root):
    """A function that writes a file under `root`, given its indented source."""

    def write(name, source):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    write.root = root
    return write
