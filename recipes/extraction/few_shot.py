"""The rows of data.py after three examples, for `--dataset_name recipes/extraction/few_shot.py`: a longer prompt.

Each prompt begins with three rows of `train` of its own kind with their references, as turns of the conversation, which
is the strongest prompt that was found on validation rows without training (README.md).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

EXAMPLES = 3

_found = importlib.util.spec_from_file_location("extraction_data", Path(__file__).with_name("data.py"))
data = importlib.util.module_from_spec(_found)
_found.loader.exec_module(data)


def load(split: str) -> list[dict[str, Any]]:
    """Return the rows of data.py's split, each prompt after the first `EXAMPLES` training rows of its kind."""
    train = data.load("train")
    turns = {
        kind: [
            message
            for row in [row for row in train if row["kind"] == kind][:EXAMPLES]
            for message in (*row["prompt"], {"role": "assistant", "content": row["references"][0]})
        ]
        for kind in data.SCHEMA
    }
    return [{**row, "prompt": [*turns[row["kind"]], *row["prompt"]]} for row in data.load(split)]
