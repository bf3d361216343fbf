"""Teacher forcing: make the references, or a model's own best samples, likely; for an existing model or a new one.

    accelerate launch --config_file accelerate_config.yaml recipes/sft.py --config recipes/g2p/sft.yaml

One forward pass scores every prefix of a reference; the loss is the mean next-token loss over the completion, its
EOS included. With no arguments it trains the bundled grapheme-to-phoneme base from scratch (35 minutes on 2 cores;
recipes/g2p/README.md has the curve). `--config` and flags take any model and data; every field of TRL's SFTConfig
and ModelConfig is a flag under its TRL name.

Rejection-sampling fine-tuning trains on the model's own samples that scored best instead of the references: the
baseline that tells whether sampling from the model *as it changes* (recipes/grpo.py) matters. The samples are those
a run has logged, or are sampled then, and logged in rollouts/000000.jsonl (`rlseq show RUN`):

    accelerate launch recipes/sft.py --model_name_or_path M --dataset_name D --from_rollouts runs/g2p-grpo
    accelerate launch recipes/sft.py --model_name_or_path M --dataset_name D \
        --rejection_samples 16 --reward_funcs phoneme_accuracy --min_reward 1.0

A prompt keeps its `--rejection_keep` best distinct completions; those that were cut are never kept. Validation stays
on the references of `--eval_split`.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import set_seed

from rlseq.common.formats import METRICS
from rlseq.config.groups.adapters import peft_config_of
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import (
    ModelArguments,
    NewModelArguments,
    RejectionArguments,
    RunArguments,
    SFTConfig,
    TrainingDataArguments,
)
from rlseq.config.validation.checks import describe_left_out
from rlseq.data.curriculum import rows_in_range
from rlseq.data.prompts import build_prompts, describe_shared
from rlseq.data.rows import load_rows
from rlseq.engine.thoughts import check_ends
from rlseq.errors import ConfigError
from rlseq.evaluation.report.plots import write_curves
from rlseq.evaluation.run import read_jsonl
from rlseq.scoring import load_rewards
from rlseq.scoring.check.smoke_test import smoke_test_rewards
from rlseq.scoring.specs.find import bundled_folder
from rlseq.training.models import (
    build_model,
    build_tokenizer,
    check_model_path,
    load_model,
    load_tokenizer,
    merge_result,
    new_config,
)
from rlseq.training.plan.dry_run import describe_examples, plan_examples
from rlseq.training.plan.memory import weightless_model
from rlseq.training.run.best import choose_best_by
from rlseq.training.run.callbacks import EarlyStopping, GracefulStop, MetricsWriter, Progress
from rlseq.training.run.inputs import run_inputs
from rlseq.training.run.launch import run_recipe
from rlseq.training.run.recipe import (
    announce,
    check_fit,
    default_config,
    finish,
    fitting_rows,
    open_run,
    prompt_options,
    say,
)
from rlseq.training.run.rollout_log import RolloutLog
from rlseq.training.selection.rejection import (
    Record,
    best_completions,
    fitting_candidates,
    prompts_together,
    read_candidates,
    require_survivors,
    sample_candidates,
)
from rlseq.training.sft import MEASURED, check_examples, check_prefill
from rlseq.training.trl.checkpoint.publish import publish
from rlseq.training.trl.sft import SFTTrainer
from rlseq.types import Prompt

DEFAULT_CONFIG = bundled_folder("recipes") / "g2p" / "sft.yaml"


def main() -> None:
    parser = RecipeParser(
        [TrainingDataArguments, NewModelArguments, RejectionArguments, RunArguments, SFTConfig, ModelArguments],
        description=__doc__.splitlines()[0],
    )
    data, new, rejection, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts.
    if bool(new.new_model) == bool(model_args.model_name_or_path):
        raise ConfigError("name either an existing model (--model_name_or_path) or a new one (new_model), not both")
    if new.new_model and not new.new_tokenizer:
        raise ConfigError("a new model needs new_tokenizer: a path or hub id, or path/to/file.py:function")
    if not data.dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    if rejection.rejection_samples and new.new_model:
        raise ConfigError("--rejection_samples samples from the model as it starts; name one by --model_name_or_path")
    if rejection.from_rollouts and data.curriculum:
        raise ConfigError("--curriculum chooses rows of the data, and --from_rollouts trains on a log: leave out one")
    if config.metric_for_best_model is not None:
        choose_best_by(config, MEASURED, "loss")
    if not new.new_model:
        check_model_path(model_args.model_name_or_path)
        tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    else:
        tokenizer = build_tokenizer(new.new_tokenizer)

    def prompts_of(split: str, limit: int | None) -> list[Prompt]:
        weighted = split == data.train_split
        rows = load_rows(data.dataset_name, split, **data.row_options(), weighted=weighted)[:limit]
        if weighted and (chosen := data.curriculum_range()) is not None:
            rows, dropped = rows_in_range(rows, data.curriculum_column, *chosen)
            say(f"rlseq: {dropped}")
        rows, _ = fitting_rows(rows, split, data, config, tokenizer)
        return build_prompts(rows, tokenizer, **prompt_options(data, config))

    # One example a (prompt, reference): all of a prompt's references are right answers.
    def references_of(prompts: list[Prompt], split: str) -> datasets.Dataset:
        pairs = [(p.prompt, r) for p in prompts for r in p.columns["references"]]
        if not pairs:
            raise ConfigError(
                f"no row of {data.dataset_name!r} has a reference in --reference_column {data.reference_column!r}"
            )
        if without := sum(not p.columns["references"] for p in prompts):
            count = f"{without:,} of {len(prompts):,} {split} rows"
            say(f"rlseq: warning: {count} are left out: they have no reference, which teacher forcing needs")
        return examples(pairs, config.chat_template_kwargs)

    # TRL silently cuts what is longer than max_length.
    def measure(examples: datasets.Dataset, name: str, batch: int = 1) -> list[int]:
        lengths, cut = check_examples(config, examples, tokenizer, name=name, batch=batch)
        if cut:
            say(f"rlseq: warning: {cut}. Raise --max_length, or shorten them.")
        whole = name == "training" and config.dataloader_drop_last and not cut and not config.packing
        if whole and (left_out := describe_left_out(len(lengths), batch, "training examples")):
            say(f"rlseq: {left_out}")
        return lengths

    batch = config.per_device_train_batch_size * PartialState().num_processes
    held_out = prompts_of(data.eval_split, data.eval_rows)
    validation = references_of(held_out, data.eval_split)
    prompts = held_out if rejection.from_rollouts else prompts_of(data.train_split, data.train_rows)
    sample_tokens = rejection.max_new_tokens if rejection.rejection_samples else None
    if rejection.rejection_samples:  # else the examples are checked, which are there already
        check_ends(rejection.stop_strings, rejection.think_end, tokenizer)
        check_prefill((prompt.prompt for prompt in prompts), "training")
    made = new_config(new.new_model, tokenizer) if new.new_model else None
    check_fit(config, model_args, tokenizer, prompts, sample_tokens=sample_tokens, new=made)
    if rejection.from_rollouts:
        given = read_candidates(rejection.from_rollouts)
        candidates, left_out = fitting_candidates(given, data, tokenizer, config.chat_template_kwargs)
        if left_out:
            say(f"rlseq: {left_out}")
        train, what = select(candidates, rejection, config.chat_template_kwargs)
    elif rejection.rejection_samples:
        suite = load_rewards(
            rejection.reward_funcs,
            weights=rejection.reward_weights,
            max_error_rate=rejection.max_error_rate,
            think_end=rejection.think_end,
        )
        smoke_test_rewards(suite, prompts)
        what = f"{len(prompts):,} prompts × {rejection.rejection_samples} samples to choose from"
    else:
        train = references_of(prompts, data.train_split)
        what = f"{len(train):,} training examples"
    if config.eval_strategy != "no":
        measure(validation, data.eval_split)
    lengths = [] if rejection.rejection_samples else measure(train, "training", batch)
    trained = [c["prompt"] for c in candidates] if rejection.from_rollouts else [p.prompt for p in prompts]
    shared = describe_shared((p.prompt for p in held_out), data.eval_split, trained, "training")
    if run.dry_run:
        samples, cached = len(prompts) * (rejection.rejection_samples or 0), 0
        if samples:  # which samples are kept is not known: as many as may be, each as long as may be
            longest = max(len(p.prompt_ids) for p in prompts) + rejection.max_new_tokens
            lengths = [longest] * len(prompts) * min(rejection.rejection_keep, rejection.rejection_samples)
            own = -(-len(prompts) // PartialState().num_processes)
            cached = longest * rejection.rejection_samples * min(own, prompts_together(rejection.rejection_samples))
        with torch.device("meta"):
            model = build_model(new.new_model, tokenizer) if new.new_model else weightless_model(model_args)
        sizes = {"rollouts": samples, "cached_tokens": cached}
        say(describe_examples(config, run, model_args, model, lengths, shared=shared, **sizes))
        return
    rewards = {"reward": suite} if rejection.rejection_samples else {}
    rows = [(p.prompt, p.columns) for p in prompts] if rejection.rejection_samples else train
    inputs = run_inputs(rewards, {"training rows": rows, "evaluation rows": validation}, texts=data.rendering())
    known = lengths and not config.packing  # else how many rows there will be is not known yet
    steps = plan_examples(config, lengths, PartialState().num_processes).steps if known else None
    directory = open_run(config, run, data, new, rejection, model_args, inputs=inputs, steps=steps)
    announce(config, run, f"{what} and {len(validation):,} {data.eval_split} examples ({shared})")

    set_seed(config.seed)
    model = build_model(new.new_model, tokenizer) if new.new_model else load_model(model_args)
    if rejection.rejection_samples:
        logged = directory.rollouts / "000000.jsonl"
        if directory.resume_from and logged.exists():
            candidates = read_candidates([str(logged)])  # by the weights the run started from
        else:
            candidates = sample_candidates(
                model.to(PartialState().device),
                prompts,
                suite,
                tokenizer,
                num_samples=rejection.rejection_samples,
                temperature=rejection.temperature,
                max_new_tokens=rejection.max_new_tokens,
                seed=config.seed,
                stop_strings=rejection.stop_strings,
            )
            if PartialState().is_main_process:
                RolloutLog(directory.rollouts).write(0, candidates)
        suite.close()
        train, what = select(candidates, rejection, config.chat_template_kwargs)
        measure(train, "training", batch)
        say(f"rlseq: trains on {what}")
    callbacks = [MetricsWriter(directory.metrics)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.early_stopping_patience))
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=peft_config_of(model_args),
        callbacks=callbacks,
    )
    Progress.replace_default(trainer)
    trainer.add_callback(stop := GracefulStop())
    trainer.train(resume_from_checkpoint=directory.resume_from)
    ended = finish(trainer, directory, stop)
    if trainer.is_world_process_zero():
        write_curves(read_jsonl(directory.metrics, METRICS), directory.curves)
    if ended:
        merge_result(config.output_dir, model_args)
        publish(trainer, base_model=model_args.model_name_or_path, dataset_name=data.dataset_name)
    directory.release()


def examples(pairs: list[tuple[Any, str]], template_options: Mapping[str, Any] | None = None) -> datasets.Dataset:
    """(prompt, completion text) pairs as TRL takes them: text, or for chat prompts an assistant's message.

    TRL reads what the chat template is told besides from a column of the examples.
    """
    chat = not isinstance(pairs[0][0], str)
    columns = {
        "prompt": [prompt for prompt, _ in pairs],
        "completion": [[{"role": "assistant", "content": text}] if chat else text for _, text in pairs],
    }
    if chat and template_options:
        columns["chat_template_kwargs"] = [dict(template_options)] * len(pairs)
    made = datasets.Dataset.from_dict(columns)
    if not chat or made[:]["prompt"] == columns["prompt"]:
        return made
    if not hasattr(datasets, "Json"):
        raise ConfigError("chat messages have unequal keys, which need a newer `datasets`: pip install -U datasets")
    kinds = datasets.Features({**made.features, "prompt": datasets.Json()})  # else each has the others' keys, as None
    return datasets.Dataset.from_dict(columns, features=kinds)


def select(
    candidates: list[Record], rejection: RejectionArguments, template_options: Mapping[str, Any] | None
) -> tuple[datasets.Dataset, str]:
    """The best of the samples as training examples, and a line that says how many there are."""
    kept = best_completions(candidates, keep=rejection.rejection_keep, min_total=rejection.min_reward)
    require_survivors(kept, candidates, rejection.min_reward)
    mean = sum(record["total"] for record in kept) / len(kept)
    what = f"the best {len(kept):,} of {len(candidates):,} samples (mean total {mean:.4g})"
    return examples([(record["prompt"], record["completion"]) for record in kept], template_options), what


if __name__ == "__main__":
    run_recipe(main)
