"""The teacher of on-policy distillation: checked before a model loads, frozen, asked once per batch of rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import is_deepspeed_zero3_enabled

from rlseq.engine.model.info import attention_of, base_of, eval_mode
from rlseq.engine.model.load import load_model
from rlseq.engine.packed.logits import last_hidden_states
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.errors import ConfigError, ModelError
from rlseq.training.models import check_model_path, load_tokenizer
from rlseq.training.rollouts import MicroBatch
from rlseq.training.update.forward import collate
from rlseq.training.update.head import plain_head
from rlseq.training.update.teacher_targets import TeacherTargets

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def check_teacher(args: Any, tokenizer: Any) -> None:
    """Refuse a teacher that is not there, or reads other tokens than the student; no weights are loaded.

    Raises:
        ModelError: there is no model, or its tokenizer is another one; the message says where they differ.
    """
    name = args.teacher_name_or_path
    if name is None:
        return
    check_model_path(name)
    if differing := tokenizer_differences(tokenizer, load_tokenizer(name)):
        raise ModelError(
            f"the teacher {name!r} has another tokenizer than the model: {'; '.join(differing)}. Token by token they "
            "cannot be compared: take a teacher of the same family, or train on its samples (recipes/sft.py)."
        )


def tokenizer_differences(own: Any, other: Any) -> list[str]:
    """What makes two tokenizers read or end a text differently, in words: vocabulary, merges, special tokens."""
    found = []
    ours, theirs = own.get_vocab(), other.get_vocab()
    if moved := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        example = moved[0]
        ids = f"id {theirs.get(example)}, not {ours.get(example)}"
        found.append(f"{len(moved):,} tokens of the vocabulary, such as {example!r} ({ids})")
    if _merges(own) != _merges(other):
        found.append("the merges")
    for name in _SPECIAL[:2]:  # padding and unknown tokens are not trained
        if getattr(own, name) != getattr(other, name):
            found.append(f"the special token {name} {getattr(other, name)}, not {getattr(own, name)}")
    return found


def _merges(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")


class Teacher:
    """Gives the last hidden states of its own model, or of the policy's base without the adapter.

    Args:
        trainer: TRL's, with the policy and the settings.
        longest: tokens of the longest prompt and completion; None where that is not known.

    Attributes:
        is_shared: whether it is the policy's base.

    Raises:
        ConfigError: the run shards the policy, or one of the heads cannot be read.
        ModelError: it cannot be loaded.
    """

    def __init__(self, trainer: Any, *, longest: int | None):
        self.trainer, args = trainer, trainer.args
        self.name = args.teacher_name_or_path
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ConfigError(
                "teacher_name_or_path needs the output layer whole on every process, which FSDP and ZeRO-3 shard: "
                "take data parallelism (DDP), or ZeRO-1 or 2"
            )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if plain_head(policy) is None:
            raise ConfigError(
                "teacher_name_or_path needs logits that are the output layer's product with the last hidden state; "
                "this model scales, caps or quantises them, or is compiled. Leave the teacher out."
            )
        self.is_shared = shares_base(policy, args)
        if self.is_shared:
            self.model = policy
        else:
            self.model = load_model(
                self.name,
                what="the teacher",
                dtype=args.teacher_dtype or policy.dtype,
                attn_implementation=attention_of(policy),
                quantization=args.teacher_quantization_fields(),
                **({} if args.teacher_quantization else {"device": trainer.accelerator.device}),
            ).requires_grad_(False)
        head = plain_head(self.model)
        if head is None:
            raise ConfigError(
                f"the teacher {self.name!r} scales, caps or quantises its logits, which are not its output layer's "
                "product alone. Take another teacher."
            )
        self.head = head
        with self._alone() as model:
            self.packs, reason = False, "pack_updates is off"
            if args.pack_updates:
                self.packs, reason = supports_packing(model, longest=longest)
        if args.pack_updates and not self.packs and trainer.accelerator.is_main_process:
            print(f"rlseq: the teacher's forwards are not packed: {reason}", flush=True)

    @contextmanager
    def _alone(self) -> Iterator[nn.Module]:
        """The teacher in eval mode; of a shared base, while the adapter is off."""
        with torch.no_grad(), eval_mode(self.model):
            if self.is_shared:
                with self.model.disable_adapter():
                    yield base_of(self.model)
            else:
                yield self.model

    def states(self, trained: MicroBatch) -> Tensor:
        """The last hidden state before each token of a batch's completions, (B, T, H), a micro-batch at a time."""
        size, rows = self.trainer.args.per_device_train_batch_size, range(len(trained))
        with self._alone() as model, self.trainer.accelerator.autocast():
            parts = [self._states_of(model, trained.select(rows[start : start + size])) for start in rows[::size]]
        return torch.cat(parts)

    def _states_of(self, model: nn.Module, part: MicroBatch) -> Tensor:
        rows_of: dict[tuple[int, ...], list[int]] = {}  # prompt -> rows
        for row, prompt in enumerate(part.prompt_ids):
            rows_of.setdefault(prompt, []).append(row)
        trains = part.mask.any(1).tolist()
        completions = [ids if counts else () for ids, counts in zip(part.completion_ids, trains, strict=True)]
        batch = collate(
            [(prompt, [completions[row] for row in rows]) for prompt, rows in rows_of.items()],
            packs=self.packs,
            pad_id=self.trainer.processing_class.pad_token_id,
            dtype=next(model.parameters()).dtype if self.is_shared else model.dtype,
            device=self.trainer.accelerator.device,
            attention=attention_of(model),
        )
        hidden = last_hidden_states(model, batch)  # (R, S, H)
        found = hidden[batch.token_rows, batch.token_columns - 1].split(batch.lengths)
        order = [row for rows in rows_of.values() for row in rows]
        by_row = dict(zip(order, found, strict=True))
        width = hidden.new_zeros(part.mask.shape[1], hidden.shape[2])  # the longest, so that every part is as wide
        return pad_sequence([width, *(by_row[row] for row in range(len(part)))], batch_first=True)[1:]

    def targets(self, states: Tensor) -> TeacherTargets:
        """Its states (B, T, H) with what the loss is told of it."""
        args, head = self.trainer.args, self.head
        temperature = args.teacher_temperature or self.trainer.temperature
        how = args.teacher_divergence, args.teacher_jsd_beta
        return TeacherTargets(states, head.weight.detach(), head.bias, *how, temperature)


def shares_base(policy: Any, args: Any) -> bool:
    """Whether the teacher is the base of the policy's adapter, as it is held: it then needs no weights of its own.

    An adapter on the output layer itself, or one that trains a copy of it or of the embedding, keeps them apart.
    """
    if not isinstance(policy, PeftModel) or args.teacher_dtype or args.teacher_quantization:
        return False
    base = base_of(policy)
    whole = any(config.modules_to_save for config in policy.peft_config.values())
    return base.config._name_or_path == args.teacher_name_or_path and not whole
