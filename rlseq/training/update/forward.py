"""One wrapped forward of a micro-batch: completions, and the references of their prompts, in one packed batch.

Several forwards a micro-batch would hang distributed training where ranks make unequal numbers of them, so all
that a loss needs (log-probs, entropies, a critic's values, the references' log-probs) comes from this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlseq.engine.packed.packing import FLEX, PackedBatch, pack, pad, unpack, unpack_padded
from rlseq.engine.packed.together import pack_together
from rlseq.training.update.head import cpu_head, plain_head, scored_head
from rlseq.training.update.teacher_targets import TeacherTargets

Ids = tuple[int, ...]

MIN_ROW_TOKENS = 64  # short groups share a row of this many tokens: little is padding, and little attention is masked


@dataclass
class References:
    """The N references of a micro-batch's U distinct prompts; equal prompts with different references are distinct.

    Attributes:
        rows: of each prompt, how many of the micro-batch's rows it stands for.
        of_row: of each of the B rows, which prompt it has.
        prompt_of: which prompt each reference belongs to.
        logprobs: of each reference, the log-probs of its tokens, (T_n,) nats.
    """

    rows: list[int] = field(default_factory=list)
    of_row: list[int] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)

    @property
    def sequence_logprobs(self) -> Tensor:
        """Log-prob of each reference, (N,) nats."""
        return torch.stack([x.sum() for x in self.logprobs])


@dataclass
class Scores:
    """What the forward says of a micro-batch of B rows, right-padded to T.

    Attributes:
        logprobs, entropies: (B, T) nats, of the distribution sampled from; entropies are 0 where the model's head
            computes none.
        values: (B, T), the critic's value of the state before each token; None without a critic.
        last_values: (B,), the value of the state after the last token; None without a critic.
        references: those of the rows' prompts, where they were asked for.
        router_loss: the load-balancing loss of a mixture of experts; None where it was not asked for.
        divergences: (B, T) nats, from the teacher; None without one.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None = None
    last_values: Tensor | None = None
    router_loss: Tensor | None = None
    divergences: Tensor | None = None
    references: References = field(default_factory=References)


def forward(
    model: nn.Module,
    prompts: Sequence[Ids],
    completions: Sequence[Ids] | None,
    width: int,
    *,
    references: Sequence[Sequence[Ids]] | None = None,
    packs: bool,
    pad_id: int,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    temperature: float | None = 1.0,
    values: bool = False,
    router_loss: bool = False,
    teacher: TeacherTargets | None = None,
) -> Scores:
    """Score a micro-batch: B rows, and the references of their prompts, by one call of `model`.

    Args:
        model: with TRL's fused head, for what `cpu_head` leaves to it; with `values`, also with a critic (`attach`).
        prompts: B prompts' ids; equal ones are computed once where `packs`.
        completions: B completions' ids; None: only the references are scored.
        width: T of the result; no completion is longer.
        references: of each row; None: none.
        packs: whether the model can be given packed rows (`rlseq.engine.packed.self_tests.supports_packing`).
        pad_id, dtype, device, attention: of the batch; the model's own.
        temperature: that completions were sampled at, as TRL's fused head was told; None: that head is asked always.
        values: whether the critic is asked too.
        router_loss: whether a mixture of experts is asked for its load-balancing loss too, which counts each row's
            tokens: nothing is packed.
        teacher: of the B rows; the model's head must then be one that `plain_head` gives.
    """
    rows_of: dict[tuple[Ids, tuple[Ids, ...]], list[int]] = {}  # (prompt, its references) -> rows
    for row, prompt in enumerate(prompts):
        rows_of.setdefault((prompt, tuple(references[row]) if references else ()), []).append(row)
    groups: list[tuple[Ids, list[Ids]]] = []
    place_of = [0] * len(prompts)  # row -> place among the flattened groups' completions
    found, places = References(of_row=[0] * len(prompts)), []  # places: of the references
    place = 0
    for number, ((prompt, extra), rows) in enumerate(rows_of.items()):
        mine = [] if completions is None else [completions[row] for row in rows]
        groups.append((prompt, [*mine, *extra]))
        for row in rows:
            found.of_row[row] = number
        if mine:
            for row in rows:
                place_of[row] = place
                place += 1
        found.rows.append(len(rows))
        found.prompt_of += [number] * len(extra)
        places += range(place, place + len(extra))
        place += len(extra)
    layout = {"pad_id": pad_id, "dtype": dtype, "device": device, "attention": attention}
    batch = collate(groups, packs=packs and not router_loss, **layout)
    more = {"return_values": True} if values else {}
    if router_loss:
        more["output_router_logits"] = True
    head = None if router_loss or temperature is None else cpu_head(model)
    if teacher is not None:
        head, teacher = plain_head(model), teacher.placed(batch, place_of)
    with without_holes(model) if device.type == "cpu" else contextlib.nullcontext():
        if head is None:
            outputs = model(**batch.model_inputs, labels=batch.labels, fused_lm_head=True, **more)
            of_tokens, entropies = outputs.log_probs, outputs.entropy
        else:
            with scored_head(head, batch.labels, temperature, teacher):
                outputs = model(**batch.model_inputs, use_cache=False, **more)
            of_tokens, entropies, *divergences = outputs.logits.unbind(-1)
    if places:
        sequences = unpack(of_tokens, batch)
        found.logprobs = [sequences[i] for i in places]
    if completions is None:
        empty = of_tokens.flatten()[:0].view(len(prompts), 0)  # of no entries, and yet of the model's graph
        return Scores(empty, empty, references=found)
    select = torch.tensor(place_of, device=device)
    longest = max(width, *batch.lengths) if batch.lengths else width

    def rows_by_tokens(per_token: Tensor) -> Tensor:
        return unpack_padded(per_token, batch, longest)[select, :width]  # (B, T)

    logprobs = rows_by_tokens(of_tokens)
    # TRL's head of a reference model computes no entropies.
    entropies = logprobs.new_zeros(logprobs.shape) if entropies is None else rows_by_tokens(entropies)
    scores = Scores(logprobs, entropies, references=found, router_loss=outputs.aux_loss if router_loss else None)
    if teacher is not None:
        scores.divergences = rows_by_tokens(divergences[0])
    if values:
        scores.values = rows_by_tokens(outputs.state_values[:, :-1])  # column t-1: the state before token t
        after = [x[-1] if len(x) else x.sum() for x in unpack(outputs.state_values, batch, shifted=False)]
        scores.last_values = torch.stack(after)[select]
    return scores


LARGE_LAYER = 1_000_000  # parameters; in a smaller layer giving memory back takes as long as computing
LAYERS_BETWEEN = 4  # after which memory is given back; after each it took a fifth of an update's time


@contextlib.contextmanager
def without_holes(model: nn.Module) -> Iterator[None]:
    """While a forward keeps activations on a CPU, return to the system after every few layers what lies free between.

    torch asks for aligned blocks, and glibc's heap often cannot use a freed one for the next of its size: between the
    kept activations of a layer its temporaries stayed, a third of the peak (SmolLM2-135M, LoRA on all linear layers).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None or not torch.is_grad_enabled():
        yield
        return

    def after(*_: object) -> None:  # what a hook returns replaces the layer's result: nothing
        trim(0)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if sum(p.numel() for layer in layers[:1] for p in layer.parameters()) < LARGE_LAYER:
        yield
        return
    hooks = [layer.register_forward_hook(after) for layer in layers[LAYERS_BETWEEN - 1 :: LAYERS_BETWEEN]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def collate(groups, *, packs: bool, pad_id: int, device: torch.device, **layout) -> PackedBatch:
    """The one place where a training batch is laid out: packed, or padded for models that packing cannot serve."""
    if packs:
        options = {"pad_id": pad_id, "device": device, "whole_groups": True, **layout}
        if device.type == "cpu" or layout["attention"] == FLEX:  # else a longer row's attention costs its square
            together = pack_together(groups, **options)
            if together is not None:
                return together
        return pack(groups, row_tokens=MIN_ROW_TOKENS, **options)
    flat = [(prompt, completion) for prompt, completions in groups for completion in completions]
    flat = flat or [(prompt, ()) for prompt, _ in groups]  # nothing to score, but a model that every rank calls
    return pad([p for p, _ in flat], [c for _, c in flat], pad_id=pad_id, device=device)
