"""A language model behind an OpenAI-compatible endpoint as the judge."""

import asyncio
import os
import re
from typing import Any
from weakref import WeakKeyDictionary

import httpx

from rlseq.scoring import reward

_PROMPT = """\
Rate the answer to the question by this rubric: {rubric}

Question:
{prompt}

Answer:
{completion}
{references}
Give your reasons in a sentence or two, then a last line `Score: N` with N from {low:g} to {high:g}."""

# no bracket between: "Score (0-10): 7" names the scale there
_SCORE = re.compile(r"score[^\w(]{0,6}?([-−]?(?:\d+(?:\.\d+)?|\.\d+))", re.IGNORECASE)


@reward(range=(0, 1), extra="judge")
async def llm_judge(
    prompt: Any,
    completion: str,
    base_url: str,
    model: str,
    references: list[str] | str | None = None,
    rubric: str = "Is the answer correct, complete and clear?",
    template: str = _PROMPT,
    low: float = 0.0,
    high: float = 10.0,
    temperature: float = 0.0,
    max_tokens: int = 512,
    api_key_variable: str | None = None,
    seconds: float = 60.0,
) -> tuple[float, dict]:
    """The score a judge gives, scaled from [low, high] to [0, 1]; details: its reasons.

    It is asked by POST to `base_url`/chat/completions. `template` is filled with rubric, prompt,
    completion, references, low and high. `api_key_variable` names the environment variable with the key;
    none is read without it. An answer without a score in range, and an HTTP error, are errors: `retries`
    (2) tries again, `concurrency` (16) asks at once, `cache: true` keeps the verdicts.
    """
    question = template.format(
        rubric=rubric,
        prompt=_text(prompt),
        completion=completion,
        references=f"\nReference answers:\n{_lines(references)}\n" if references else "",
        low=low,
        high=high,
    )
    response = await _client().post(
        f"{base_url.rstrip('/')}/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        },
        headers={"Authorization": f"Bearer {os.environ[api_key_variable]}"} if api_key_variable else {},
        timeout=seconds,
    )
    response.raise_for_status()
    verdict = response.json()["choices"][0]["message"]["content"]
    found = _SCORE.findall(verdict)
    score = float(found[-1].replace("−", "-")) if found else None
    if score is None or not low <= score <= high:
        raise ValueError(f"the judge gave no score from {low:g} to {high:g}: {verdict[:200]!r}")
    return (score - low) / (high - low), {"verdict": verdict}


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _lines(references: list[str] | str) -> str:
    return references if isinstance(references, str) else "\n".join(references)


_clients: WeakKeyDictionary = WeakKeyDictionary()


def _client() -> httpx.AsyncClient:
    """One client an event loop: its connections are kept, and belong to the loop that opened them."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = httpx.AsyncClient()
    return _clients[loop]
