"""A made-up task for trainer tests: spell letters, answer in capitals; tokenizer, prompts, rewards and settings."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlseq.config.training import GRPOConfig
from rlseq.data.rows import build_prompts
from rlseq.training.grpo import GRPOTrainer

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
    if settings.get("objective") == "expected_accuracy":
        del defaults["num_generations"]  # it draws nothing
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
