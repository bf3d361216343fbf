"""Chances of references against every sequence of a toy model, argmaxes against single steps, and hand counts."""

import math

import numpy as np
import pytest
import torch
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import FAMILIES, tiny_model
from tiny_task import tiny_tokenizer
from toy import COMPLETIONS, PROMPT, STOP, toy_model

from rlseq.data.chat import reference_texts
from rlseq.engine.likelihood import score, teacher_force
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Beam, Greedy, Sample, parse_strategy
from rlseq.evaluation.measure.references import (
    completion_statistics,
    force_references,
    generation_rows,
    likelihood_rows,
    sampled_and_exact,
    solution_note,
)
from rlseq.evaluation.run import ContrastSettings, contrast
from rlseq.evaluation.statistics import CHANCE, COMPLETION, LIKELIHOOD
from rlseq.scoring import load_rewards
from rlseq.types import Prompt

STRATEGIES = [
    "sample",
    "sample:temperature=0.5",
    "sample:temperature=1.7",
    "sample:top_k=1",
    "sample:top_k=2",
    "sample:top_p=0.6",
    "sample:min_p=0.7",
    "sample:temperature=0.7,top_k=2,top_p=0.9",
]


# warps of a list of probabilities, by their definitions


def normalised(weights):
    return [w / sum(weights) for w in weights]


def warped(logits, strategy):
    p = normalised([math.exp(logit / strategy.temperature) for logit in logits])
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if strategy.top_k:
        p = normalised([x if i in order[: strategy.top_k] else 0 for i, x in enumerate(p)])
    if strategy.top_p:
        kept, mass = [], 0.0
        for i in order:
            if mass < strategy.top_p:
                kept.append(i)
                mass += p[i]
        p = normalised([x if i in kept else 0 for i, x in enumerate(p)])
    if strategy.min_p:
        p = normalised([x if x >= strategy.min_p * max(p) else 0 for x in p])
    return p


def next_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()


def chance(model, prompt, completion, strategy):
    """q(completion | prompt), token by token."""
    q = 1.0
    for t, token in enumerate(completion):
        q *= warped(next_logits(model, [*prompt, *completion[:t]]), strategy)[token]
    return q


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("text", STRATEGIES)
def test_the_chance_of_the_references_is_that_of_every_sequence_enumerated(text, seed):
    model, strategy = toy_model(seed), parse_strategy(text)
    chances = {y: chance(model, PROMPT, y, strategy) for y in COMPLETIONS}
    assert sum(chances.values()) == pytest.approx(1)
    ended = [y for y in COMPLETIONS if y[-1] == STOP]  # a reference ends with the stop
    rows = [[y] for y in ended] + [ended, ended[1:], []]
    prompts = [Prompt(str(i), "a", PROMPT, {"references": ["x"]}) for i in range(len(rows))]
    every = [Greedy(), *map(parse_strategy, STRATEGIES), Beam()]
    forced = force_references(model, prompts, rows, every)
    none_cut = [[False] * len(references) for references in rows]
    found = generation_rows(strategy, forced, every, 2, none_cut)
    for references, row in zip(rows[:-1], found, strict=False):
        assert row[CHANCE("expected_accuracy")] == pytest.approx(sum(chances[y] for y in references), rel=1e-9)
        never = [chances[y] == 0 for y in references]
        assert (row[CHANCE("unreachable")], row[CHANCE("unreachable_references")]) == (all(never), sum(never))
        assert (row[CHANCE("reference_rows")], row[CHANCE("references")]) == (1, len(references))
    assert found[-1] == {}
    all_cut = [[True] * len(references) for references in rows]  # a stop string ends each before it is whole
    assert {row.get(CHANCE("expected_accuracy")) for row in generation_rows(strategy, forced, every, 2, all_cut)} == {
        0.0,
        None,
    }
    # two tokens are cut: only the stop alone can be generated
    short = generation_rows(strategy, forced, every, 1, none_cut)
    assert short[len(ended)][CHANCE("expected_accuracy")] == pytest.approx(chances[STOP,], rel=1e-9)
    assert short[len(ended)][CHANCE("unreachable_references")] == len(ended) - (chances[STOP,] > 0)
    assert short[len(ended) + 1][CHANCE("unreachable")] == 1


def test_bytes_are_those_of_what_is_scored():
    # <unk> stands for both references: one sequence of tokens, and the bytes of one.
    prompt = Prompt("0", "a", (5,), {"references": ["zebra", "zulu zulu"]})
    rows = reference_texts(prompt, tiny_tokenizer(), [2])
    assert rows == {(3, 2): "zebra", (3, 3, 2): "zulu zulu"}
    prompt.columns["references"].insert(1, "zoo")
    again = reference_texts(prompt, tiny_tokenizer(), [2])
    assert again == rows
    [row] = likelihood_rows([list(rows.values())], force_references(tiny_model(), [prompt], [list(rows)], []))
    counts = [row[LIKELIHOOD(name)] for name in ("references", "tokens", "bytes")]
    assert counts == [2, 5, len("zebra") + len("zulu zulu")]


def test_some_warp_truncates_and_some_does_not():
    found = {
        text: [chance(toy_model(), PROMPT, y, parse_strategy(text)) == 0 for y in COMPLETIONS] for text in STRATEGIES
    }
    assert {text for text, never in found.items() if any(never)} >= {"sample:top_k=1", "sample:top_k=2"}
    assert not any(found["sample"] + found["sample:temperature=0.5"])


def test_a_contrast_has_the_exact_chance_of_each_strategy_beside_what_it_samples(tmp_path):
    models = {name: tiny_model("llama", seed=seed, initializer_range=0.3) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    rows = [
        {"prompt": f"{words} = ", "references": [*VOCABULARY[5:], "A B", "A A A A A"]} for words in ("a b", "c", "h g")
    ]
    names = ["sample:temperature=0.6", "sample:top_k=9", "greedy"]
    settings = ContrastSettings(strategies=(*names,), samples_per_row=1000, max_new_tokens=3, resamples=20)
    with load_rewards(["exact_match"]) as suite:
        results = contrast({n: str(tmp_path / n) for n in models}, rows, suite, settings=settings, quiet=True)
    assert "expected_accuracy" not in results["models"]["one"]["strategies"]["greedy"]
    exact = {}
    for name, model in models.items():
        for strategy in names[:2]:
            p, never = [], []
            for row in rows:
                ids = [[*map(VOCABULARY.index, text.split()), EOS] for text in row["references"]]
                prompt = [*map(VOCABULARY.index, row["prompt"].split())]
                warp = parse_strategy(strategy)
                p.append([chance(model, prompt, y, warp) if len(y) <= 3 else 0.0 for y in ids])
                never += [x == 0 for x in p[-1]]
            found = results["models"][name]["strategies"][strategy]
            exact[name, strategy] = sum(map(sum, p)) / 3
            assert found["expected_accuracy"]["value"] == pytest.approx(exact[name, strategy], rel=1e-4)
            assert found["unreachable_references"]["value"] == sum(never) / len(never) >= 3 / len(never)
            assert found["unreachable"]["value"] == sum(not sum(row) for row in p) / 3
            error = math.sqrt(sum(sum(row) * (1 - sum(row)) / 1000 for row in p)) / 3
            assert abs(found["exact_match"]["value"] - exact[name, strategy]) < 4 * error < exact[name, strategy]
    compared = {c["strategy"]: c["difference"] for c in results["comparisons"] if c["metric"] == "expected_accuracy"}
    del compared[None]  # by teacher forcing
    assert compared == pytest.approx({s: exact["two", s] - exact["one", s] for s in names[:2]}, abs=1e-6)


def test_all_strategies_are_scored_in_one_pass():
    model, passes = tiny_model("llama"), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    prompts = [Prompt(str(i), "", (5, 6 + i), {}) for i in range(3)]
    references = [[(7, 2)], [(8, 2), (9, 2)], []]
    force_references(model, prompts, references, [])  # finds out, once, whether the model can be packed
    passes.clear()
    force_references(model, prompts, references, map(parse_strategy, STRATEGIES))
    assert len(passes) == 1


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_argmaxes_and_margins_are_those_of_single_steps(family):
    model = tiny_model(family, dtype=torch.float64)
    prompts, completions = [[5, 6, 7], [8], [5, 6, 7], [9, 5, 6, 7, 8, 3], [8]], [[10, 11, 2], [12, 2], [13], [], [1]]
    best = []  # a completion of argmaxes alone
    for _ in range(4):
        logits = next_logits(model, [5, 6, 7, *best])
        best.append(logits.index(max(logits)))
    prompts, completions = [*prompts, [5, 6, 7]], [*completions, best]
    found = teacher_force(model, prompts, completions, strategies=[Sample(top_k=3)])
    assert found[-1].right.tolist() == [True] * 4
    for one, prompt, completion in zip(found, prompts, completions, strict=True):
        right, margins = [], []
        for t, token in enumerate(completion):
            logits = next_logits(model, [*prompt, *completion[:t]])
            right.append(logits.index(max(logits)) == token)
            margins.append(logits.pop(token) - max(logits))
        assert one.right.tolist() == right and one.margins.tolist() == pytest.approx(margins, abs=1e-9)
    for strategy, parts in (
        (None, [one.logprobs for one in found]),
        (Sample(top_k=3), [one.warped[0] for one in found]),
    ):
        for part, expected in zip(parts, score(model, prompts, completions, strategy=strategy), strict=True):
            torch.testing.assert_close(part, expected, atol=1e-9, rtol=0)


def test_of_tied_logits_the_lowest_id_is_the_argmax_as_in_greedy_decoding():
    model = tiny_model("llama")
    model.lm_head.weight.data[7] = model.lm_head.weight.data[4]
    model.lm_head.weight.data[4:8:3] *= 50  # either both at the top or both at the bottom
    prompts = [[i, j] for i in range(8, 12) for j in range(8, 12)]
    low, high = (teacher_force(model, prompts, [[token]] * len(prompts)) for token in (4, 7))
    (greedy,) = zip(
        *sample(
            model,
            [Prompt(str(p), "", tuple(p)) for p in prompts],
            num_samples=1,
            max_new_tokens=1,
            strategy=Greedy(),
            seed=0,
            stop_ids=[EOS],
        ),
        strict=True,
    )
    chosen = [rollout.completion_ids == (4,) for rollout in greedy]
    assert [bool(one.right) for one in low] == chosen and any(chosen)
    assert not any(bool(one.right) for one in high)
    assert {one.margins.item() for one, top in zip(low, chosen, strict=True) if top} == {0.0}


# what the tokens of completions say, and the note on solutions


NGRAMS = COMPLETION("ngrams"), COMPLETION("repeated_ngrams")


def test_repetition_and_the_closest_length_are_counted_by_hand():
    # 1 2 1 2 1 2 1: 4-grams 1212 2121 1212 2121, two of them distinct
    assert completion_statistics([1, 2, 1, 2, 1, 2, 1], []) == dict(zip(NGRAMS, (4, 2), strict=True))
    assert completion_statistics([1, 1, 1], []) == dict.fromkeys(NGRAMS, 0)
    lengths = [[0] * n for n in (9, 4, 6)]
    found = completion_statistics([1, 2, 3, 4, 5], lengths)  # 4 and 6 are equally close: the shorter
    names = ("compared_length", "closest_length", "ngrams")
    assert [found[COMPLETION(name)] for name in names] == [5, 4, 2]
    assert completion_statistics([1] * 8, lengths)[COMPLETION("closest_length")] == 9
    assert completion_statistics([1] * 8, lengths)[COMPLETION("repeated_ngrams")] == 4


def test_likelihoods_of_solutions_are_said_to_be_of_their_style():
    solution = "2 + 2 is 4\n#### 4"
    assert "style" in solution_note([solution, solution, "4"], 12, ["math_equal"])
    assert "(200 tokens in the mean)" in solution_note(["x"], 200, ["rouge", "exact_match"])
    assert solution_note(["x"], 200, ["exact_match"]) is None  # there the wording is what is asked for
    assert solution_note(["x"], 64, ["rouge"]) is None
    assert solution_note([solution, "4"], 12, ["math_equal"]) is None  # not most of them
    assert solution_note([], 0, ["rouge"]) is None


def counted(hits, p):
    """A row of four samples, of which `hits` are references, with an exact chance p."""
    return {COMPLETION("with_references"): 4.0, COMPLETION("exact_match"): hits, CHANCE("expected_accuracy"): p}


def test_the_sampled_share_is_compared_with_the_exact_chance_by_the_error_of_sampling():
    rows = [counted(hits, p) for hits, p in ((3.0, 0.5), (0.0, 0.1))]
    found = sampled_and_exact(
        [*rows, {}, {CHANCE("expected_accuracy"): 0.5}]
    )  # a row without references, and one without samples
    # (3 − 2 + 0 − 0.4) / 8 and √(4 · 0.25 + 4 · 0.09) / 8
    assert found == {
        "difference": pytest.approx(0.075),
        "standard_error": pytest.approx(0.1457738),
        "agrees": True,
    }
    never = [counted(0.0, 0.0005)] * 200
    assert sampled_and_exact(never)["agrees"]  # 0.4 hits are expected: that there was none tells nothing
    faulty = [counted(0.0, 0.05)] * 200
    assert not sampled_and_exact(faulty)["agrees"]
    assert sampled_and_exact([{}, {COMPLETION("with_references"): 4.0, COMPLETION("exact_match"): 1.0}]) is None


def test_the_error_of_the_sampled_share_is_what_simulation_has():
    generator = np.random.default_rng(0)
    p = generator.uniform(0, 1, 30)
    simulated = generator.binomial(4, p, (20_000, 30))
    rows = [counted(0.0, chance) for chance in p]
    assert sampled_and_exact(rows)["standard_error"] == pytest.approx((simulated.sum(1) / 120).std(), rel=0.03)
