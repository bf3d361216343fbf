"""Text without prompts: how many bits a model codes whole documents in, which measures what fine-tuning forgets.

A model that gives every next token a probability is a coder (Shannon 1948; Delétang et al. 2024): an arithmetic coder
driven by it spends −log2 p on each token, and at most 2 bits more a document. Bits over the UTF-8 bytes of the text
compare across tokenizers, and with compressors. The end of a document is not coded: its number of tokens is taken as
known, as in Hugging Face's perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from rlseq.common.ranks import raise_on_all_ranks
from rlseq.data.files import seems_data
from rlseq.data.rows import load_rows
from rlseq.engine.float64 import to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.model.load import load_config, load_tokenizer
from rlseq.errors import ConfigError, DataError, ModelError, did_you_mean
from rlseq.evaluation.statistics import RowStatistics, Source

DOCUMENT = Source("document")
UNLIMITED_CONTEXT = 2048  # the context of a model that states no limit


@dataclass(frozen=True)
class Coding:
    """How a model codes a document.

    Attributes:
        context: tokens of a window.
        stride: by how many tokens a window begins after the one before, below `context`.
        start: the token that stands before the first one; None: there is none, and the first token is coded under
            the uniform distribution over the vocabulary.
        vocabulary: its size.
    """

    context: int
    stride: int
    start: int | None
    vocabulary: int


@dataclass(frozen=True)
class DocumentStatistics:
    """What one model makes of each document: nll (nats), bits, tokens, bytes, and whether the text round-trips."""

    coding: Coding
    start: str | None  # the start token's text
    rows: list[RowStatistics]


def check_documents(settings: Any) -> None:
    """Check the windows over documents, and that the documents can be read.

    Raises:
        ConfigError: the stride is not below the context.
        DataError: as `load_documents`.
    """
    if settings.likelihood_dataset is None:
        return
    if settings.likelihood_stride is not None and settings.likelihood_context is not None:
        _check_stride(settings.likelihood_stride, settings.likelihood_context, "--likelihood_context")
    load_documents(settings)


def check_windows(settings: Any, models: Mapping[str, str | Path]) -> None:
    """Check the stride against the context of each model by its configuration, without loading it.

    Raises:
        ConfigError: a stride that is not below a context.
    """
    if settings.likelihood_dataset is None:
        return
    for name, path in models.items():
        try:
            config, tokenizer = load_config(path), load_tokenizer(path)
        except (OSError, ValueError, ModelError):
            continue  # an adapter has no configuration of its own; what cannot be loaded, loading tells
        coding_of(config, tokenizer, settings, name)


def load_documents(settings: Any) -> list[str]:
    """The first `likelihood_rows` documents of the data set; of .txt files (or a folder of them), one a file.

    Without a data set there are none.

    Raises:
        DataError: what `rlseq.data.rows.load_rows` raises; no such column, or a row whose document is missing, empty,
            no text or not to be put in UTF-8.
    """
    name, column = settings.likelihood_dataset, settings.likelihood_column
    if name is None:
        return []
    rows = _text_files(name)
    if rows is None:
        options = {"config_name": settings.likelihood_config, "prompt_column": column}
        rows = load_rows(name, settings.likelihood_split, **options)
    elif settings.likelihood_split is not None:
        raise DataError(f"{name!r} is text files, which have no split {settings.likelihood_split!r}; name the files")
    rows = rows[: settings.likelihood_rows]
    if not any(column in row for row in rows):
        raise DataError(
            f"{name!r} has no column {column!r} (--likelihood_column); its columns are {', '.join(rows[0])}."
            + did_you_mean(column, rows[0])
        )
    documents = []
    for number, row in enumerate(rows):
        text = row.get(column)
        if not text or not isinstance(text, str):
            raise DataError(f"row {number} of {name!r}: {column!r} is {text!r}; expected a text that is not empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"row {number} of {name!r}: the text is not to be put in UTF-8: {error.reason}") from error
        documents.append(text)
    return documents


def _text_files(dataset_name: str) -> list[dict[str, Any]] | None:
    """A row a .txt file, or None where the name stands for something else."""
    files: list[Path] = []
    for path in (Path(part.strip()) for part in dataset_name.split(",")):
        if path.is_dir() and not any(map(seems_data, path.rglob("*"))):
            files += sorted(path.rglob("*.txt"))
        elif path.suffix == ".txt":
            files.append(path)
        else:
            return None
    rows = []
    for file in files:
        if not file.is_file():
            near = did_you_mean(file.name, (p.name for p in file.parent.iterdir())) if file.parent.is_dir() else ""
            raise DataError(f"there is no text file {str(file)!r}.{near}")
        try:
            text = file.read_bytes().decode()  # not read_text, which would change line ends
        except UnicodeDecodeError as error:
            raise DataError(f"{str(file)!r} is not UTF-8: {error.reason} at byte {error.start}") from error
        if not text:
            raise DataError(f"row {len(rows)} of {dataset_name!r}: the file {str(file)!r} is empty")
        rows.append({"text": text})
    return rows or None


def coding_of(config: Any, tokenizer: Any, settings: Any, name: str = "the model") -> Coding:
    """How a model with this configuration and tokenizer codes documents.

    The context is the model's longest, or less if the tokenizer or `likelihood_context` says so; the stride is half of
    it unless set. A document starts after the tokenizer's BOS, else after its EOS.

    Raises:
        ConfigError: a stride that is not below the context.
    """
    config = config.get_text_config()
    limits = (
        getattr(config, "max_position_embeddings", None) or UNLIMITED_CONTEXT,
        tokenizer.model_max_length,
        settings.likelihood_context,
    )
    context = int(min(limit for limit in limits if limit is not None))
    stride = settings.likelihood_stride or max(1, context // 2)
    _check_stride(stride, context, f"the context of {name!r}")
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    return Coding(context, stride, start, config.vocab_size)


def _check_stride(stride: int, context: int, what: str) -> None:
    if stride >= context:
        raise ConfigError(
            f"--likelihood_stride is {stride}, and {what} {context} tokens; expected a stride below the context, "
            "else the first token of a window would have none before it"
        )


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Sliding windows over a sequence: (begin, first, end), of which tokens first..end-1 are scored given begin..

    Token 0 is given and every other is scored once: by the first window all of its tokens, by a later one those that
    were not, with at least context − stride tokens before each (Hugging Face's strided perplexity). What a token is
    given does not depend on the tokens after it or their number, so a decoder sees the same windows.
    """
    begin, first = 0, 1
    while first < tokens:
        end = min(begin + context, tokens)
        yield begin, first, end
        begin, first = begin + stride, end


def document_logprobs(
    model: torch.nn.Module,
    documents: Sequence[Sequence[int]],
    coding: Coding,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Log-prob of every token of D documents, each given the tokens before it in its window.

    Args:
        model: a causal model.
        documents: their token ids, without a start token.
        progress: called with (windows done, windows).

    Returns:
        D tensors (T_d,), nats, float64, on the CPU; without a start token the first is −log of the vocabulary's size.
    """
    given = () if coding.start is None else (coding.start,)
    sequences = [(*given, *ids) for ids in documents]
    places = [
        (document, *window)
        for document, sequence in enumerate(sequences)
        for window in windows(len(sequence), coding.context, coding.stride)
    ]
    found = score(
        model,
        [sequences[document][begin:first] for document, begin, first, _ in places],
        [sequences[document][first:end] for document, _, first, end in places],
        share_prompts=False,  # all that documents share is the start
        progress=progress,
    )
    uniform = torch.full((1 if coding.start is None else 0,), -math.log(coding.vocabulary), dtype=torch.float64)
    parts = [[uniform[: len(ids)]] for ids in documents]
    for (document, *_), logprobs in zip(places, found, strict=True):
        parts[document].append(to_float64(logprobs).cpu())
    return [torch.cat(part) for part in parts]


def measure_documents(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    settings: Any,
    *,
    name: str = "model",
    quiet: bool = True,
) -> DocumentStatistics:
    """Code the documents with a model; every process takes every n-th of them, and all get all statistics."""
    with raise_on_all_ranks():
        coding, mine, rows = _measure_mine(model, tokenizer, documents, settings, name=name, quiet=quiet)
    whole: list[RowStatistics] = [{}] * len(documents)
    for places, part in gather_object([(mine, rows)]):
        for place, row in zip(places, part, strict=True):
            whole[place] = row
    start = None if coding.start is None else tokenizer.convert_ids_to_tokens(coding.start)
    return DocumentStatistics(coding, start, whole)


def _measure_mine(
    model: torch.nn.Module, tokenizer: Any, documents: Sequence[str], settings: Any, *, name: str, quiet: bool
) -> tuple[Coding, list[int], list[RowStatistics]]:
    """Code this process's documents: how, which, and the statistics of each."""
    state = PartialState()
    coding = coding_of(model.config, tokenizer, settings, name)
    mine = list(range(state.process_index, len(documents), state.num_processes))
    texts = [documents[i] for i in mine]
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    ids = tokenizer(text=texts, **options)["input_ids"] if texts else []
    with tqdm(
        desc=f"documents by {name}", unit="window", disable=quiet or not state.is_main_process, leave=False
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        logprobs = document_logprobs(model, ids, coding, progress=progress)
    rows = []
    for text, tokens, values in zip(texts, ids, logprobs, strict=True):
        nll = -values.sum().item()
        rows.append(
            {
                DOCUMENT("nll"): nll,
                DOCUMENT("bits"): nll / math.log(2),
                DOCUMENT("tokens"): float(len(tokens)),
                DOCUMENT("bytes"): float(len(text.encode())),
                DOCUMENT("documents"): 1.0,
                DOCUMENT("round_trips"): float(tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text),
            }
        )
    return coding, mine, rows
