"""GSM8K as chat: rows for `--dataset_name recipes/gsm8k/data.py`.

A row is a question of grade-school mathematics, asked by a user, and its gold solution:

    {"prompt": [{"role": "user", "content": "Weng earns ... \\n\\nReason step by step. ..."}],
     "references": ["Weng earns 12/60 = $0.2 per minute. ...\\n#### 10"], "question": "Weng earns ...", "answer": "10"}

The files are train.jsonl and test.jsonl as OpenAI published them (MIT licence; Cobbe et al. 2021, arXiv 2110.14168),
with the fields `question` and `answer`. They are looked for in the folder that the environment variable GSM8K_DIR
names, else in ../shared/data/gsm8k. The calculator's notes (`<<12/60=0.2>>`) are taken out of the solutions.

GSM8K has no validation split: 5% of the training questions are held out, by the SHA-256 of the question. The test
questions are read only when `--eval_split test` names them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from rlseq.data.files import place_of
from rlseq.data.rows import load_rows
from rlseq.errors import DataError

FOLDER = "../shared/data/gsm8k"
SPLITS = ("train", "validation", "test")
INSTRUCTION = 'Reason step by step. Then give the final number alone on the last line, after "#### ".'
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def split_of(question: str) -> str:
    """Name the split of a question of train.jsonl: 5% validation, the rest train."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 20
    return "validation" if bucket == 0 else "train"


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split in the order of their file.

    Raises:
        DataError: an unknown split, a file that is missing, or a row without a question and a final answer.
    """
    if split not in SPLITS:
        raise DataError(f"the GSM8K data has no split {split!r}; it has {', '.join(SPLITS)}")
    name = "test" if split == "test" else "train"
    path = Path(os.environ.get("GSM8K_DIR", FOLDER)) / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(f"there is no {path}; name the folder of GSM8K's train.jsonl and test.jsonl in GSM8K_DIR")
    # a file of one split alone comes whole when no split is named (train), or when its own is (test)
    read = load_rows(str(path), "test" if name == "test" else None)
    rows = [_row(row, number) for number, row in enumerate(read)]
    return rows if name == "test" else [row for row in rows if split_of(row["question"]) == split]


def _row(row: dict[str, Any], number: int) -> dict[str, Any]:
    question, solution = row.get("question"), _CALCULATOR.sub("", row.get("answer") or "")
    _, mark, answer = solution.rpartition("####")
    if not question or not mark:
        where = place_of(row, number)
        raise DataError(f"{where}: expected a `question`, and an `answer` that ends in '#### number'")
    return {
        "prompt": [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}],
        "references": [solution],
        "question": question,
        "answer": answer.strip(),
    }
