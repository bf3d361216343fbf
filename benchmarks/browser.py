"""The size of a browser page, and the time to write and to use it, on synthetic rollouts.

    python benchmarks/browser.py --rollouts 200000 --folder /tmp/browser

writes a run of that many rollouts (80 random tokens of a small vocabulary each, with log-probs) and its page. Where
Chromium is installed, it opens the page and measures it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import chromium
from tokenizers import Tokenizer, models, pre_tokenizers

from rlseq.evaluation.browser.page import FILE_NAME, write_page

WORDS = 2_000
PER_STEP = 512
GROUP = 8


def write_run(folder: Path, rollouts: int, tokens: int) -> None:
    """Write a tokenizer and a rollout log of random words; log-probs are mostly near 0, as a trained model's are."""
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(WORDS)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for first in range(0, rollouts, PER_STEP):
        step = first // PER_STEP + 1
        with (folder / f"rollouts/{step:06d}.jsonl").open("w") as lines:
            for row in range(first, min(rollouts, first + PER_STEP)):
                key = f"prompt-{row // GROUP % 5_000}"
                ids = rng.choices(range(len(words)), k=rng.randint(tokens // 2, tokens * 3 // 2))
                logprobs = [-rng.expovariate(1.5) if rng.random() < 0.4 else -0.01 for _ in ids]
                text, value = " ".join(words[i] for i in ids), rng.random()
                record = {
                    **{"step": step, "prompt_key": key, "sample": row % GROUP, "prompt": f"A question about {key}."},
                    **{"references": [key], "completion": text, "raw_completion": text, "completion_ids": ids},
                    **{"logprobs": logprobs, "values": {"accuracy": value}, "status": {"accuracy": "ok"}},
                    **{"total": value, "advantage": value - 0.5, "logprob": sum(logprobs), "length": len(ids)},
                    **{"finish_reason": rng.choice(("stop", "stop", "length")), "format_version": 1},
                }
                lines.write(json.dumps(record) + "\n")


FILTERS = {
    "filter by advantage and cut": {"sign": "-", "finish": "1"},
    "order by reward": {"order": "total-"},
    "search for a text of few": {"text": "question about prompt-4999"},
    "search for a text of many": {"text": "zq"},
}


def measure(page: Path, profile: Path) -> None:
    """Print the time until the page lists its rollouts, and that of each filter."""
    with chromium.Chromium(profile) as browser:
        began = time.monotonic()
        browser.open(page)
        print(f"opened and listed in {time.monotonic() - began:.1f} s")
        paint = browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"first paint after {paint / 1000:.2f} s")
        for name, fields in FILTERS.items():
            code = "for (const name of ['sign', 'finish', 'order', 'text']) form.elements[name].value = '';"
            code += "".join(f"form.elements.{field}.value = {value!r};" for field, value in fields.items())
            code += (
                "const began = performance.now(); await apply(); return [performance.now() - began, said.textContent]"
            )
            took, found = browser.evaluate(f"(async () => {{ {code} }})()")
            print(f"{name}: {took / 1000:.2f} s ({found})")
        print(f"{browser.evaluate('document.getElementsByTagName(`*`).length')} elements in the page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=80, help="Mean length of a completion.")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    run = args.folder / "run"
    write_run(run, args.rollouts, args.tokens)
    log = sum(path.stat().st_size for path in (run / "rollouts").iterdir())
    began = time.monotonic()
    count = write_page([run], run / FILE_NAME)
    took, size = time.monotonic() - began, (run / FILE_NAME).stat().st_size
    print(f"{count:,} rollouts: log {log / 1e6:.0f} MB, page {size / 1e6:.1f} MB, written in {took:.1f} s")
    if chromium.PATH:
        measure(run / FILE_NAME, args.folder / "profile")


if __name__ == "__main__":
    main()
