"""GGUF files (llama.cpp's format, weights and tokenizer in one) as models: which path names one, and how it is read.

transformers reads them through the `gguf` package and restores the weights from their blocks. They are then weights as
any others, and are saved as safetensors.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rlseq.errors import ModelError

SUFFIX = ".gguf"


def gguf_file(path: str | Path) -> Path | None:
    """The local GGUF file that a path names: itself, or the only one of a folder without safetensors; None: none.

    Raises:
        ModelError: the folder holds several.
    """
    path = Path(path)
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise ModelError(
            f"{str(path)!r} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}): name one of them"
        )
    return files[0] if files else None


def may_be_on_hub(name_or_path: str) -> bool:
    """Whether a text can be a hub id, owner/name, or the GGUF file of one, owner/name/file.gguf."""
    return name_or_path.count("/") == 1 + name_or_path.endswith(SUFFIX)


def where_and_how(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` gets: a folder or hub id, and for a GGUF file the option that names it.

    Raises:
        ModelError: a folder holds several, or the package that reads them is not installed.
    """
    file = gguf_file(name_or_path)
    if file is None:
        text = str(name_or_path)
        if not (text.endswith(SUFFIX) and may_be_on_hub(text)):
            return text, {}
        file = Path(text)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{str(name_or_path)!r} is a GGUF file, which needs gguf: pip install 'rlseq[gguf]'")
    return str(file.parent), {"gguf_file": file.name}
