"""The rows of data.py with three more examples, for `--dataset_name recipes/extraction/few_shot.py`: a longer prompt.

After the example of data.py, each prompt has three rows of `train` of its own kind with their references, as turns of
the conversation: what a longer prompt reaches without training.
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
    """Return the rows of data.py's split, each prompt with the first `EXAMPLES` training rows of its kind."""
    train = data.load("train")
    turns = {
        kind: [
            message
            for row in [row for row in train if row["kind"] == kind][:EXAMPLES]
            for message in (row["prompt"][-1], {"role": "assistant", "content": row["references"][0]})
        ]
        for kind in data.SCHEMA
    }
    return [
        {**row, "prompt": [*row["prompt"][:-1], *turns[row["kind"]], row["prompt"][-1]]} for row in data.load(split)
    ]
