"""The checks that run the model, on random token ids.

The model is a causal `transformers` model in float32 and eval mode, and is left as it was. Differences of log-probs
are the largest over all tokens, in nats, against one plain forward of each sequence alone.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlseq.common.disk import readable_size
from rlseq.doctor.check import FAILED, OK, SKIPPED, WARNING, Result, judge
from rlseq.engine.decoding.backends import SLOW, select_backend
from rlseq.engine.likelihood import score, token_logprobs
from rlseq.engine.packed.self_tests import supports_packing
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Sample
from rlseq.types import Prompt

TOLERANCE = 1e-3  # nats: rounding of float32 in deep models stays below, a wrong mask or position far above

PROMPTS, COMPLETIONS = (3, 9, 17), (12, 5, 9, 12)  # lengths; a packed row of the last prompt has 58 tokens


def check_left_padding(model: nn.Module) -> Result:
    """Padding on the left changes no log-prob: with explicit position_ids, and (another trainer's forward) without."""
    pairs = zip(_random_ids(model, PROMPTS), _random_ids(model, COMPLETIONS, seed=1), strict=False)
    rows = [prompt + completion for prompt, completion in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=_device(model))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=_device(model))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = [_alone(model, row) for row in rows]

    def difference(**more: Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        padded = [
            token_logprobs(x[-len(row) : -1], i[-len(row) + 1 :]) for row, x, i in zip(rows, logits, ids, strict=True)
        ]
        return _largest(padded, alone)

    try:
        told = difference(position_ids=positions)
    except TypeError as error:
        todo = "rlseq's sampler sends position_ids: this model cannot be sampled from"
        return Result("left padding", FAILED, f"the forward takes no position_ids: {error}", todo)
    untold = difference()
    if not told <= TOLERANCE:
        todo = "do not train it on batches of prompts of different lengths: what is sampled depends on the batch"
        return Result("left padding", FAILED, f"log-probs move by {told:.2g} nats, position_ids or not", todo)
    if not untold <= TOLERANCE:
        todo = (
            "rlseq sends position_ids everywhere; a forward that leaves them out (TRL's own) trains on other log-probs"
        )
        found = f"log-probs move by {untold:.2g} nats where position_ids are left out ({told:.1g} with them)"
        return Result("left padding", WARNING, found, todo)
    return Result("left padding", OK, f"log-probs move by at most {max(told, untold):.1g} nats")


def check_packing(model: nn.Module) -> Result:
    """Completions packed behind a shared prompt have the log-probs that they have alone."""
    prompts, completions = _random_ids(model, PROMPTS), _random_ids(model, COMPLETIONS, seed=1)
    packs, reason = supports_packing(model, max(map(len, prompts)) + max(map(len, completions)))
    if not packs:
        fallback = "rlseq uses one sequence per row: slower, and as exact"
        return Result("packing", SKIPPED, f"{reason}; {fallback}")
    pairs = [(p, c) for p in prompts for c in completions]
    packed = score(model, [p for p, _ in pairs], [c for _, c in pairs])
    alone = [_alone(model, p + c)[-len(c) :] for p, c in pairs]
    return _difference("packing", _largest(packed, alone), "set pack_updates false, and report the model to rlseq")


def check_cache(model: nn.Module) -> Result:
    """Tokens sampled with the KV cache have the log-probs that one forward of the whole sequence gives them."""
    with torch.no_grad():
        backend = select_backend(model)
    if backend in SLOW:
        found = f"logits from a batch's cache differ from those of one sequence; it is decoded {SLOW[backend]}"
        return Result("KV cache", WARNING, found, "expect slow rollouts, or update transformers or the model's code")
    sampled, alone = [], []
    for number, ids in enumerate(_random_ids(model, PROMPTS)):
        prompt = Prompt(key=str(number), prompt="", prompt_ids=tuple(ids))
        settings = {"num_samples": 4, "max_new_tokens": _fit(model, 16), "strategy": Sample(), "seed": 0}
        (rollouts,) = sample(model, [prompt], stop_ids=[-1], **settings)  # no id is -1: nothing ends early
        sampled += [torch.tensor(rollout.logprobs) for rollout in rollouts]
        alone += [_alone(model, [*ids, *r.completion_ids])[len(ids) - 1 :].cpu() for r in rollouts]
    todo = "rollouts would not be of the trained distribution: try --attn_implementation eager, or update transformers"
    return _difference("KV cache", _largest(sampled, alone), todo)


def check_causality(model: nn.Module) -> Result:
    """The gradient of a token's loss by the input embeddings is exactly 0 at it and later, and not 0 before it."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    (ids,) = _random_ids(model, [min(8, window or 8)])
    row = torch.tensor([ids], device=_device(model))
    inputs = model.get_input_embeddings()(row).detach().requires_grad_()  # (1, S, H)
    with torch.enable_grad():
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
        losses = -token_logprobs(logits[:-1], row[0, 1:])
        norms = [torch.autograd.grad(x, inputs, retain_graph=True)[0][0].abs().amax(-1) for x in losses]
    seen = torch.stack(norms).cpu()  # (S-1, S): row i-1 is of token i
    tokens = torch.arange(1, len(ids))[:, None]
    earlier = torch.arange(len(ids))[None] < tokens
    problems = []
    if (ahead := (~earlier & (seen != 0)).any(1)).any():
        todo = "use a causal model (a masked or prefix LM is not), and check its attention mask"
        found = f"{int(ahead.sum())} of {len(ahead)} tokens' losses depend on the token itself or later ones"
        problems.append((FAILED, found, todo))
    if (blind := (earlier & (seen == 0)).any(1)).any():
        found = f"{int(blind.sum())} of {len(blind)} tokens' losses do not depend on all tokens before them"
        problems.append((FAILED, found, "check the attention mask and the weights: something cuts the context"))
    return judge("causality", problems, lambda: "a token's loss depends on every earlier token, and on no later one")


def check_saving(model: nn.Module) -> Result:
    """Saved and loaded by plain transformers the logits are the same bits, and tied embeddings are tied."""
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if tied and not _is_tied(model):
        todo = "model.tie_weights() (the head is lost), or set tie_word_embeddings false in config.json (it is kept)"
        found = "the configuration ties head and embedding, but they are two tensors"
        return Result("saving", FAILED, found, todo)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2 * size:
            return Result("saving", SKIPPED, f"no room for {readable_size(size)} in {Path(folder).parent}")
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=next(model.parameters()).dtype, trust_remote_code=False
        )
    again = again.to(_device(model)).eval()
    (ids,) = _random_ids(model, [16])
    with torch.no_grad():
        row = torch.tensor([ids], device=_device(model))
        before, after = model(input_ids=row, use_cache=False).logits, again(input_ids=row, use_cache=False).logits
    if not torch.equal(before, after):
        todo = "save_pretrained loses weights of this model: its checkpoints are not what was trained"
        return Result("saving", FAILED, f"logits differ by {(before - after).abs().max():.2g} once loaded again", todo)
    if tied and not _is_tied(again):
        todo = "embedding and head would train apart after a resume: call tie_weights() when loading"
        return Result("saving", FAILED, "head and embedding are no longer tied once loaded again", todo)
    return Result("saving", OK, f"logits survive, embeddings {'stay tied' if tied else 'are not tied'}")


def check_weights(model: nn.Module, missing: Collection[str] = (), files: Sequence[Path] | None = None) -> Result:
    """Weights are finite and all there.

    Args:
        missing: parameters that were not in the checkpoint, and are random.
        files: the checkpoint's files, safetensors or GGUF; None where it is not local.
    """
    problems = []
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        found = f"{_some(broken)} {'holds' if len(broken) == 1 else 'hold'} NaN or infinite numbers"
        problems.append((FAILED, found, "take an earlier checkpoint"))
    if missing:
        todo = "load the model by the class that saved it; these weights were never trained"
        problems.append((FAILED, f"{_some(sorted(missing))} not in the checkpoint: random", todo))
    kind = f"in {len(files)} {files[0].suffix[1:]} file{'s' if len(files) > 1 else ''}" if files else "safetensors"
    count = sum(p.numel() for p in model.parameters())
    return judge("weights", problems, lambda: f"{count:,}, finite, {kind}")


def check_lora(model: nn.Module, **settings: Any) -> Result:
    """A fresh adapter changes nothing: KL 0 between the adapted model and the model at the start.

    Args:
        settings: of `peft.LoraConfig`; its own targets for the model's type, where it knows the type.
    """
    try:
        import peft
    except ImportError:
        return Result("LoRA", SKIPPED, "peft is not installed")
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    before = _logprobs(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, **settings)
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        todo = "name them: --lora_target_modules all-linear"
        return Result("LoRA", WARNING, f"no target modules: {str(error).splitlines()[0]}", todo)
    try:
        kl = _kl(before, _logprobs(adapted.eval()))
        modules = sorted({name.rpartition(".")[2] for name in adapted.targeted_module_names})
    finally:
        adapted.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    if not kl <= 1e-6:
        todo = "the reference is not the start: let lora_B begin at 0 (init_lora_weights)"
        return Result("LoRA", FAILED, f"a fresh adapter is {kl:.2g} nats per token from the model", todo)
    return Result("LoRA", OK, f"a fresh adapter on {', '.join(modules)} starts at KL {kl:.1g}")


def check_adapter(model: nn.Module) -> Result:
    """A model loaded from an adapter folder trains that adapter, and the KL is to the adapter as it began.

    TRL's reference is a frozen copy of the adapter where the model is a `PeftModel`, else the base without it.
    """
    import peft

    start = _logprobs(model)
    if not isinstance(model, peft.PeftModel) or not any(p.requires_grad for p in model.parameters()):
        todo = "load it by PeftModel.from_pretrained(base, folder, is_trainable=True), or merge it into the base first"
        return Result("LoRA", FAILED, "the adapter is frozen: nothing would train, and the reference is the base", todo)
    with model.disable_adapter():
        base = _kl(start, _logprobs(model))
    active = model.active_adapter
    model.add_adapter("reference", model.peft_config[active])
    try:
        for name, parameter in list(model.named_parameters()):
            parts = name.split(".")
            if active in parts:
                copied = ".".join("reference" if part == active else part for part in parts)
                model.get_parameter(copied).data.copy_(parameter.data)
        model.set_adapter("reference")
        kl = _kl(start, _logprobs(model))
    finally:
        model.set_adapter(active)
        model.delete_adapter("reference")
    if not kl <= 1e-6:
        todo = "merge the adapter into its base, and train from there"
        return Result("LoRA", FAILED, f"a copy of the adapter as the reference is {kl:.2g} nats per token away", todo)
    return Result(
        "LoRA", OK, f"the adapter trains on; KL to its copy, the reference, {kl:.1g} (to the base {base:.2g})"
    )


def check_train_mode(model: nn.Module, disable_dropout: Callable[[nn.Module], None]) -> Result:
    """With dropout turned off as training does it, for good, train mode gives the log-probs of eval mode.

    Else the ratio of a recomputed log-prob to the sampled one is not 1 on policy.
    """
    disable_dropout(model)
    evaluated = _logprobs(model)
    trained = _logprobs(model.train())
    model.eval()
    todo = "set the rate to 0 in config.json: something in the model is random in train mode and cannot be turned off"
    return _difference("train mode", (trained - evaluated).abs().max().item(), todo)


def _difference(check: str, nats: float, todo: str) -> Result:
    if not nats <= TOLERANCE:
        return Result(check, FAILED, f"log-probs move by {nats:.2g} nats (allowed: {TOLERANCE:g})", todo)
    return Result(check, OK, f"log-probs move by at most {nats:.1g} nats")


def _random_ids(model: nn.Module, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Ids of these lengths, shortened where the model has few positions."""
    noise = np.random.default_rng(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return [noise.integers(vocabulary, size=_fit(model, n)).tolist() for n in lengths]


def _fit(model: nn.Module, tokens: int) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return int(min(tokens, context // 3))


def _alone(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Log-probs (S-1,) of all tokens but the first, by one plain forward of one row."""
    row = torch.tensor([list(ids)], device=_device(model))
    with torch.no_grad():
        return token_logprobs(model(input_ids=row, use_cache=False).logits[0, :-1], row[0, 1:])


def _logprobs(model: nn.Module) -> Tensor:
    """(S, V) log-probs behind each token of a random row."""
    (ids,) = _random_ids(model, [16])
    with torch.no_grad():
        row = torch.tensor([ids], device=_device(model))
        return model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of Σ_v p (log p − log q), nats, of log-probs (S, V)."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference; NaN where either holds one."""
    return torch.cat([(a - b).abs() for a, b in zip(found, expected, strict=True)]).max().item()


def _is_tied(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
