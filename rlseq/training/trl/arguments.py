"""The arguments of TRL's trainer, as rlseq's trainer works with them.

`model` (a path, too) -> a loaded model; `reward_funcs` -> a `RewardSuite`; `args` -> rlseq's settings; `train_dataset`
-> `Prompt`s; `eval_dataset` -> an evaluator; `processing_class` -> a tokenizer. What is rlseq's own already
passes through.
What is not served is refused in one line that says what to give.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from rlseq.config.defaults import DefaultsMixin
from rlseq.config.fields import Conflict, setting
from rlseq.config.training import GRPOConfig, ModelArguments
from rlseq.config.validation.validate import check_declared, validate, validate_given
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.during import ValidationEvaluator
from rlseq.scoring import RewardSuite, load_rewards
from rlseq.scoring.specs.find import bundled_folder
from rlseq.scoring.specs.reward_files import load_file
from rlseq.training.models import load_model, load_tokenizer
from rlseq.training.run.best import choose_best_by
from rlseq.types import Prompt

_OF_LOADING = {"dtype": "dtype", "attn_implementation": "attn_implementation", "revision": "model_revision"}
_OWN_SPLIT = "name the rows yourself: a Dataset, or a list of Prompts (rlseq.load_prompts)"


def _argument(*conflicts: Conflict) -> Any:
    return setting(None, "", conflicts=conflicts)


def _sampled_by_trainer(what: str, when: Callable[[Any], Any]) -> Conflict:
    return Conflict(f"samples in place of the trainer, which then cannot serve {what}", when)


@dataclass
class Arguments:
    """Arguments of the trainer beside its settings, with what each cannot stand beside; not given, they are None."""

    args: GRPOConfig
    reward_processing_classes: Any = _argument(
        Conflict("is not served: a reward model reads text by its own tokenizer: save both in one folder and name it")
    )
    quantization_config: Any = _argument(
        Conflict("is not served: load the model by from_pretrained(..., quantization_config=...) and give that")
    )
    environment_factory: Any = _argument(
        Conflict("is not served: name it in args.environment, path/to/file.py:name or package.module:name")
    )
    evaluator: Any = None
    eval_dataset: Any = _argument(
        Conflict("and evaluator both say what evaluate measures: give one of them", lambda g: g.evaluator is not None)
    )
    tools: Any = _argument(
        Conflict(
            "are given both to the trainer and in args.tools: give one of them", lambda g: g.tools and g.args.tools
        )
    )
    rollout_func: Any = _argument(
        _sampled_by_trainer("an objective of its own", lambda g: g.args.objective != "policy_gradient"),
        _sampled_by_trainer("advantage_baseline greedy", lambda g: g.args.advantage_baseline == "greedy"),
        _sampled_by_trainer("reference_prefix", lambda g: g.args.reference_prefix > 0),
        _sampled_by_trainer("tools", lambda g: g.tools or g.args.tools),
        _sampled_by_trainer("environment", lambda g: g.args.environment is not None),
        _sampled_by_trainer("stop_strings", lambda g: g.args.stop_strings),
        _sampled_by_trainer("generation_kwargs", lambda g: g.args.generation_kwargs),
    )

    def __post_init__(self) -> None:
        check_declared(self, prefix="")


def settings_of(args: Any, settings: type[GRPOConfig]) -> Any:
    """The trainer's settings: rlseq's as given; those of a `trl.GRPOConfig` with TRL's defaults; None: the defaults.

    Raises:
        ConfigError: args are of another class, or ask for what is not served.
    """
    if args is None:
        return settings()
    if isinstance(args, settings):
        return args
    if settings is GRPOConfig and isinstance(args, trl.GRPOConfig) and not isinstance(args, DefaultsMixin):
        return _extended(args)
    if settings is GRPOConfig:
        raise ConfigError(f"args is a {_kind(args)}; expected an rlseq.GRPOConfig or a trl.GRPOConfig")
    raise ConfigError(f"args is a {_kind(args)}; expected an rlseq.{settings.__name__}, which takes the same names")


def _extended(args: trl.GRPOConfig) -> GRPOConfig:
    """rlseq's settings with every value of TRL's, which has filled in its defaults, and what rlseq adds at its own."""
    config = object.__new__(GRPOConfig)
    of_trl = vars(args)
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in of_trl:
            setattr(config, field.name, field.default)
    vars(config).update(copy.copy(of_trl))
    best, given = args.metric_for_best_model, args.greater_is_better
    filled_in = best is not None and given is not best.endswith("loss")  # by transformers, from the measure's name
    config.asked_direction = None if filled_in else given
    if best in ("reward", "eval_reward"):
        config.metric_for_best_model = "sample/reward"  # what TRL's evaluation measures
    validate_given(config, filled_in=True)
    validate(config)
    return config


def training_rows(prompts: list[Prompt]) -> datasets.Dataset:
    """Make the data set that TRL's data loader reads: the prompt and the index of the `Prompt` it stands for.

    The prompts are put in as rows are read: kept in Arrow, messages would have each other's keys, as None.
    """
    numbers = list(range(len(prompts)))
    data = datasets.Dataset.from_dict({"prompt": [None] * len(prompts), "index": numbers})
    return data.with_transform(_PromptsRead(prompts))


class _PromptsRead:
    """Puts in the prompts of the rows that are read.

    datasets hashes a transform by pickling it in Python, which takes seconds for the prompts of a large data set;
    pickled here they are one string of bytes to it.
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {"prompt": [copy.deepcopy(self.prompts[i].prompt) for i in batch["index"]], "index": batch["index"]}

    def __getstate__(self) -> bytes:
        return pickle.dumps(self.prompts)

    def __setstate__(self, state: bytes) -> None:
        self.prompts = pickle.loads(state)


def model_of(model: Any, args: GRPOConfig) -> torch.nn.Module:
    """The policy: a loaded model as given, or the one of a path or hub id, loaded by `args.model_init_kwargs`.

    Raises:
        ConfigError: it is neither, or a keyword of loading is not served.
        ModelError: there is no model at the path.
    """
    if isinstance(model, torch.nn.Module):
        check_init_kwargs(args)
        return model
    if not isinstance(model, str | Path):
        raise ConfigError(f"model is {model!r:.80}; expected a path, a hub id or a loaded model")
    options = dict(args.model_init_kwargs or {})
    if unknown := sorted(options.keys() - _OF_LOADING.keys()):
        raise ConfigError(
            f"model_init_kwargs has {', '.join(unknown)}; rlseq's loader takes {', '.join(_OF_LOADING)}. Load the "
            "model by from_pretrained and give that."
        )
    if isinstance(options.get("dtype"), torch.dtype):
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    named = {_OF_LOADING[name]: value for name, value in options.items()}
    return load_model(ModelArguments(model_name_or_path=str(model), **named))


def check_init_kwargs(args: GRPOConfig) -> None:
    """Refuse `model_init_kwargs` beside a model that is loaded already, unless the reference is loaded by them.

    Raises:
        ConfigError: they would have no effect.
    """
    if args.model_init_kwargs and not args.beta:
        raise ConfigError(
            f"model_init_kwargs is {args.model_init_kwargs}, which has no effect: the model is loaded already, and "
            "without beta above 0 there is no reference. Leave it out, or give the model's path."
        )


def tokenizer_of(processing_class: Any, model: torch.nn.Module, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the folder or hub id that the model was loaded from.

    Raises:
        ConfigError: a processor was given, or the model names no folder.
    """
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("processing_class is a processor, but text alone is trained: give processing_class.tokenizer")
    if processing_class is not None:
        raise ConfigError(f"processing_class is a {_kind(processing_class)}; expected the model's tokenizer")
    name = get_config_model_id(model.config)
    if not name:
        raise ConfigError("processing_class is missing, and the model was loaded from no folder: give its tokenizer")
    return load_tokenizer(name, revision=(args.model_init_kwargs or {}).get("revision", "main"))


def prompts_of(
    rows: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, name: str = "train_dataset"
) -> list[Prompt]:
    """Prompts as given, or those of a `datasets.Dataset`: its column `prompt`, the others for the rewards.

    Raises:
        ConfigError: it is neither.
        DataError: a row is no prompt.
    """
    if rows is None:
        raise ConfigError(f"{name} is missing; expected a datasets.Dataset with a column prompt, or a list of Prompts")
    if isinstance(rows, datasets.Dataset):
        return build_prompts(rows, tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    if isinstance(rows, Mapping):
        raise ConfigError(f"{name} is a {_kind(rows)} of {', '.join(map(str, rows))}; {_OWN_SPLIT}")
    if isinstance(rows, datasets.IterableDataset):
        raise ConfigError(
            f"{name} is a datasets.IterableDataset; expected a Dataset, e.g. Dataset.from_list(list(...))"
        )
    if not isinstance(rows, Sequence) or not all(isinstance(prompt, Prompt) for prompt in rows):
        raise ConfigError(
            f"{name} is a {_kind(rows)}; expected a datasets.Dataset (Dataset.from_list(rows)) or Prompts "
            "(rlseq.load_prompts)"
        )
    return rows


def suite_of(reward_funcs: Any, args: GRPOConfig) -> RewardSuite:
    """The rewards with the weights of `args.reward_weights`: a suite as given, or one of what `load_rewards` takes.

    Beside that, a loaded sequence-classification model is a reward.

    Raises:
        ConfigError: none is given, or the weights do not fit.
        RewardError: one is not found, or fits no form.
    """
    if reward_funcs in (None, []) and args.objective == "distillation":
        return RewardSuite([], [])
    if reward_funcs is None:
        raise ConfigError(
            "reward_funcs is missing; expected a function, a name (`rlseq reward list`), or a list of them"
        )
    if not isinstance(reward_funcs, RewardSuite):
        given = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        reward_funcs = load_rewards([_model_as_reward(x) if isinstance(x, torch.nn.Module) else x for x in given])
    return weighted(reward_funcs.with_think_end(args.think_end), args.reward_weights)


def _model_as_reward(model: torch.nn.Module) -> dict[str, Any]:
    """A loaded sequence-classification model as the bundled reward_model scores one, by the tokenizer of its folder."""
    name = get_config_model_id(model.config)
    if not name:
        raise ConfigError("a model in reward_funcs was loaded from no folder, where its tokenizer would be: save both")
    bundled = load_file(bundled_folder() / "reward_model.py")
    tokenizer = bundled.load_tokenizer(name)
    network = bundled.prepared(model.to(PartialState().device), tokenizer)

    def score(prompts: list[Any], completions: list[str], messages: list[Any]) -> list[float]:
        return bundled.scores_of(network, tokenizer, prompts, completions, messages)

    return {"func": score, "name": name.rstrip("/").rsplit("/", 1)[-1]}


def weighted(suite: RewardSuite, weights: Sequence[float] | None) -> RewardSuite:
    """The suite with the weights of `GRPOConfig.reward_weights`, where those are given.

    Raises:
        ConfigError: they are not one a reward, or the suite has others of its own.
    """
    if weights is None or list(weights) == list(suite.weights):
        return suite
    if len(weights) != len(suite.names):
        raise ConfigError(
            f"reward_weights has {len(weights)} numbers for {len(suite.names)} rewards ({', '.join(suite.names)}); "
            "expected one each"
        )
    if any(weight != 1 for weight in suite.weights):
        raise ConfigError(
            f"weights are given both in the suite ({suite.weights}) and in reward_weights ({list(weights)}): keep one"
        )
    suite = copy.copy(suite)
    suite.weights = [float(weight) for weight in weights]
    return suite


def evaluator_of(
    eval_dataset: Any,
    evaluator: Callable[[torch.nn.Module], Mapping[str, float]] | None,
    tokenizer: PreTrainedTokenizerBase,
    suite: RewardSuite,
    args: GRPOConfig,
) -> Callable[[torch.nn.Module], Mapping[str, float]] | None:
    """The evaluator given, or one that measures the rewards on the rows of `eval_dataset`, greedy and sampled.

    Raises:
        ConfigError: the best checkpoint is to be chosen by what is not measured.
    """
    if eval_dataset is None:
        return evaluator
    made = ValidationEvaluator(
        prompts_of(eval_dataset, tokenizer, args, "eval_dataset"),
        tokenizer,
        suite,
        max_new_tokens=args.max_completion_length,
        stop_strings=args.stop_strings,
        think_end=args.think_end,
        group_column=args.group_column,
        seed=args.seed,
        samples_per_row=args.num_generations_eval or 1,
    )
    if args.load_best_model_at_end or args.metric_for_best_model is not None:
        choose_best_by(args, made.metrics, made.best)
    return made


def _kind(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}" if kind.__module__ != "builtins" else kind.__name__
