"""Self-tests on a few random tokens, once per model: is packing exact for it, and is a decoder?

The reference is always the model itself on one sequence, without cache, mask, positions or packing. Each test leaves
the global random state as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlseq.engine.decoding.cuda_graph import WARM
from rlseq.engine.decoding.decoders import Decoder
from rlseq.engine.model.info import attention_of, attention_window, eval_mode, vocabulary_of
from rlseq.engine.packed.packing import pack

# Largest difference of logits, relative to their largest magnitude, that is rounding and not a wrong mask.
LOGIT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
MAX_FLIPS = 0.1  # share of positions that may be off in 16 bits: rounding can make a router pick another expert

_PROMPT_LENGTHS = (5, 2, 7, 1)  # for decoders: shorter and longer than the usual convolution of 4 tokens
# For decoders, the slot that each slot continues, by step. Rows move, branch and end; the last steps replay a graph.
_SOURCES = (None, (0, 0, 2, 1, 3, 2), (5, 3, 1), *(None,) * (WARM + 1))
# Of packing: (prompt tokens, tokens of its completions).
_PACKED_LENGTHS = ((7, (5, 3, 6)), (1, (4,)), (4, (2, 7)))

# Answers of `supports_packing` by model, then by attention implementation and dtype.
_packing: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def supports_packing(model: nn.Module, longest: int | None = None) -> tuple[bool, str]:
    """Test on a small random batch whether packed sequences get the logits that each gets alone.

    The model runs in eval mode without gradient; its mode is left as it was. Logits may differ by 1e-4 of their largest
    magnitude in float32 (1e-6 in float64, 1e-2 in float16, 3e-2 in bfloat16). The answer is kept as long as the model
    lives.

    Args:
        model: a causal `transformers` model.
        longest: tokens of the longest prompt plus completion to be packed. A model with an attention window
            is served up to the window's length; unknown (None) counts as longer.

    Returns:
        (True, "") or (False, the reason).
    """
    whole_config: Any = model.config
    window = attention_window(whole_config.get_text_config())
    if window is not None and (longest is None or longest > window):
        found = "of unstated length" if longest is None else f"of {longest} tokens"
        return False, f"the model's attention window of {window} tokens may cut sequences {found}"
    known = _packing.setdefault(model, {})
    key = (attention_of(model), next(model.parameters()).dtype)
    if key not in known:
        fault = _packing_fault(model)
        known[key] = (fault is None, fault or "")
    return known[key]


def _packing_fault(model: nn.Module) -> str | None:
    noise = np.random.default_rng(0)  # its own generator: the global random state belongs to the run

    def random_ids(count: int) -> list[int]:
        return noise.integers(vocabulary_of(model), size=count).tolist()

    groups = [(random_ids(prompt), [random_ids(n) for n in lengths]) for prompt, lengths in _PACKED_LENGTHS]
    groups[0][1].append([*groups[0][1][2][:3], 0, 1])  # two with a common prefix
    parameter = next(model.parameters())
    layout: dict[str, Any] = {"pad_id": 0, "row_tokens": 40, "attention": attention_of(model)}
    batch = pack(groups, device=parameter.device, dtype=parameter.dtype, **layout)
    alone = [torch.tensor([*prompt, *c], device=parameter.device) for prompt, cs in groups for c in cs]
    try:
        with torch.no_grad(), eval_mode(model):
            packed = model(**batch.model_inputs, use_cache=False).logits
            expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in alone]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse the mask or the positions in any way; the reason is handed on
        return f"its forward does not take a packed row: {type(error).__name__}: {error}"
    found = packed[batch.token_rows, batch.token_columns - 1]
    wanted = torch.cat([logits[-n - 1 : -1] for logits, n in zip(expected, batch.lengths, strict=True)])
    difference = (found - wanted).abs().max().item()
    allowed = _tolerance(parameter.dtype) * wanted.abs().max().item()
    if difference <= allowed:  # False for NaN
        return None
    return f"packed logits differ by {difference:.3g} from each sequence alone (allowed: {allowed:.3g})"


def decoder_fault(model: nn.Module, make: Callable[..., Decoder]) -> str | None:
    """Why a decoder is wrong for a model, or None if it is right or if the model's logits are not finite."""
    noise = np.random.default_rng(0)
    vocabulary = vocabulary_of(model)
    device = next(model.parameters()).device
    held = [noise.integers(vocabulary, size=n).tolist() for n in _PROMPT_LENGTHS]

    def alone() -> Tensor:
        rows = [torch.tensor([ids], device=device) for ids in held]
        return torch.stack([model(input_ids=row, use_cache=False).logits[0, -1].float() for row in rows])

    found, expected = [], [alone()]
    if not torch.isfinite(expected[0]).any():
        return None
    try:
        decoder = make(model, held)
        found.append(decoder.logits)
        for sources in _SOURCES:
            index = None if sources is None else np.array(sources)
            held = [held[s] for s in (range(len(held)) if sources is None else sources)]
            tokens = noise.integers(vocabulary, size=len(held))
            held = [[*ids, token] for ids, token in zip(held, tokens.tolist(), strict=True)]
            decoder.advance(index, tokens)
            found.append(decoder.logits.clone())  # a graph writes the next step's over them
            expected.append(alone())
        if refused := getattr(decoder, "refused", None):  # of a CUDA graph
            return f"its step cannot be captured ({refused})"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse cache, mask or positions in any way; the reason is handed on
        return f"its forward does not decode from such a cache ({type(error).__name__}: {str(error).splitlines()[0]})"
    return _logits_fault(torch.cat(found), torch.cat(expected), next(model.parameters()).dtype)


def _logits_fault(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How logits (N, V) differ from the expected ones by more than the rounding of a dtype; None: they do not."""
    magnitude = expected[torch.isfinite(expected)].abs().max().item()
    allowed = _tolerance(dtype) * magnitude
    same_nan = torch.equal(found.isnan(), expected.isnan())
    off = (found - expected).abs().nan_to_num(nan=0.0 if same_nan else torch.inf)
    off = torch.where(found == expected, 0.0, off)  # ∞ − ∞
    share = (off > allowed).any(-1).float().mean().item()
    if share <= (MAX_FLIPS if dtype in (torch.float16, torch.bfloat16) else 0.0):
        return None
    return f"logits from the cache differ by up to {off.max().item():.3g} from uncached ones (allowed: {allowed:.3g})"


def _tolerance(dtype: torch.dtype) -> float:
    return LOGIT_TOLERANCE.get(dtype, LOGIT_TOLERANCE[torch.float32])
