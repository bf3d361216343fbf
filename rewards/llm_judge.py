"""A language model behind an OpenAI-compatible endpoint as the judge."""

import asyncio
import json
import logging
import os
import re
from typing import Any
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary

import httpx

from rlseq.common.passwords import ADVICE, holds_password
from rlseq.scoring import reward

_PROMPT = """\
Rate the answer to the question by this rubric: {rubric}

Question:
{prompt}

Answer:
{completion}
{references}
Give your reasons in a sentence or two, then a last line `Score: N` with N from {low:g} to {high:g}."""

# no bracket between: "Score (0-10): 7" names the scale there; a number is read whole ("1e5", and "7,5" not at all)
_SCORE = re.compile(
    r"score[^\w(]{0,6}?([-−]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)(?!\d|[.,]\d|e[-+]?\d)", re.IGNORECASE
)
_THOUGHT = re.compile(
    r"(?:\A|<(think|thinking|thought|reasoning)>)(?:(?!<(?:think|thinking|thought|reasoning)>).)*?"
    r"</(?:think|thinking|thought|reasoning)>",
    re.IGNORECASE | re.DOTALL,
)
_OPEN_THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_BLANK = re.compile(r"\{(rubric|prompt|completion|references|low|high)(?::g)?\}")
LARGEST_ANSWER = 2**20  # bytes of a judge's answer, which holds some hundred words


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

    It is asked by POST to `base_url`/chat/completions. In `template`, {rubric}, {prompt}, {completion},
    {references}, {low} and {high} are filled in; other braces stay. `api_key_variable` names the environment
    variable with the key; none is read without it. A user and password in `base_url` are sent, and so is its query. A
    password or key there is the environment variable that it names: `http://me:${JUDGE_PASSWORD}@host/v1`,
    `http://${JUDGE_TOKEN}@host/v1`, `http://host/v1?api_key=${JUDGE_KEY}`. A score within a thought
    (<think>...</think>) does not count. An answer without a score in range, one that was cut off at `max_tokens` or is
    larger than 1 MiB, one that is not complete after `seconds`, and an HTTP error, are errors: `retries` (2) tries
    again, `concurrency` (16) asks at once, `cache: true` keeps the verdicts.
    """
    question = _filled(
        template,
        rubric=rubric,
        prompt=_text(prompt),
        completion=completion,
        references=f"\nReference answers:\n{_lines(references)}\n" if references else "",
        low=f"{low:g}",
        high=f"{high:g}",
    )
    request = {
        "model": model,
        "messages": [{"role": "user", "content": _encodable(question)}],
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    headers = {"Authorization": f"Bearer {_variable(api_key_variable)}"} if api_key_variable else {}
    try:
        body = await asyncio.wait_for(_ask(base_url, request, headers, seconds), seconds)
    except TimeoutError:
        raise TimeoutError(f"the judge's answer was not complete after {seconds:g} s (seconds)") from None
    verdict = _verdict(body, max_tokens)
    found = _SCORE.findall(_THOUGHT.sub("", verdict))
    score = float(found[-1].replace("−", "-")) if found else None
    if score is None or not low <= score <= high:
        raise ValueError(f"the judge gave no score from {low:g} to {high:g}: {verdict[:200]!r}")
    return (score - low) / (high - low), {"verdict": verdict}


def _filled(template: str, **values: str) -> str:
    """The template with its blanks filled; other braces, and those in what is filled in, are text."""
    if "completion" not in _BLANK.findall(template):
        raise ValueError("the template has no {completion}, without which the judge sees no answer")
    return _BLANK.sub(lambda match: values[match[1]], template)


async def _ask(base_url: str, request: dict, headers: dict, seconds: float) -> bytes:
    """The body of the judge's answer."""
    if holds_password(base_url):
        raise ValueError(f"base_url holds a password or key; {ADVICE}")
    address, _, query = base_url.partition("?")
    url = httpx.URL(f"{address.rstrip('/')}/chat/completions")
    # user, password and query stay apart from the URL, which is in the messages of errors
    user, password = os.path.expandvars(url.username), os.path.expandvars(url.password)
    auth = httpx.BasicAuth(user, password) if url.userinfo else None
    params = [(name, os.path.expandvars(value)) for name, value in parse_qsl(query, keep_blank_values=True)]
    url = url.copy_with(username=None, password=None)
    headers = {"Accept-Encoding": "identity", **headers}  # a compressed body would have no known size
    options = {"json": request, "headers": headers, "timeout": seconds, "params": params or None}
    async with _client().stream("POST", url, auth=auth, **options) as response:
        response.request.url = url
        response.raise_for_status()
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > LARGEST_ANSWER:
                raise ValueError(f"the judge's answer is larger than {LARGEST_ANSWER:,} bytes")
        return bytes(body)


def _verdict(body: bytes, max_tokens: int) -> str:
    """What the judge said, in full."""
    try:
        choice = json.loads(body)["choices"][0]
        verdict, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"expected a chat completion from the judge, got {body[:200]!r}") from None
    if reason == "length" or (isinstance(verdict, str) and _OPEN_THOUGHT.search(_THOUGHT.sub("", verdict))):
        raise ValueError(f"the judge's answer was cut off: raise max_tokens ({max_tokens}); it ends in {_end(verdict)}")
    if not isinstance(verdict, str):
        raise ValueError(f"the judge's content is {verdict!r:.200} (finish_reason {reason!r}); expected text")
    return _encodable(verdict)


def _end(verdict: Any) -> str:
    return repr(verdict[-100:]) if isinstance(verdict, str) else repr(verdict)[:100]


def _encodable(text: str) -> str:
    """The text with `?` for half a surrogate pair, which no file and no request can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _variable(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"the environment variable {name}, which api_key_variable names, is not set")
    return os.environ[name]


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


def _without_query(record: logging.LogRecord) -> bool:
    """Leave the query, which may hold a key, out of what httpx logs of a request."""
    if isinstance(record.args, tuple):
        record.args = tuple(arg.copy_with(query=None) if isinstance(arg, httpx.URL) else arg for arg in record.args)
    return True


logging.getLogger("httpx").addFilter(_without_query)
