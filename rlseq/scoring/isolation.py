"""Settings and random states of the process that a reward may change: they are put back when it returns."""

from __future__ import annotations

import contextlib
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
    """Hold the random states, as `kept_settings` does, while reward code runs here or on threads `without_holding`.

    What this thread draws meanwhile comes from the states that reward code draws from, and leaves no trace either.
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
    """Do something on a thread whose random states another thread holds."""
    _held.elsewhere = True
    try:
        return act()
    finally:
        _held.elsewhere = False


@contextlib.contextmanager
def kept_settings(*, advance: bool = True) -> Iterator[None]:
    """Run reward code, then restore what it changed: torch's grad mode, default dtype and device, threads, determinism
    and matmul precision, and the random states of Python, numpy and torch.

    The code draws from a seed that is taken from Python's random state: other noise at each call, the same noise in a
    run that is resumed, and no trace in training's own states. Without `advance` (of code that is loaded and not
    called) Python's state is left where it was, too. Modules that nobody imported are left alone.
    """
    torch = _imported(*_TORCH)
    before = _settings(torch) if torch else {}
    elsewhere = getattr(_held, "elsewhere", False)
    with contextlib.nullcontext() if elsewhere else random_states_held(advance=advance):
        try:
            yield
        finally:
            after = _settings(torch) if torch else {}
            for setter, value in before.items():
                if after[setter] != value:
                    _SETTERS[setter](torch, value)


@contextlib.contextmanager
def kept_random_states(devices: Sequence[Any] = (), device_type: str = "cuda") -> Iterator[None]:
    """Put the random states of Python, numpy and torch (the CPU's and those of `devices`) back as they were.

    Modules that nobody imported are left alone.
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


_SETTERS: dict[str, Callable[[Any, Any], None]] = {
    "grad": lambda torch, value: torch.set_grad_enabled(value),
    "dtype": lambda torch, value: torch.set_default_dtype(value),
    "device": lambda torch, value: torch.set_default_device(value),
    "threads": lambda torch, value: torch.set_num_threads(value),
    "deterministic": lambda torch, value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    "precision": lambda torch, value: torch.set_float32_matmul_precision(value),
    "cudnn": lambda torch, value: _set_cudnn(torch, value),
}


def _settings(torch: Any) -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
    }


def _set_cudnn(torch: Any, value: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = value
