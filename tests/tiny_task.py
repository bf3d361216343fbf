"""A made-up task for trainer tests: spell letters, answer in capitals; tokenizer, rows, rewards, settings, files."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlseq.config.training import GRPOConfig
from rlseq.data.prompts import build_prompts
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.rollouts import MicroBatch

VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", "=", *"abcdefghi", *"ABCDEFGHI"]  # 23 ids, as in tiny.py
ROWS = [
    {"prompt": f"{' '.join(word)} = ", "references": [" ".join(word.upper())]}
    for word in ("a", "bc", "def", "gh", "i", "abc", "ihg", "ed")
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; <eos> has id 2 and <pad> id 0, as the tiny models have them."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


LETTERS = '''
def letters(completion, references):
    """Share of the wanted letters that are there."""
    wanted = references[0].split()
    return sum(letter in completion.split() for letter in wanted) / len(wanted)
'''


def write_rows(path: Path, rows=ROWS) -> None:
    """JSON lines, one per row, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path, rows=ROWS) -> None:
    """The same rows as both splits."""
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)


def save_model(folder: Path, family: str = "llama", *, tokenizer=None, **fields) -> None:
    """A tiny model and its tokenizer; `fields` override the model's."""
    tiny_model(family, **{"initializer_range": 0.1, **fields}).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)


def write_task(folder: Path, *, rows=ROWS, **fields) -> None:
    """`folder/model` and `folder/data`."""
    save_model(folder / "model", **fields)
    write_data(folder / "data", rows)


def shares_letters(completion: str, references: list[str]) -> float:
    """A reward that random completions earn in part."""
    wanted = set(references[0].split())
    return len(wanted & set(completion.split())) / len(wanted) - 0.1 * len(completion.split())


def tiny_trainer(
    tmp_path: Path,
    *,
    family: str = "llama",
    rewards=(shares_letters,),
    model=None,
    rows=ROWS,
    tokenizer=None,
    peft_config=None,
    **settings,
):
    """A GRPO trainer on a random tiny model; `settings` override GRPOConfig's fields."""
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "loss_type": "dapo",
    }
    if settings.get("objective") in ("expected_accuracy", "max_rl"):
        del defaults["num_generations"]  # it samples nothing
    tokenizer = tokenizer or tiny_tokenizer()
    return GRPOTrainer(
        model if model is not None else tiny_model(family, initializer_range=0.1),
        list(rewards),
        GRPOConfig(**{**defaults, **settings}),
        build_prompts(rows, tokenizer),
        processing_class=tokenizer,
        rollouts_dir=tmp_path / "rollouts",
        peft_config=peft_config,
    )


def as_micro_batch(inputs: dict) -> MicroBatch:
    """A micro-batch in TRL's layout (prompts padded on the left, completions on the right) as rlseq has it."""

    def ragged(name: str) -> tuple[tuple[int, ...], ...]:
        rows = zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"].bool(), strict=True)
        return tuple(tuple(ids[mask].tolist()) for ids, mask in rows)

    ours = {
        "old_logprobs": "old_per_token_logps",
        "sampled_logprobs": "sampling_per_token_logps",
        "ref_logprobs": "ref_per_token_logps",
        "importance_ratio": "importance_sampling_ratio",
        "trained_tokens": "num_items_in_batch",
        "advantages": "advantages",
    }
    return MicroBatch(
        prompt_index=tuple(inputs["prompt_index"].tolist()),
        prompt_ids=ragged("prompt"),
        completion_ids=ragged("completion"),
        mask=(inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool(),
        **{mine: inputs[theirs] for mine, theirs in ours.items() if theirs in inputs},
    )
