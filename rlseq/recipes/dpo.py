"""DPO: prefer the better of two completions that a run sampled, without sampling anew.

    accelerate launch recipes/dpo.py --model_name_or_path M --from_rollouts runs/extraction --beta 0.1

Pairs are made within each group that the run logged (the samples of a prompt in one step): the best against the
worst by total reward, then the second best against the second worst; equal totals and cut completions are in no pair.
`--pairs_per_prompt` and `--min_margin` choose among them. The loss is TRL's (`--loss_type sigmoid|hinge|ipo|...`,
`--beta`); every field of TRL's DPOConfig and ModelConfig is a flag under its TRL name.

metrics.jsonl and curves.png show the log-probs of chosen *and* rejected completions (`logps/chosen`, `logps/rejected`).
The loss is of their difference, so both may fall: the model then moves to completions that are in no pair.
`--eval_from_rollouts` with `--eval_strategy steps` measures the same on other pairs.
"""

import datasets
import torch
from accelerate import PartialState
from transformers import set_seed

from rlseq.common.formats import METRICS
from rlseq.config.groups.adapters import peft_config_of
from rlseq.config.groups.preferences import DPOConfig, PairArguments
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.training import ModelArguments, RunArguments
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.report.plots import write_curves
from rlseq.evaluation.run import read_jsonl
from rlseq.training.models import check_model_path, load_model, load_tokenizer, merge_result
from rlseq.training.plan.dry_run import describe_examples, plan_examples
from rlseq.training.plan.memory import weightless_model
from rlseq.training.run.callbacks import GracefulStop, MetricsWriter, Progress
from rlseq.training.run.inputs import run_inputs
from rlseq.training.run.launch import run_recipe
from rlseq.training.run.recipe import announce, check_fit, finish, open_run, say
from rlseq.training.selection.preferences import describe_pairs, pair_examples, preference_pairs, require_pairs
from rlseq.training.selection.rejection import read_candidates
from rlseq.training.sft import example_lengths
from rlseq.training.trl.checkpoint.publish import publish
from rlseq.training.trl.dpo import DPOTrainer


def main() -> None:
    parser = RecipeParser([PairArguments, RunArguments, DPOConfig, ModelArguments], description=__doc__.splitlines()[0])
    given, run, config, model_args = parser.parse()

    # Everything that can be wrong is found before anything expensive starts.
    if not given.from_rollouts:
        raise ConfigError("no rollouts are named; give --from_rollouts (run directories or jsonl files)")
    if config.eval_strategy != "no" and not given.eval_from_rollouts:
        raise ConfigError(f"eval_strategy is {config.eval_strategy}, but there are no pairs: give --eval_from_rollouts")
    check_model_path(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)

    def pairs_of(paths: list[str]) -> tuple[datasets.Dataset, str]:
        records = read_candidates(paths)
        pairs = preference_pairs(records, pairs_per_prompt=given.pairs_per_prompt, min_margin=given.min_margin)
        require_pairs(pairs, records, given.min_margin)
        return pair_examples(pairs), describe_pairs(pairs, records)

    train, what = pairs_of(given.from_rollouts)
    validation, _ = pairs_of(given.eval_from_rollouts) if given.eval_from_rollouts else (None, "")
    check_fit(config, model_args, tokenizer, build_prompts(({"prompt": p} for p in train["prompt"]), tokenizer))
    sides = [example_lengths(train.rename_column(side, "completion"), tokenizer, {}) for side in ("chosen", "rejected")]
    if config.max_length and (longest := max(map(max, sides))) > config.max_length:
        say(f"rlseq: warning: max_length {config.max_length} cuts completions (the longest has {longest:,} tokens)")
    lengths = [chosen + rejected for chosen, rejected in zip(*sides, strict=True)]  # both are one example's
    if run.dry_run:
        with torch.device("meta"):
            model = weightless_model(model_args)
        say(f"rlseq: {what}")
        say(describe_examples(config, run, model_args, model, lengths))
        return
    inputs = run_inputs({}, {"training rows": train, "evaluation rows": validation or []})
    steps = plan_examples(config, lengths, PartialState().num_processes).steps
    directory = open_run(config, run, given, model_args, inputs=inputs, steps=steps)
    announce(config, run, what)

    set_seed(config.seed)
    trainer = DPOTrainer(
        load_model(model_args),
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=peft_config_of(model_args),
        callbacks=[MetricsWriter(directory.metrics)],
    )
    Progress.replace_default(trainer)
    trainer.add_callback(stop := GracefulStop())
    trainer.train(resume_from_checkpoint=directory.resume_from)
    ended = finish(trainer, directory, stop)
    if trainer.is_world_process_zero():
        write_curves(read_jsonl(directory.metrics, METRICS), directory.curves)
    if ended:
        merge_result(config.output_dir, model_args)
        publish(trainer, base_model=model_args.model_name_or_path, dataset_name=None)
    directory.release()


if __name__ == "__main__":
    run_recipe(main)
