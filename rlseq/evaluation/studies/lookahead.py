"""How well linear heads on a model's last hidden state predict tokens further ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlseq.engine.float64 import float64_device, to_float64
from rlseq.engine.likelihood import score
from rlseq.engine.model.auto_class import causal_class
from rlseq.engine.packed.packing import pad
from rlseq.errors import ModelError
from rlseq.evaluation.metrics import Metric
from rlseq.evaluation.report import plots, tables
from rlseq.evaluation.statistics import Pair, RowStatistics, Source
from rlseq.evaluation.stats.estimators import RatioOfSums, SumOfRatios
from rlseq.evaluation.stats.heads import chosen_head, cross_entropy, logits
from rlseq.evaluation.studies.study import Context, Section, Study, StudyMetric, Table, summarise
from rlseq.types import Prompt

DISTANCES = (1, 2, 3, 4)
MODEL, RANDOM, TOKEN, HEAD = "model", "random_weights", "current_token", "own_head"
_LABELS = {MODEL: "Model", RANDOM: "Random weights", TOKEN: "Current token"}
_LESS = {control: f"less_{control}" for control in (RANDOM, TOKEN)}
_LOOKAHEAD = Source("lookahead")
_FITTED, _HELD_OUT = _LOOKAHEAD("fitted"), _LOOKAHEAD("held_out")
_BATCH_TOKENS = 16_384
_MEASURES = ("nll", "right")


class Lookahead(Study):
    """Linear heads on the frozen last hidden state at position t that predict token t + k, with reference prefixes.

    Multi-token prediction (Gloeckle et al. 2024; as a probe of a frozen model, Pal et al. 2023 "Future Lens"):
    the tokens between are not seen. An n-token loss of teacher forcing (`rlseq.engine.measures.block_nll`) differs:
    the chain rule makes it a sum of next-token losses. The head of k = 1 is fitted in the same way, for comparison.

    Heads are softmax regressions over the tokens that occur in references, fitted on one half of the rows and measured
    on the other; rows of equal prompts fall on one side. Two controls are fitted in the same way: on the states of the
    same architecture with random weights, and on the current token alone.
    """

    name = "lookahead"
    together = True  # a head is fitted on rows of all processes

    def cost(self, rows: int, references: int, settings: Any) -> tuple[int, int]:
        """The references' states, of the model and of one with random weights, and its own log-probs."""
        return 0, 3 * references

    def sample(self, context: Context) -> list[RowStatistics]:
        """Of held-out rows, sums over positions: count(k); of head H nll(k, H) (nats), right(k, H); nll(1, own_head).

        Rows that the heads were fitted on have fitted; where rows are too few, all have too_few alone.
        """
        statistics: list[RowStatistics] = [{} for _ in context.prompts]
        positions = _Positions(context)
        if positions.enough():
            for row in {row for row, _ in positions.pairs}:
                statistics[row][_FITTED if positions.fits(row) else _HELD_OUT] = 1.0
            heads = {
                MODEL: _states(context.model, context.prompts, positions.pairs),
                RANDOM: _states(_random_twin(context.model, context.settings.seed), context.prompts, positions.pairs),
                TOKEN: positions.current,
            }
            for name, features in heads.items():
                _add_head(statistics, name, features, positions)
            _add_own_head(statistics, context, positions)
        else:
            statistics = [{_LOOKAHEAD("too_few"): 1.0} for _ in context.prompts]
        context.progress(len(context.prompts))
        return statistics

    def results(
        self, found: Mapping[str, Sequence[RowStatistics]], settings: Any, metrics: Mapping[str, Metric]
    ) -> dict[str, Any] | None:
        """{"rows_fitted", "rows_held_out", "models": {model: {k: {"positions", measure: {head: cell}}}}, "comparisons"}

        Measures are nll and right; a head less_CONTROL is the model's value less that of the control.
        """
        first = next(iter(found.values()))
        fitted = sum(_FITTED in row for row in first)
        found = {model: [row for row in rows if _HELD_OUT in row] for model, rows in found.items()}
        held_out = len(next(iter(found.values())))
        if not held_out:
            return {"rows_fitted": 0, "rows_held_out": 0}
        distances = [
            k for k in DISTANCES if any(_LOOKAHEAD("count", k) in row for rows in found.values() for row in rows)
        ]
        metrics = _metrics(distances)
        summary = summarise(found, metrics, settings)
        models: dict[str, Any] = {}
        for model, cells in summary["models"].items():
            models[model] = {
                str(k): {"positions": int(sum(row.get(_LOOKAHEAD("count", k), 0.0) for row in found[model]))}
                for k in distances
            }
            for (k, measure, head), cell in cells.items():
                models[model][str(k)].setdefault(measure, {})[head] = cell
        comparisons = [
            {**c, "distance": str(k), "metric": measure, "head": head}
            for c in summary["comparisons"]
            for k, measure, head in [c["metric"]]
            if head in (MODEL, *_LESS.values())
        ]
        return {"rows_fitted": fitted, "rows_held_out": held_out, "models": models, "comparisons": comparisons}

    def section(self, results: Mapping[str, Any]) -> Section:
        """A table of cross-entropy and one of accuracy by distance, and a figure of cross-entropy."""
        block = results["studies"][self.name]
        title = "What hidden states tell about later tokens"
        if not block["rows_held_out"]:
            return Section("lookahead", title, "Skipped: too few rows with references to fit heads and test them.", "")
        return Section(
            "lookahead",
            title,
            "Linear heads on the frozen model's last hidden state, after the prompt and a reference's tokens up to the "
            "current one, predict the k-th next token without seeing those between: multi-token prediction. "
            "(An n-token loss of teacher forcing is something else: by the chain rule it is a sum of next-token "
            "losses.) Held-out cross-entropy (nats) and top-1 accuracy, beside heads fitted in the same way on the "
            "same architecture with random weights and on the current token alone. "
            f"Fitted on {block['rows_fitted']:,} rows, measured on {block['rows_held_out']:,} others, over the tokens "
            "that occur in references. Own head: the model's own next-token loss on the same positions, over its whole "
            "vocabulary.",
            "what can be read off a state need not be used, so that nothing here shows planning: the prompt, which "
            "every state has seen, may already tell the later tokens. Only what a model has beyond both controls was "
            "learnt, and more rows fit better heads: numbers at different --study_rows do not compare.",
            [_table(block, measure) for measure in _MEASURES],
            {"lookahead": _figure(block, list(results["models"]))},
        )


class _Positions:
    """Every position of every reference: its row, the token read last, and the tokens at each distance ahead."""

    def __init__(self, context: Context) -> None:
        self.pairs = [(row, ids) for row, found in enumerate(context.references) for ids in found]
        self.device = float64_device(next(context.model.parameters()).device)
        texts = [repr(prompt.prompt) for prompt in context.prompts]  # equal prompts fall on one side
        self._hashes = [hashlib.blake2b(text.encode(), digest_size=2).digest() for text in texts]
        tokens = sorted({token for _, ids in self.pairs for token in ids})
        self.classes = len(tokens)
        place = {token: i for i, token in enumerate(tokens)}
        rows, current, ahead = [], [], []
        for row, ids in self.pairs:
            rows += [row] * len(ids)
            current += [context.prompts[row].prompt_ids[-1], *ids[:-1]]
            own = [place[token] for token in ids] + [-1] * max(DISTANCES)
            ahead += [own[t : t + max(DISTANCES)] for t in range(len(ids))]
        self.rows = rows  # (N,)
        self.targets = torch.tensor(ahead, device=self.device).reshape(len(rows), max(DISTANCES))  # −1: beyond the end
        self.fitted = self._tensor([self.fits(row) for row in rows])
        self.judged = self._tensor([self.fits(row) and self._hashes[row][1] % 4 == 0 for row in rows])
        known = {
            token: i for i, token in enumerate(sorted({current[i] for i, row in enumerate(rows) if self.fits(row)}))
        }
        self.current = self._tensor([known.get(token, len(known)) for token in current])  # the last: never met
        self.current_size = len(known) + 1

    def fits(self, row: int) -> bool:
        """Whether heads are fitted on a row; the others are held out."""
        return self._hashes[row][0] % 2 == 0

    def enough(self) -> bool:
        """Whether there are positions to fit on, to choose the penalty on, and to test on."""
        parts = (self.fitted & ~self.judged, self.judged, ~self.fitted)
        return bool(self.rows) and all(bool(part.any()) for part in parts)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


def _states(model: torch.nn.Module, prompts: Sequence[Prompt], pairs: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
    """(N, H) last hidden states after the prompt and each token of each reference but its last, float64."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = next(model.parameters()).device
    lengths = [len(prompts[row].prompt_ids) + len(ids) for row, ids in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    while order:
        size = max(1, _BATCH_TOKENS // lengths[order[0]])
        chosen, order = order[:size], order[size:]
        ids = [pairs[i][1] for i in chosen]
        batch = pad([prompts[pairs[i][0]].prompt_ids for i in chosen], ids, pad_id=0, device=device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with torch.no_grad():
            if decoder is not model:
                hidden = decoder(**inputs).last_hidden_state
            else:
                states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
                if not states:
                    raise ModelError(f"{type(model).__name__} gives no hidden states, which the study lookahead reads")
                hidden = states[-1]
        parts = to_float64(hidden[batch.token_rows, batch.token_columns - 1]).split(batch.lengths)
        for i, part in zip(chosen, parts, strict=True):
            found[i] = part
    return torch.cat(found)


def _random_twin(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same architecture with weights as they are before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = causal_class(model.config).from_config(model.config, trust_remote_code=False)
    parameter = next(model.parameters())
    return twin.to(parameter.device, parameter.dtype).eval()


def _add_head(statistics: list[RowStatistics], name: str, features: Tensor, positions: _Positions) -> None:
    """Fit a head at each distance and add what it does on held-out positions."""
    size = positions.current_size
    if features.ndim == 2:
        fitted = features[positions.fitted]
        features = (features - fitted.mean(0)) / fitted.std(0).clamp(min=1e-6)
        features = torch.cat([features, features.new_ones(len(features), 1)], 1)  # a bias
        size = features.shape[1]
    for k in DISTANCES:
        targets = positions.targets[:, k - 1]
        there = targets >= 0
        fitted, tested = there & positions.fitted, there & ~positions.fitted
        judged = positions.judged[fitted]
        if not (judged.any() and (~judged).any()):
            continue
        weights = chosen_head(features[fitted], targets[fitted], judged, (size, positions.classes))
        scores, wanted = logits(features[tested], weights), targets[tested]
        losses = cross_entropy(scores, wanted, reduction="none").tolist()
        rights = (scores.argmax(-1) == wanted).tolist()
        for i, loss, right in zip(tested.nonzero()[:, 0].tolist(), losses, rights, strict=True):
            mine = statistics[positions.rows[i]]
            added = {_LOOKAHEAD("nll", k, name): loss, _LOOKAHEAD("right", k, name): right}
            for key, value in (added | {_LOOKAHEAD("count", k): float(name == MODEL)}).items():
                mine[key] = mine.get(key, 0.0) + value


def _add_own_head(statistics: list[RowStatistics], context: Context, positions: _Positions) -> None:
    pairs = [(row, ids) for row, ids in positions.pairs if not positions.fits(row)]
    found = score(context.model, [context.prompts[row].prompt_ids for row, _ in pairs], [ids for _, ids in pairs])
    for (row, _), logprobs in zip(pairs, found, strict=True):
        key = _LOOKAHEAD("nll", 1, HEAD)
        statistics[row][key] = statistics[row].get(key, 0.0) - to_float64(logprobs).sum().item()


def _metrics(distances: Sequence[int]) -> dict[tuple[int, str, str], StudyMetric]:
    metrics = {}
    for k in distances:
        count = _LOOKAHEAD("count", k)
        for measure in _MEASURES:
            for head in (MODEL, RANDOM, TOKEN):
                metrics[k, measure, head] = StudyMetric(Pair(_LOOKAHEAD(measure, k, head), count), RatioOfSums())
            for control in (RANDOM, TOKEN):
                columns = (_LOOKAHEAD(measure, k, control), count, _LOOKAHEAD(measure, k, MODEL), count)
                metrics[k, measure, _LESS[control]] = StudyMetric(columns, SumOfRatios((-1, 1)))
    metrics[1, "nll", HEAD] = StudyMetric(Pair(_LOOKAHEAD("nll", 1, HEAD), _LOOKAHEAD("count", 1)), RatioOfSums())
    return metrics


def _table(block: Mapping[str, Any], measure: str) -> Table:
    percent = measure == "right"
    info = tables.Shown(percent=percent, decimals=1 if percent else 3)
    rows = []
    for model, entry in block["models"].items():
        for k, found in entry.items():
            cells = found[measure]
            values = [info.cell(cells[h]) for h in _LABELS]
            values += [info.change(cells[h], "value") for h in _LESS.values()]
            if not percent:
                values.append(info.value(cells[HEAD]["value"]) if HEAD in cells else "")
            rows.append([model, k, f"{found['positions']:,}", *values])
    head = ["Model", "k", "Positions", *_LABELS.values(), "Model − random weights", "Model − current token"]
    if percent:
        return Table(head, rows, "Top-1 accuracy of the k-th next token")
    return Table([*head, "Own head"], rows, "Cross-entropy of the k-th next token (nats)")


def _figure(block: Mapping[str, Any], models: Sequence[str]) -> tuple[str, str]:
    lines = [
        (f"{model}, {_LABELS[head].lower()}", plots.color_of(models, model), style, cells)
        for model, entry in block["models"].items()
        for head, style in ((MODEL, "-"), (RANDOM, "--"), (TOKEN, ":"))
        if (cells := {float(k): found["nll"][head] for k, found in entry.items()})
    ]
    figure = plots.curves(lines, x_label="k tokens ahead", y_label="held-out cross-entropy (nats)")
    return "Held-out cross-entropy by distance, with 95% bands over rows", plots.to_svg(figure)
