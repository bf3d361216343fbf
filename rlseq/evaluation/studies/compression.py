"""Likelihood as compression: bits per byte of documents beside lzma's, and their section of the report."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlseq.evaluation.measure.documents import DOCUMENT, DocumentStatistics
from rlseq.evaluation.report import tables
from rlseq.evaluation.statistics import Pair, rows_as_json
from rlseq.evaluation.stats.estimators import ExpRatioOfSums, RatioOfSums
from rlseq.evaluation.studies.study import Section, StudyMetric, Table, summarise

_BITS = {"bits_per_byte": StudyMetric(Pair(DOCUMENT("bits"), DOCUMENT("bytes")), RatioOfSums())}
_BITS_SHOWN = tables.Shown(decimals=3)
_METRICS = {
    "perplexity": StudyMetric(Pair(DOCUMENT("nll"), DOCUMENT("tokens")), ExpRatioOfSums()),
    "round_trips": StudyMetric(Pair(DOCUMENT("round_trips"), DOCUMENT("documents")), RatioOfSums()),
}
_LARGEST_DICTIONARY = 2**26  # bytes, that of preset 9; below it, as large as the data: the rest would cost memory


def lzma_bits(data: bytes) -> int:
    """Bits of the data under LZMA2, preset 9 extreme, without a container: a short text pays for no file header."""
    dictionary = min(max(len(data), 4096), _LARGEST_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return 8 * len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def document_results(
    found: Mapping[str, DocumentStatistics], documents: Sequence[str], settings: Any
) -> dict[str, Any]:
    """The block `documents` of results.json: of each model and of lzma, with differences (b − a) to the first model."""
    rows = {name: statistics.rows for name, statistics in found.items()}
    texts = [text.encode() for text in documents]
    alone = [{DOCUMENT("bits"): float(lzma_bits(text)), DOCUMENT("bytes"): float(len(text))} for text in texts]
    size = sum(map(len, texts))
    bits = summarise(rows, _BITS, settings)
    others = summarise(rows, _METRICS, settings, compare=False)
    return {
        "dataset": settings.likelihood_dataset,
        "documents": len(texts),
        "bytes": size,
        "fingerprint": hashlib.blake2b(b"".join(hashlib.blake2b(t).digest() for t in texts), digest_size=8).hexdigest(),
        "lzma": {
            "together": lzma_bits(b"".join(texts)) / size,
            "alone": summarise({"lzma": alone}, _BITS, settings)["models"]["lzma"]["bits_per_byte"],
        },
        "models": {
            name: {
                **bits["models"][name],
                **others["models"][name],
                "tokens": int(sum(row[DOCUMENT("tokens")] for row in statistics.rows)),
                "context": statistics.coding.context,
                "stride": statistics.coding.stride,
                "start": statistics.start,
                "vocabulary": statistics.coding.vocabulary,
            }
            for name, statistics in found.items()
        },
        "comparisons": bits["comparisons"],
    }


def lossy_notes(block: Mapping[str, Any]) -> list[str]:
    """A warning for each model whose tokenizer does not give every document back."""
    return [
        f"The tokenizer of {name} does not give back {lost} of the {block['documents']} documents as they were "
        "(unknown characters, or a normalisation that loses something). Its bits per byte leave out what was lost: "
        "they are not the length of a code for the text. Do not compare them."
        for name, entry in block["models"].items()
        if (lost := round((1 - entry["round_trips"]["value"]) * block["documents"]))
    ]


def document_records(found: Mapping[str, DocumentStatistics]) -> Iterator[dict[str, Any]]:
    """The lines of documents.jsonl: one per model and document, numbered by its place in the data."""
    for name, statistics in found.items():
        for number, row in enumerate(rows_as_json(statistics.rows, DOCUMENT.source)):
            yield {"model": name, "document": number, **row}


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The report's section, where documents were measured."""
    block = results.get("documents")
    if block is None:
        return []
    first = next(iter(block["models"]))
    gaps = {comparison["b"]: comparison for comparison in block["comparisons"]}
    rows, how = [], []
    for name, entry in block["models"].items():
        rows.append(
            [
                name,
                _BITS_SHOWN.cell(entry["bits_per_byte"]),
                tables.Shown(percent=True).value(entry["round_trips"]["value"]),
                _BITS_SHOWN.change(gaps[name]) if name in gaps else "",
                tables.Shown(decimals=2).cell(entry["perplexity"]),
            ]
        )
        start = f"after {entry['start']}" if entry["start"] else f"uniform over {entry['vocabulary']:,} tokens"
        how.append([name, *(f"{entry[key]:,}" for key in ("tokens", "context", "stride")), start])
    together, alone = tables.number(block["lzma"]["together"], 3), _BITS_SHOWN.cell(block["lzma"]["alone"])
    rows.append(["lzma, all documents together", together, "", "", ""])
    rows.append(["lzma, each document alone", alone, "", "", ""])
    header = ["Coder", "Bits per byte", "Given back", f"Difference to {first}", "Perplexity per token"]
    return [
        Section(
            "documents",
            "Text without prompts",
            f"Bits per byte of {block['documents']:,} whole documents ({block['bytes']:,} bytes) of "
            f"{block['dataset']}: Σ −log2 p of their tokens over their UTF-8 bytes. An arithmetic coder driven by the "
            "model's probabilities compresses a document to that size, within 2 bits. Lower is better; a rise against "
            "the model that training started from is what it forgot. Windows slide by the stride: every token is "
            "scored once, given at least context − stride tokens where available. The end of a document is not "
            "coded. lzma (LZMA2, preset 9 extreme, without file headers) is measured on the same bytes. With 95% "
            "bootstrap intervals over documents; differences are paired over documents.",
            "the bits leave out the coder itself: a model's weights are far larger than lzma. Text that a model was "
            "trained on says nothing of text that it was not. A model starts every document without context, as lzma "
            "does with each document alone. Perplexities compare under one tokenizer only. Bits per byte are a code "
            "length only where the tokenizer gives every document back as it was (100%).",
            [
                Table(header, rows, note=" ".join(lossy_notes(block))),
                Table(["Model", "Tokens", "Context", "Stride", "First token"], how, "How the documents are coded"),
            ],
        )
    ]
