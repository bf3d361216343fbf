"""`rlseq evaluate`: contrast named checkpoints on one data set, in one process."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlseq.errors import ConfigError, did_you_mean
from rlseq.evaluation.seeds import methods, numbered

DEFAULT_STRATEGIES = ("greedy", "sample", "beam")
STRATEGIES_HELP = (
    "Decoding strategies (default: greedy sample beam), with settings: sample:temperature=0.7, beam:width=10, "
    "best_of:n=8, best_of:n=8,by=REWARD, mbr:n=8,utility=REWARD, exact_map:max_nodes=10000. Of several numbers, "
    "sample:temperature=0.5/0.7/1, the best is chosen for each model on --choose_split; see docs/evaluation.md."
)
MODELS_HELP = "Checkpoints; the first is the baseline, and a name repeated is one method with several training seeds."
COMPARE_HELP = "Join finished evaluations (results.json or its folder) instead; NAME names the checkpoint in one."
DEFAULT_STUDIES = ("ranking", "coverage", "sharpening", "prefixes", "distance")
STUDIES_HELP = (
    "What else is measured: ranking, coverage, sharpening, prefixes, distance (default: these), lookahead, or none "
    "(docs/evaluation.md)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rlseq evaluate`; names are those of recipes/evaluate.py."""
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME=PATH", help=MODELS_HELP)
    add("--compare", nargs="+", metavar="[NAME=]RESULTS", help=COMPARE_HELP)
    add("--dataset_name", help="Task module, local json/jsonl/csv/parquet file or folder, or hub id.")
    add("--dataset_config", help="Configuration name of a hub data set.")
    add("--reward_funcs", nargs="+", help="Rewards that measure quality.")
    add("--output_dir", required=True, help="Where results.json and report.html go.")
    add("--eval_split", default="validation", help="Split to evaluate on (default: validation).")
    add("--eval_rows", type=int, help="Only the first so many rows.")
    add("--prompt_column", default="prompt", help="Column of the prompt (default: prompt).")
    add("--reference_column", default="references", help="Column of the right answer (default: references).")
    add("--prompt_template", help="Jinja template over a row's columns that makes the prompt.")
    add("--reference_template", help="Jinja template over a row's columns that makes the reference.")
    add("--merge_references", action="store_true", help="Make rows with equal prompts one row.")
    add("--strategies", nargs="+", default=list(DEFAULT_STRATEGIES), help=STRATEGIES_HELP)
    add("--choose_split", default="validation", help="Split on which strategies' numbers are chosen (validation).")
    add("--choose_rows", type=int, default=500, help="Only its first so many rows (default: 500).")
    add("--samples_per_row", type=int, default=4, help="Completions a row under sampling (default: 4).")
    add("--max_new_tokens", type=int, default=256, help="Longest completion (default: 256).")
    add("--eval_batch_size", type=int, default=256, help="Rows decoded together (default: 256).")
    add("--max_kv_gb", type=float, help="Budget for the KV cache, in gigabytes: fewer rows together (default: none).")
    add("--eval_seed", type=int, default=0, help="Seed of sampling and bootstrap (default: 0).")
    add("--resamples", type=int, default=10_000, help="Bootstrap resamples (default: 10,000).")
    add("--exact_map_rows", type=int, help="Rows on which exact search runs, the first ones (default: all).")
    add("--studies", nargs="+", default=list(DEFAULT_STUDIES), help=STUDIES_HELP)
    add("--study_rows", type=int, default=500, help="Rows that costly studies run on, the first ones (default: 500).")
    add("--coverage_samples", type=int, default=32, help="Completions a row that coverage draws (default: 32).")
    add("--temperatures", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.85, 1.0, 1.2], help="Those of sharpening.")
    add("--prefix_lengths", nargs="+", type=int, default=[1, 2, 4, 8], help="Tokens that prefixes continues from.")
    add("--likelihood_dataset", help="Text without prompts, for bits per byte: txt or data files, module, or hub id.")
    add("--likelihood_config", help="Its configuration name, of a hub data set.")
    add("--likelihood_split", help="Its split (default: validation; all of it where there is the split train alone).")
    add("--likelihood_column", default="text", help="Its column (default: text).")
    add("--likelihood_rows", type=int, help="Only the first so many of its documents.")
    add("--likelihood_stride", type=int, help="Tokens that windows over it slide by (default: half the context).")
    add("--likelihood_context", type=int, help="Longest window over it, in tokens (default: the model's).")
    add("--primary", help="The one comparison with a claim, metric:strategy.")
    add("--primary_against", help="The baseline's strategy in it, if another.")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 on success."""
    from rlseq.evaluation.contrast import ContrastSettings

    if args.compare:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        refuse_beside_compare(vars(args), {name: parser.get_default(name) for name in vars(args)})
        join_finished(args.compare, output_dir=args.output_dir, reward_funcs=args.reward_funcs)
        return 0
    evaluate(
        args.models or [],
        dataset_name=args.dataset_name,
        split=args.eval_split,
        limit=args.eval_rows,
        config_name=args.dataset_config,
        prompt_options={
            name: getattr(args, name)
            for name in (
                "prompt_column",
                "reference_column",
                "prompt_template",
                "reference_template",
                "merge_references",
            )
        },
        reward_funcs=args.reward_funcs,
        settings=ContrastSettings(
            strategies=tuple(args.strategies),
            samples_per_row=args.samples_per_row,
            max_new_tokens=args.max_new_tokens,
            seed=args.eval_seed,
            resamples=args.resamples,
            batch_rows=args.eval_batch_size,
            max_kv_gb=args.max_kv_gb,
            primary=args.primary,
            primary_against=args.primary_against,
            exact_map_rows=args.exact_map_rows,
            choose_split=args.choose_split,
            choose_rows=args.choose_rows,
            studies=tuple(name for name in args.studies if name != "none"),
            study_rows=args.study_rows,
            coverage_samples=args.coverage_samples,
            temperatures=tuple(args.temperatures),
            prefix_lengths=tuple(args.prefix_lengths),
            likelihood_dataset=args.likelihood_dataset,
            likelihood_config=args.likelihood_config,
            likelihood_split=args.likelihood_split,
            likelihood_column=args.likelihood_column,
            likelihood_rows=args.likelihood_rows,
            likelihood_stride=args.likelihood_stride,
            likelihood_context=args.likelihood_context,
        ),
        output_dir=args.output_dir,
    )
    return 0


def refuse_beside_compare(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ConfigError, beside --compare, for a setting that is not at its default and would change nothing."""
    kept = ("compare", "output_dir", "reward_funcs", "eval_reward_funcs")
    given = [name for name, value in values.items() if name not in kept and value != defaults[name]]
    if given:
        raise ConfigError(
            f"--compare joins what was evaluated before, and --{', --'.join(given)} cannot change it; leave out one or "
            "the other"
        )


def join_finished(evaluations: Sequence[str], *, output_dir: str, reward_funcs: Sequence[Any] | None) -> None:
    """Join finished evaluations, write the report and print its summary; in the first process alone."""
    from accelerate import PartialState

    from rlseq.evaluation.join import join_and_report

    if PartialState().is_main_process:
        join_and_report(evaluations, output_dir, reward_funcs=reward_funcs)


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
        if local.is_dir() and not any(local.glob("*.safetensors")):
            raise ConfigError(f"--models: {path!r} holds no weights (*.safetensors)")
        if not local.is_dir() and (local.is_absolute() or path.count("/") != 1 or local.parent.is_dir()):
            siblings = [str(p) for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
            raise ConfigError(f"--models: there is no model at {path!r}.{did_you_mean(path, siblings)}")
        pairs.append((name, path))
    for name in bare:
        if len(alike := [path for other, path in pairs if other == name]) > 1:
            raise ConfigError(f"--models: {' and '.join(map(repr, alike))} are both called {name!r}; give NAME=PATH")
    names = numbered([name for name, _ in pairs])
    methods(names)
    return dict(zip(names, (path for _, path in pairs), strict=True))


def evaluate(
    models: Sequence[str],
    *,
    dataset_name: str | None,
    split: str,
    limit: int | None,
    config_name: str | None,
    prompt_options: Mapping[str, Any],
    reward_funcs: Sequence[Any] | None,
    settings: Any,
    output_dir: str,
    max_error_rate: float = 0.05,
) -> dict[str, Any]:
    """Check everything cheap, contrast the models, write the report and print its summary."""
    import torch
    from accelerate import PartialState

    from rlseq.data import load_rows
    from rlseq.evaluation.choice import families
    from rlseq.evaluation.contrast import contrast_and_report
    from rlseq.scoring import load_rewards

    named = parse_models(models)
    if not named:
        raise ConfigError("no model is named; give --models NAME=PATH ..., or --compare to join finished evaluations")
    if not dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    if not reward_funcs:
        raise ConfigError("no reward is named; give --reward_funcs (`rlseq reward list` shows the bundled ones)")
    choosing = [family.signature for family in families(settings)]
    if choosing and settings.choose_split == split:
        raise ConfigError(
            f"strategy {choosing[0]!r} is to be chosen on the split {split!r}, which is the one evaluated: it would "
            "look better than it is. Give another --choose_split, or another --eval_split (test, for the final claim)."
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"--eval_rows is {limit}; expected at least 1")
    PartialState(cpu=not torch.accelerator.is_available())  # else several processes on CPUs each evaluate alone
    rows = load_rows(dataset_name, split, config_name=config_name)[:limit]
    choice_rows = []
    if choosing:
        choice_rows = load_rows(dataset_name, settings.choose_split, config_name=config_name)[: settings.choose_rows]
    with load_rewards(reward_funcs, max_error_rate=max_error_rate) as suite:
        return contrast_and_report(
            named,
            rows,
            suite,
            settings=settings,
            prompt_options=prompt_options,
            output_dir=Path(output_dir),
            data_name=f"{dataset_name} ({split})",
            choice_rows=choice_rows,
        )
