"""Restores settings and random states of the process that a reward may change."""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# modules, and an attribute that each has once it is fully imported
_NUMPY = ("numpy", "random")
_TORCH = ("torch", "get_float32_matmul_precision")
_held = threading.local()


@contextlib.contextmanager
def random_states_held(*, advance: bool = True) -> Iterator[None]:
    """Restore the random states afterwards, as `kept_settings` does, for reward code here and on other threads, which
    then call `without_holding`.

    Until then this thread samples from the same states as the reward code, and that is undone, too.
    """
    torch = _imported(*_TORCH)
    unmoved, seed = random.getstate(), random.getrandbits(32)
    if not advance:
        random.setstate(unmoved)
    used = torch and torch.cuda.is_initialized()
    with kept_random_states(range(torch.cuda.device_count()) if used else ()):
        _seed(seed)
        yield


def without_holding(act: Callable[[], Any]) -> Any:
    """Call `act` on a thread while another thread holds the random states: `kept_settings` then leaves them alone."""
    _held.elsewhere = True
    try:
        return act()
    finally:
        _held.elsewhere = False


@contextlib.contextmanager
def kept_settings(*, advance: bool = True) -> Iterator[None]:
    """Run reward code, then restore what it changed: torch's grad mode, default dtype and device, CUDA device, threads,
    determinism, anomaly mode, precision and backend flags, and the random states of Python, numpy and torch.

    The code samples from a seed taken from Python's random state: other noise at each call, the same noise in a resumed
    run, and no effect on training's own states. Without `advance` (for code that is loaded and not called) Python's
    state is unchanged, too. Modules that are not imported yet are left alone.
    """
    torch = _imported(*_TORCH)
    before = [_read(torch, read) for read, _ in _SETTINGS] if torch else []
    elsewhere = getattr(_held, "elsewhere", False)
    with contextlib.nullcontext() if elsewhere else random_states_held(advance=advance):
        try:
            yield
        finally:
            for (read, write), value in zip(_SETTINGS, before, strict=False):  # none if the code imported torch
                if value is not _UNREADABLE and _read(torch, read) != value:
                    write(torch, value)


@contextlib.contextmanager
def kept_random_states(devices: Sequence[Any] = (), device_type: str = "cuda") -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (the CPU's and those of `devices`) afterwards.

    Modules that are not imported yet are left alone.
    """
    numpy, torch = _imported(*_NUMPY), _imported(*_TORCH)
    python, legacy = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices, device_type=device_type) if torch else contextlib.nullcontext():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(legacy)


def _imported(name: str, attribute: str) -> Any:
    """The module if it is fully imported, which the attribute shows; else None."""
    module = sys.modules.get(name)
    return module if hasattr(module, attribute) else None


def _seed(seed: int) -> None:
    random.seed(seed)
    if numpy := _imported(*_NUMPY):
        numpy.random.seed(seed)
    if torch := _imported(*_TORCH):
        torch.manual_seed(seed)


_UNREADABLE = object()
# Flags of `torch.backends`: older names first, and a wider `fp32_precision` before those that inherit it.
_FLAGS = (
    "cuda.matmul.allow_tf32",
    "cudnn.allow_tf32",
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.benchmark_limit",
    "cudnn.deterministic",
    "mkldnn.enabled",
    "mkldnn.deterministic",
)
_SDP = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")  # torch.backends.cuda.NAME_enabled, .enable_NAME

# What is restored, in this order: how it is read, and how it is set.
_SETTINGS: list[tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = [
    (lambda torch: torch.is_grad_enabled(), lambda torch, value: torch.set_grad_enabled(value)),
    (lambda torch: torch.get_default_dtype(), lambda torch, value: torch.set_default_dtype(value)),
    (lambda torch: torch.get_default_device(), lambda torch, value: torch.set_default_device(value)),
    (lambda torch: torch.get_num_threads(), lambda torch, value: torch.set_num_threads(value)),
    (
        lambda torch: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda torch, value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (
        lambda torch: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda torch, value: torch.autograd.set_detect_anomaly(*value),
    ),
    (
        lambda torch: torch.cuda.current_device() if torch.cuda.is_initialized() else _UNREADABLE,
        lambda torch, value: torch.cuda.set_device(value),
    ),
    (
        lambda torch: torch.get_float32_matmul_precision(),
        lambda torch, value: torch.set_float32_matmul_precision(value),
    ),
    *(
        (
            lambda torch, name=name: operator.attrgetter(name)(torch.backends),
            lambda torch, value, name=name: _set_flag(torch.backends, name, value),
        )
        for name in _FLAGS
    ),
    *(
        (
            lambda torch, name=name: getattr(torch.backends.cuda, f"{name}_enabled")(),
            lambda torch, value, name=name: getattr(torch.backends.cuda, f"enable_{name}")(value),
        )
        for name in _SDP
    ),
]


def _read(torch: Any, setting: Callable[[Any], Any]) -> Any:
    try:
        return setting(torch)
    except (AttributeError, RuntimeError):  # absent in this version, or set by both its old and its new name
        return _UNREADABLE


def _set_flag(backends: Any, name: str, value: Any) -> None:
    owner, _, flag = name.rpartition(".")
    setattr(operator.attrgetter(owner)(backends) if owner else backends, flag, value)
