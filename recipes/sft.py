"""Teacher forcing: make the references likely, for an existing model or a new one.

    accelerate launch --config_file accelerate_config.yaml recipes/sft.py --config recipes/g2p/sft.yaml

One forward pass scores every prefix of a reference; the loss is the mean next-token loss over the completion, its
EOS included. With no arguments it trains the bundled grapheme-to-phoneme base from scratch (35 minutes on 2 cores;
recipes/g2p/README.md has the curve). `--config` and flags take any model and data; every field of TRL's SFTConfig
and ModelConfig is a flag under its TRL name.
"""

from pathlib import Path

import datasets
import trl
from transformers import EarlyStoppingCallback, set_seed

from rlseq.data import build_prompts, load_rows
from rlseq.errors import ConfigError
from rlseq.evaluation.contrast import read_jsonl
from rlseq.evaluation.plots import write_curves
from rlseq.training.callbacks import GracefulStop, MetricsWriter, Progress
from rlseq.training.config import DataArguments, ModelArguments, NewModelArguments, RunArguments, SFTConfig
from rlseq.training.models import build_model, build_tokenizer, check_model_path, load_model, load_tokenizer
from rlseq.training.parser import RecipeParser, run_recipe
from rlseq.training.recipe import announce, default_config, finish, open_run
from rlseq.training.sft import SFTTrainer

DEFAULT_CONFIG = Path(__file__).parent / "g2p" / "sft.yaml"


def main() -> None:
    parser = RecipeParser([DataArguments, NewModelArguments, RunArguments, SFTConfig, ModelArguments])
    data, new, run, config, model_args = parser.parse(default_config=default_config(DEFAULT_CONFIG))

    # Everything that can be wrong is found before anything expensive starts.
    if bool(new.new_model) == bool(model_args.model_name_or_path):
        raise ConfigError("name either an existing model (--model_name_or_path) or a new one (new_model), not both")
    if new.new_model and not new.new_tokenizer:
        raise ConfigError("a new model needs new_tokenizer: a path or hub id, or path/to/file.py:function")
    if not data.dataset_name:
        raise ConfigError("no data is named; give --dataset_name (task module, file, folder or hub id)")
    if not new.new_model:
        check_model_path(model_args.model_name_or_path)
    tokenizer = build_tokenizer(new.new_tokenizer) if new.new_model else load_tokenizer(model_args.model_name_or_path)

    # One example a (prompt, reference): all of a prompt's references are right answers.
    def examples(split: str, limit: int | None) -> datasets.Dataset:
        rows = load_rows(data.dataset_name, split, config_name=data.dataset_config)[:limit]
        prompts = build_prompts(rows, tokenizer, **data.prompt_options())
        pairs = [(p.messages_or_text, r, p.prompt_ids) for p in prompts for r in p.columns["references"]]
        if not pairs:
            raise ConfigError(
                f"no row of {data.dataset_name!r} has a reference in --reference_column {data.reference_column!r}"
            )
        chat = not isinstance(pairs[0][0], str)
        return datasets.Dataset.from_dict(
            {
                "prompt": [prompt for prompt, _, _ in pairs],
                "completion": [[{"role": "assistant", "content": r}] if chat else r for _, r, _ in pairs],
            }
        )

    train, validation = examples(data.train_split, data.train_rows), examples(data.eval_split, data.eval_rows)
    directory = open_run(config, run, data, new, model_args)
    announce(config, run, f"{len(train):,} training and {len(validation):,} {data.eval_split} examples")

    set_seed(config.seed)
    model = build_model(new.new_model, tokenizer) if new.new_model else load_model(model_args)
    callbacks = [MetricsWriter(directory.metrics)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
        callbacks=callbacks,
    )
    Progress.replace_default(trainer)
    trainer.add_callback(stop := GracefulStop())
    trainer.train(resume_from_checkpoint=directory.resume_from)
    finish(trainer, directory, stop)
    if trainer.is_world_process_zero():
        write_curves(read_jsonl(directory.metrics), directory.curves)


if __name__ == "__main__":
    run_recipe(main)
