"""Which checkpoint of a run is the best: by which measure of its evaluations, and in which direction."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import TrainingArguments

from rlseq.errors import ConfigError, did_you_mean
from rlseq.training.run.recipe import say


def choose_best_by(config: TrainingArguments, known: Mapping[str, bool | None], default: str) -> None:
    """Let checkpoints be compared by a measure of the evaluation during training; the best is never deleted.

    Args:
        config: its `metric_for_best_model` and `greater_is_better` are set; `save_total_limit` spares the best. A
            direction that the user gave (`asked_direction`) stands, whatever the measure's own. The measure may be
            named without its strategy or its kind (`greedy/acc` for `greedy/reward/acc`), where no other has that name.
        known: by measure, whether higher is better; None where neither is.
        default: the measure where the user names none.

    Raises:
        ConfigError: the user names one that is not measured, by a name that two have, or that has no direction and
            none is given; or wants the best and the average of the weights.
    """
    wanted = config.metric_for_best_model
    if wanted in (None, "loss"):  # transformers' own default, which rollouts do not have
        wanted = default
    wanted = wanted.removeprefix("eval_")
    if wanted not in known and (meant := [key for key in known if wanted in _short_names(key)]):
        if len(meant) > 1:
            raise ConfigError(
                f"metric_for_best_model is {wanted!r}, which may be {' or '.join(meant)}; write one of these"
            )
        wanted = meant[0]
    if wanted not in known:
        near = did_you_mean(wanted, known)
        raise ConfigError(
            f"metric_for_best_model is {wanted!r}, which is not measured.{near} Measured: {', '.join(known)}"
        )
    if config.load_best_model_at_end and getattr(config, "ema_decay", 0):
        raise ConfigError(
            "load_best_model_at_end takes a checkpoint, ema_decay an average of weights: give one of them"
        )
    own, asked = known[wanted], getattr(config, "asked_direction", None)
    if own is None and asked is None:
        raise ConfigError(
            f"metric_for_best_model is {wanted!r}, of which neither higher nor lower is better: say which by "
            "--greater_is_better true or false, or name another measure"
        )
    if own is not None and asked not in (None, own):
        usual = "higher" if own else "lower"
        say(f"rlseq: warning: of {wanted} {usual} is better, but greater_is_better is {asked}: the best is chosen so")
    config.metric_for_best_model = f"eval_{wanted}"
    config.greater_is_better = own if asked is None else asked


def _short_names(key: str) -> set[str]:
    """The shorter names of a measure, `STRATEGY/NAME` or `STRATEGY/KIND/NAME`: without strategy, kind, or both."""
    strategy, _, rest = key.partition("/")
    kind, _, name = rest.partition("/")
    return {rest, name, f"{strategy}/{name}"} if name and kind in ("reward", "corpus") else {rest} - {""}
