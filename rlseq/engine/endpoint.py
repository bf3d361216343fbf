"""A model behind an OpenAI-compatible endpoint (`vllm serve`, for one): generation and scoring by /v1/completions.

Prompts are sent as token ids, so that the server applies no template and adds no token. Log-probs of a completion are
the model's own. Those of a warped distribution (temperature, top_p, ...) are not recorded: which of the two a server
gives is its own setting, and no answer says which.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rlseq.engine.likelihood import TeacherForced
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Greedy, Sample, Strategy
from rlseq.errors import ConfigError, ModelError
from rlseq.types import Prompt, Rollout

TRIES = 3
TIMEOUT = 600.0  # seconds for one answer
PARALLEL = 32  # requests on their way at a time; the server batches them
_TOKEN = "token_id:"  # how servers write a token's id in the place of its text


def is_endpoint(path: str) -> bool:
    """Whether a model's path names an endpoint."""
    return path.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Endpoint:
    """An address that ends in /v1, and the name of the model that it serves."""

    url: str
    model: str
    tries: int = TRIES
    timeout: float = TIMEOUT

    @classmethod
    def of(cls, path: str) -> Endpoint:
        """Read URL#MODEL.

        Raises:
            ConfigError: there is no model behind #.
        """
        url, _, model = path.partition("#")
        if not model:
            raise ConfigError(f"{path!r} names no model; write it as {url}#MODEL, a path or hub id with a tokenizer")
        return cls(url.rstrip("/"), model)

    def check(self) -> None:
        """Ask whether the server is there and serves the model.

        Raises:
            ModelError: it is not, or serves others.
        """
        answer = self._ask("models")
        served = [str(one.get("id")) for one in answer.get("data", [])]
        if self.model not in served:
            raise ModelError(f"{self.url} does not serve {self.model!r}; it serves {', '.join(served) or 'no model'}")

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        strategy: Strategy,
        num_samples: int,
        max_new_tokens: int,
        seed: int,
        stream: int,
        stop_ids: Sequence[int],
        tokenizer: Any,
        stop_strings: Sequence[str] = (),
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[Rollout]]:
        """Continue each of P prompts G times; arguments as of `rlseq.engine.sampling.sample`.

        The server's noise has a seed for each completion. It is not the noise of `sample`.

        Raises:
            ConfigError: a strategy other than greedy and sample.
            ModelError: the server fails.
        """
        if not isinstance(strategy, (Greedy, Sample)):
            raise ConfigError(f"an endpoint decodes greedy and sample, not {strategy.spec!r}; use a checkpoint")
        if not strategy.is_stochastic and num_samples > 1:
            raise ConfigError(f"{strategy.spec} gives the same completion every time; num_samples must be 1")
        strings = StopStrings(stop_strings, tokenizer)
        common: dict[str, Any] = {"max_tokens": max_new_tokens, "logprobs": 1, **_warps(strategy)}
        common |= {"stop_token_ids": list(stop_ids), "return_token_ids": True, "return_tokens_as_token_ids": True}
        if stop_strings:
            common |= {"stop": list(stop_strings), "include_stop_str_in_output": True}

        def one(prompt: Prompt, number: int) -> Rollout:
            body = common | {"prompt": list(prompt.prompt_ids), "seed": _seed(seed, stream, prompt.key, number)}
            choice = self._complete(body)
            ids, logprobs = _tokens(choice, tokenizer, stop_ids)
            own = isinstance(strategy, Greedy) or strategy == Sample()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            return Rollout.from_ids(
                prompt.key,
                ids,
                strings.text(ids, text),
                sample=number,
                logprobs=logprobs if own else (),
                text_with_special_tokens=tokenizer.decode(ids, skip_special_tokens=False),
                chat=not isinstance(prompt.prompt, str),
                finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
                strategy=strategy.spec,
            )

        calls = [(one, prompt, number) for prompt in prompts for number in range(num_samples)]
        done = _in_parallel(calls, progress, every=num_samples)
        return [done[i : i + num_samples] for i in range(0, len(done), num_samples)]

    def teacher_force(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[TeacherForced] | None:
        """Log-probs, argmaxes and margins of completions; None where the server returns no prompt log-probs.

        Raises:
            ModelError: the server fails.
        """

        def one(prompt: Sequence[int], completion: Sequence[int]) -> TeacherForced | None:
            body = {"prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2}
            found = self._complete(body).get("prompt_logprobs")
            if not found or len(found) != len(prompt) + len(completion):
                return None
            return _forced(found[len(prompt) :], completion)

        pairs = zip(prompt_ids, completion_ids, strict=True)
        forced = _in_parallel([(one, prompt, completion) for prompt, completion in pairs])
        return None if any(one is None for one in forced) else forced

    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._ask("completions", {"model": self.model, **body})
        choices = answer.get("choices")
        if not choices:
            raise ModelError(f"{self.url}/completions answered without a completion: {str(answer)[:200]}")
        return choices[0]

    def _ask(self, what: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer; what may pass (no connection, timeout, 429, 5xx) is tried again."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{what}", data, {"Content-Type": "application/json"})
        said = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
        raise ModelError(f"{self.url}/{what} failed: {' '.join(said.split())}. Is the server running?")


def _warps(strategy: Strategy) -> dict[str, Any]:
    """All that shapes the distribution, what is neutral too: servers take defaults from the checkpoint's own file."""
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    neutral |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if not isinstance(strategy, Sample):
        return neutral | {"temperature": 0.0}
    named = {"top_k": strategy.top_k, "top_p": strategy.top_p, "min_p": strategy.min_p}
    return neutral | {"temperature": strategy.temperature} | {k: v for k, v in named.items() if v is not None}


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def _tokens(
    choice: Mapping[str, Any], tokenizer: Any, stop_ids: Collection[int]
) -> tuple[list[int], list[float] | tuple[()]]:
    """A completion's ids and log-probs. Without ids the text is tokenised again, and log-probs are unknown."""
    given = choice.get("logprobs") or {}
    logprobs, tokens = given.get("token_logprobs") or [], given.get("tokens") or []
    ids = choice.get("token_ids")
    if ids is None and tokens and all(token.startswith(_TOKEN) for token in tokens):
        ids = [int(token.removeprefix(_TOKEN)) for token in tokens]
    if ids is None:
        ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        if choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason"), str):
            ids = [*ids, next(iter(stop_ids))]
        return ids, ()
    return list(ids), logprobs if len(logprobs) == len(ids) else ()


def _forced(found: Sequence[Mapping[str, Mapping[str, Any]]], ids: Sequence[int]) -> TeacherForced:
    """What two most likely tokens and the true one, by position, tell: a difference of log-probs is one of logits."""
    logprobs, margins, right = [], [], []
    for at, token in zip(found, ids, strict=True):
        own = at[str(token)]["logprob"]
        logprobs.append(own)
        margins.append(own - max(other["logprob"] for name, other in at.items() if name != str(token)))
        right.append(at[str(token)]["rank"] == 1)
    return TeacherForced(torch.tensor(logprobs), torch.tensor(right, dtype=torch.bool), torch.tensor(margins))


def _in_parallel(calls: Sequence[tuple], progress: Callable[[int], Any] | None = None, every: int = 1) -> list[Any]:
    """The results of (function, *arguments), in their order; the first error, or Ctrl-C, drops what has not begun."""
    pool = ThreadPoolExecutor(PARALLEL)
    try:
        futures = [pool.submit(*call) for call in calls]
        results = []
        for number, future in enumerate(futures, 1):
            results.append(future.result())
            if progress is not None and number % every == 0:
                progress(1)
        return results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
