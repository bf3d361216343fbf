"""`rlseq evaluate`: contrast named checkpoints on one data set, in one process."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlseq.common.escapes import visible
from rlseq.common.interrupts import exit_on_sigint
from rlseq.config.arguments import (
    EvaluateArguments,
    EvaluationArguments,
    EvaluationDataArguments,
    RewardArguments,
)
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.engine.model.gguf_files import gguf_file, may_be_on_hub
from rlseq.errors import ConfigError, DataError, did_you_mean
from rlseq.evaluation.stats.seeds import methods, numbered

# The arguments of an evaluation, here and in recipes/evaluate.py, in the order of `evaluate_or_join`.
ARGUMENTS = (EvaluateArguments, EvaluationDataArguments, RewardArguments, EvaluationArguments)
TRAIN = "train"  # the split that what is evaluated should not be in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq evaluate`: those of recipes/evaluate.py."""
    parser.usage = "%(prog)s --models NAME=PATH ... --dataset_name DATA --reward_funcs REWARD ... [--name value ...]"
    add_flags(parser, ARGUMENTS)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 on success."""
    with exit_on_sigint():
        settings = from_flags(ARGUMENTS, args)
    evaluate_or_join(*settings)
    return 0


def evaluate_or_join(
    arguments: EvaluateArguments,
    data: EvaluationDataArguments,
    rewards: RewardArguments,
    evaluation: EvaluationArguments,
) -> None:
    """Contrast the models that these settings name, or join the evaluations that --compare names.

    Raises:
        ConfigError: nothing to evaluate is named, or --compare beside settings that it cannot heed.
    """
    if not arguments.output_dir.strip():
        raise ConfigError("--output_dir is empty; name a directory for the evaluation (is a shell variable unset?)")
    measured = [*(rewards.reward_funcs or []), *(rewards.eval_reward_funcs or [])]  # all are only measured
    if arguments.compare:
        validate_compare_alone(arguments, data, rewards, evaluation)
        return join_finished(arguments.compare, output_dir=arguments.output_dir, reward_funcs=measured or None)
    with exit_on_sigint():
        from rlseq.evaluation.settings import ContrastSettings

    evaluate(
        arguments.models or [],
        data,
        measured,
        settings=ContrastSettings.of(arguments, evaluation),
        template_options=arguments.template_options(),
        max_error_rate=rewards.max_error_rate,
        output_dir=arguments.output_dir,
    )


def validate_compare_alone(*settings: Any) -> None:
    """Raise ConfigError, beside --compare, for a setting that is not at its default and would change nothing."""
    kept = ("compare", "output_dir", "reward_funcs", "eval_reward_funcs")
    given = [
        field.name
        for part in settings
        for field in dataclasses.fields(part)
        if field.name not in kept and getattr(part, field.name) != getattr(type(part)(), field.name)
    ]
    if given:
        raise ConfigError(
            f"--compare joins what was evaluated before, and --{', --'.join(given)} cannot change it; leave out one or "
            "the other"
        )


def join_finished(evaluations: Sequence[str], *, output_dir: str, reward_funcs: Sequence[Any] | None) -> None:
    """Join finished evaluations or compare those of another harness, and report; in the first process alone."""
    with exit_on_sigint():
        from accelerate import PartialState

        from rlseq.evaluation.other_harnesses.compare import compare_and_report, harness_of
        from rlseq.evaluation.results.compare import join_and_report

    if not PartialState().is_main_process:
        return
    if not any(map(harness_of, evaluations)):
        join_and_report(evaluations, output_dir, reward_funcs=reward_funcs)
        return
    if reward_funcs:
        raise ConfigError("--compare takes the scores of other harnesses as they are; leave --reward_funcs out")
    seed, resamples = EvaluateArguments.seed, EvaluationArguments.resamples
    compare_and_report(evaluations, Path(output_dir), seed=seed, resamples=resamples)


def parse_models(specs: Sequence[str]) -> dict[str, str]:
    """Read NAME=PATH pairs; a bare path is named after its last part, and a NAME repeated gets numbers: NAME#1, NAME#2.

    Raises:
        ConfigError: a path is given twice for a name, two bare paths have one last part, or a local path holds no
            weights.
    """
    pairs: list[tuple[str, str]] = []
    bare: list[str] = []
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals:
            name, path = Path(spec).name, spec
            bare.append(name)
        if not name or not path:
            raise ConfigError(f"--models: {spec!r} is not NAME=PATH")
        if (name, path) in pairs:
            raise ConfigError(f"--models: {spec!r} is given twice; seeds of a method are different checkpoints")
        local = Path(path)
        found = gguf_file(local) is not None
        if local.is_dir() and not found and not any(local.glob("*.safetensors")):
            raise ConfigError(f"--models: {path!r} holds no weights (*.safetensors)")
        if not (found or local.is_dir()) and (local.is_absolute() or not may_be_on_hub(path) or local.parent.is_dir()):
            siblings = [str(p) for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
            raise ConfigError(f"--models: there is no model at {path!r}.{did_you_mean(path, siblings)}")
        pairs.append((name, path))
    for name in bare:
        if len(paths := [path for other, path in pairs if other == name]) > 1:
            raise ConfigError(f"--models: {' and '.join(map(repr, paths))} are both called {name!r}; give NAME=PATH")
    names = numbered([name for name, _ in pairs])
    methods(names)
    return dict(zip(names, (path for _, path in pairs), strict=True))


def evaluate(
    models: Sequence[str],
    data: EvaluationDataArguments,
    reward_funcs: Sequence[Any] | None,
    *,
    settings: Any,
    output_dir: str | Path,
    template_options: Mapping[str, Any] | None = None,
    max_error_rate: float = RewardArguments.max_error_rate,
) -> dict[str, Any]:
    """Check everything cheap, contrast the models, write the report and print its summary."""
    with exit_on_sigint():
        import torch
        from accelerate import PartialState

        from rlseq.data.lengths import within_length
        from rlseq.data.prompts import made_prompts
        from rlseq.data.rows import load_rows
        from rlseq.engine.model.quantization import quantization_bits
        from rlseq.evaluation.measure.loading import load_tokenizer
        from rlseq.evaluation.results.clusters import check_clusters, count_clusters
        from rlseq.evaluation.run import contrast_and_report
        from rlseq.evaluation.stats.power import describe_power
        from rlseq.evaluation.tune_decoding import sweeps
        from rlseq.scoring import load_rewards

    named = parse_models(models)
    if not named:
        raise ConfigError("no model is named; give --models NAME=PATH ..., or --compare to join finished evaluations")
    if not data.dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    if not reward_funcs:
        raise ConfigError("no reward is named; give --reward_funcs (`rlseq reward list` shows the bundled ones)")
    split, prompt_options = data.eval_split, data.prompt_options() | (template_options or {})
    tuned = [sweep.spec for sweep in sweeps(settings)]
    if tuned and settings.tune_split == split:
        raise ConfigError(
            f"strategy {tuned[0]!r} is to be tuned on the split {split!r}, which is the one evaluated: it would "
            "look better than it is. Give another --tune_split, or another --eval_split (test, for the final claim)."
        )
    PartialState(cpu=not torch.accelerator.is_available())  # else several processes on CPUs each evaluate alone
    made_by = {"prompt_column": data.prompt_column, "prompt_template": data.prompt_template}
    load: Callable[[str], list[dict[str, Any]]] = partial(load_rows, data.dataset_name, **data.row_options())
    rows = load(split)[: data.eval_rows]
    if PartialState().is_main_process and split != TRAIN:
        _say_shared(rows, split, load, partial(made_prompts, **made_by))
    tuning_rows = load(settings.tune_split)[: settings.tune_rows] if tuned else []
    tokenizers = [] if data.max_prompt_length is None else [load_tokenizer(*model) for model in named.items()]
    fitting = partial(within_length, **data.length_options(), prompt_options=prompt_options)
    rows, note = fitting(rows, tokenizers, split)
    tuning_rows, tuning_note = fitting(tuning_rows, tokenizers, settings.tune_split) if tuned else ([], "")
    bits = quantization_bits(settings.quantization)
    rounded = f"All models, or the bases of adapters, are in {bits} bits (--quantization)." if bits else ""
    notes = [text for text in (note, tuning_note, rounded) if text]
    if PartialState().is_main_process:
        for text in notes:
            print(visible(f"rlseq: {text}"), flush=True)
    check_clusters(settings.cluster_column, rows)
    if PartialState().is_main_process and len(named) > 1 and rows:
        column = settings.cluster_column
        counted = (len(rows), "rows") if column is None else (count_clusters(column, rows), "clusters")
        print(f"rlseq: {describe_power(*counted)}", flush=True)
    with load_rewards(reward_funcs, max_error_rate=max_error_rate, think_end=settings.think_end) as suite:
        return contrast_and_report(
            named,
            rows,
            suite,
            settings=settings,
            prompt_options=prompt_options,
            output_dir=Path(output_dir),
            data_name=f"{data.dataset_name} ({split})",
            tuning_rows=tuning_rows,
            notes=notes,
        )


def _say_shared(rows: Sequence[Mapping], split: str, load: Callable, made: Callable) -> None:
    """Say how many of the prompts that are evaluated are also in the data set's training split, if it has one."""
    from rlseq.data.prompts import describe_shared

    try:
        said = describe_shared(made(rows), split, made(load(TRAIN)), TRAIN)
    except DataError:  # there is no such split, or no prompt can be made: of the rows evaluated, the evaluation says so
        return
    print(f"rlseq: evaluates {len(rows):,} rows ({said})", flush=True)
