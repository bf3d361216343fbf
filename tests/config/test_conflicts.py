"""What settings need and what they cannot stand beside is declared at the field, and one function reads it."""

from dataclasses import dataclass

import pytest

from rlseq.config.fields import Conflict, Need, setting
from rlseq.config.parsing.config_file import construct
from rlseq.config.training import GRPOConfig, ModelArguments, PPOConfig, SFTConfig
from rlseq.config.validation.validate import Settings
from rlseq.errors import ConfigError
from rlseq.training.trl.arguments import Arguments


@dataclass
class Own(Settings):
    soup: str | None = setting(None, "", conflicts=Conflict("is not for hands", lambda own: own.tool == "hand"))
    salt: float = setting(
        0.0,
        "",
        needs=Need("--soup", lambda own: own.soup),
        conflicts=(
            Conflict("is sharp beside {pepper:g} of pepper; leave one out", lambda own: own.pepper > 1),
            Conflict("is dear"),
        ),
    )
    pepper: float = setting(0.0, "", needs=Need("--soup", lambda own: own.soup))
    tool: str = setting("hand", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"soup": "leek"}, "--soup is not for hands"),
        (
            {"soup": "leek", "tool": "spoon", "salt": 2.0, "pepper": 3.0},
            "--salt is sharp beside 3 of pepper; leave one out",
        ),
        ({"soup": "leek", "tool": "spoon", "salt": 2.0}, "--salt is dear"),
        ({"pepper": 1.0}, "--pepper is 1.0, which has no effect without --soup. Leave it out."),
        (
            {"salt": 2.0, "pepper": 1.0},
            "--salt is 2.0 and --pepper is 1.0, which have no effect without --soup. Leave them out.",
        ),
    ],
)
def test_a_setting_is_refused_by_what_its_field_declares(given, said):
    with pytest.raises(ConfigError) as caught:
        Own(**given)
    assert str(caught.value) == said


def test_what_is_not_given_conflicts_with_nothing():
    assert Own(soup=None, salt=0.0) == Own()
    Own(soup="leek", tool="spoon", pepper=2.0)


REFUSED = {
    "patience without evaluations": (
        SFTConfig,
        {"early_stopping_patience": 2, "eval_strategy": "epoch"},
        "early_stopping_patience counts evaluations and ends with the best checkpoint, but eval_strategy is epoch and "
        "save_strategy steps. Give both the same: epoch, or steps (with --eval_steps and --save_steps).",
    ),
    "adapting nothing": (
        PPOConfig,
        {"kl_target": 1.0},
        "kl_target adapts beta, the KL penalty in the reward: give --beta, a start above 0",
    ),
    "an estimator for the loss": (
        PPOConfig,
        {"beta": 0.1, "kl_estimator": "k3"},
        "kl_estimator k3 is for the loss; in the reward the KL is k1, whose sum is the sequence's. Leave it out, or "
        "give --kl_in_reward false.",
    ),
    "two ways with truncation": (
        PPOConfig,
        {"mask_truncated_completions": True, "truncated_completions": "penalty"},
        "mask_truncated_completions leaves truncated completions out of the loss, truncated_completions penalty judges "
        "them: give one of them",
    ),
    "code of a repository": (
        GRPOConfig,
        {"trust_remote_code": True},
        "trust_remote_code is not served: no code of a model's repository is run. Leave it out",
    ),
    "a revision under an adapter": (
        ModelArguments,
        {"model_name_or_path": "a/b", "model_revision": "v1", "use_peft": True},
        "--model_revision is v1, but an adapter's folder names its base without one: the result would be evaluated and "
        "merged on another. Give a local copy as --model_name_or_path (hf download a/b --revision v1 --local-dir DIR)",
    ),
}


@pytest.mark.parametrize(("settings", "given", "said"), REFUSED.values(), ids=REFUSED)
def test_conflicts_of_training_name_the_values(settings, given, said):
    on_cpu = {} if settings is ModelArguments else {"use_cpu": True, "bf16": False}
    with pytest.raises(ConfigError) as caught:
        construct(settings, {**given, **on_cpu})
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("settings", "given", "what"),
    [
        ({"objective": "minimum_risk"}, {}, "an objective of its own"),
        ({"advantage_baseline": "greedy"}, {}, "advantage_baseline greedy"),
        ({}, {"tools": [print]}, "tools"),
        ({"environment": "a.py:b"}, {}, "environment"),
    ],
)
def test_a_rollout_func_is_refused_beside_what_it_cannot_serve(settings, given, what):
    args = GRPOConfig(use_cpu=True, bf16=False, **settings)
    Arguments(args, **given)
    with pytest.raises(ConfigError) as caught:
        Arguments(args, rollout_func=print, **given)
    assert str(caught.value) == f"rollout_func samples in place of the trainer, which then cannot serve {what}"


def test_tools_are_given_once():
    args = GRPOConfig(use_cpu=True, bf16=False, tools=["a.py:b"])
    with pytest.raises(ConfigError, match=r"tools are given both to the trainer and in args.tools: give one of them"):
        Arguments(args, tools=[print])
