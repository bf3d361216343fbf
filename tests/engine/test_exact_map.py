"""Exact search against the enumeration of every completion that ends."""

import itertools
import math

import pytest
import torch
from tiny import EOS, FAMILIES, tiny_model
from tiny_shapes import tiny_shape

from rlseq.engine.beam import beam
from rlseq.engine.exact_map import exact_map, exact_map_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import Beam, Greedy
from rlseq.errors import ConfigError, ModelError
from rlseq.types import Prompt

VOCABULARY = 6
STOPS = (EOS, 5)
OTHERS = [token for token in range(VOCABULARY) if token not in STOPS]
PROMPTS = [(1, 4, 3), (4,), (3, 3, 4, 1, 3, 0, 4), (0, 1)]


def small(family="llama", seed=0, **changes):
    return tiny_model(family, seed=seed, vocab_size=VOCABULARY, **changes)


def every_completion(longest):
    """All that end with a stop id within the limit, the stop id counted."""
    for length in range(longest):
        for start in itertools.product(OTHERS, repeat=length):
            yield from ((*start, stop) for stop in STOPS)


def talkative(seed, family="llama"):
    """A model that is sure of what it says and seldom stops: it pays to be long, and there is much to explore."""
    model = small(family, seed)
    model.lm_head.weight.data *= 2
    model.lm_head.weight.data[list(STOPS)] *= 0.1
    return model


def log_probs(model, prompt, longest):
    """Log-prob of every completion that ends, by plain forwards without a cache: completion -> nats."""
    found = {}
    for length, group in itertools.groupby(every_completion(longest), key=len):
        completions = list(group)
        ids = torch.tensor([[*prompt, *completion] for completion in completions])
        with torch.no_grad():
            table = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for row, completion in enumerate(completions):
            places = range(len(prompt) - 1, len(prompt) - 1 + length)
            found[completion] = sum(table[row, at, token].item() for at, token in zip(places, completion, strict=True))
    return found


def model_says(model, prompt, completion):
    """Log-prob of one completion, in nats, by a plain forward without a cache."""
    with torch.no_grad():
        table = (
            model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double().log_softmax(-1)
        )
    return sum(table[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


def prefixes_run(model):
    """Count what a search sends through the model: (prefixes, forward passes), by a hook of its own."""
    counts = {"prefixes": 0, "forwards": 0}

    def count(module, arguments, keywords):
        counts["prefixes"] += len(keywords["input_ids"])
        counts["forwards"] += 1

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@pytest.mark.parametrize("batch_rows", [1, 3, 32])
def test_it_finds_the_likeliest_of_all_completions_in_every_family(family, batch_rows):
    model = small(family, seed=1)
    for prompt in PROMPTS:
        listed = log_probs(model, prompt, 5)
        assert len(listed) == sum(2 * 4**length for length in range(5))
        found, log_prob, proven = exact_map(
            model, prompt, max_new_tokens=5, stop_ids=STOPS, width=1, batch_rows=batch_rows
        )
        best = max(listed, key=listed.get)
        assert found == best
        assert log_prob == pytest.approx(listed[best], abs=1e-4)
        assert proven is True


@pytest.mark.parametrize("longest", [1, 2, 3, 4])
def test_completions_of_the_longest_length_count_and_longer_ones_do_not(longest):
    lengths = set()
    for seed in range(8):
        model = talkative(seed)
        for prompt in PROMPTS:
            listed = log_probs(model, prompt, longest)
            found, log_prob, proven = exact_map(model, prompt, max_new_tokens=longest, stop_ids=STOPS)
            assert proven and log_prob == pytest.approx(max(listed.values()), abs=1e-4)
            assert listed[found] == pytest.approx(max(listed.values()), abs=1e-4)
            lengths.add(len(found))
    assert lengths >= {1, longest}  # the empty completion is the mode somewhere, and the longest elsewhere


def test_it_finds_what_greedy_and_beam_search_miss_and_is_never_worse():
    missed = {"greedy": 0, "beam": 0}
    for seed in range(10):
        model = small(seed=seed)
        prompts = [Prompt(str(ids), "", ids) for ids in PROMPTS]
        common = {"max_new_tokens": 5, "stop_ids": STOPS}
        greedy = sample(model, prompts, num_samples=1, strategy=Greedy(), seed=0, **common)
        narrow = beam(model, prompts, strategy=Beam(width=2), **common)
        for prompt, (g,), (b,) in zip(prompts, greedy, narrow, strict=True):
            _, log_prob, proven = exact_map(model, prompt.prompt_ids, width=2, **common)
            assert proven
            for name, rollout in (("greedy", g), ("beam", b)):
                if rollout.finish_reason == "stop":
                    assert log_prob > rollout.logprob - 1e-4
                    missed[name] += log_prob > rollout.logprob + 1e-3
    assert missed["greedy"] and missed["beam"]


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 7, 20, 60])
@pytest.mark.parametrize("batch_rows", [1, 4, 32])
def test_the_budget_is_kept_and_proven_is_claimed_of_the_best_alone(max_nodes, batch_rows):
    proofs = []
    for seed in (0, 1, 2, 5):
        model = talkative(seed)
        listed = log_probs(model, (1, 4, 3), 5)
        start = beam(model, [Prompt("", "", (1, 4, 3))], max_new_tokens=5, strategy=Beam(width=1), stop_ids=STOPS)
        counts = prefixes_run(model)
        found, log_prob, proven = exact_map(
            model,
            (1, 4, 3),
            max_new_tokens=5,
            stop_ids=STOPS,
            start=start[0][0].completion_ids[:-1],  # ends nowhere: no bound, and no forward pass to score it
            max_nodes=max_nodes,
            batch_rows=batch_rows,
        )
        assert counts["prefixes"] <= max_nodes
        assert log_prob == pytest.approx(listed[found], abs=1e-4)  # unproven, it is still a completion with its value
        if proven:
            assert log_prob == pytest.approx(max(listed.values()), abs=1e-4)
        else:
            assert counts["prefixes"] == max_nodes
        proofs.append(proven)
    if max_nodes in (1, 60):
        assert proofs == [max_nodes == 60] * 4  # both claims are made


def test_one_node_more_than_needed_is_not_needed():
    model = small(seed=3)
    counts = prefixes_run(model)
    settings = {"max_new_tokens": 5, "stop_ids": STOPS, "start": (), "batch_rows": 1}
    whole = exact_map(model, (0, 1), **settings)
    needed = counts["prefixes"]
    assert whole.proven and 1 < needed < 1 + 4 + 16 + 64 + 256  # some of the tree was cut off
    assert exact_map(model, (0, 1), **settings, max_nodes=needed) == whole
    assert not exact_map(model, (0, 1), **settings, max_nodes=needed - 1).proven


def test_a_better_start_saves_nodes_and_changes_nothing_else():
    model = small(seed=3)
    counts = prefixes_run(model)
    settings = {"max_new_tokens": 5, "stop_ids": STOPS, "batch_rows": 1}
    blind = exact_map(model, (0, 1), **settings, start=(4, 4, 4, 4, EOS))
    without = counts["prefixes"]
    counts["prefixes"] = 0
    told = exact_map(model, (0, 1), **settings, start=blind.completion_ids)
    assert told.completion_ids == blind.completion_ids and told.proven
    assert counts["prefixes"] < without


def test_several_prefixes_share_a_forward_pass():
    def passes(batch_rows):
        model = talkative(5)
        counts = prefixes_run(model)
        found = exact_map(model, (0, 1), max_new_tokens=5, stop_ids=STOPS, start=(), batch_rows=batch_rows)
        return found.completion_ids, counts["forwards"]

    (one, alone), (many, together) = passes(1), passes(16)
    assert one == many
    assert together < alone / 3


def test_of_equally_likely_completions_the_start_is_kept_and_the_proof_stands():
    model = small(seed=1)
    model.lm_head.weight.data.zero_()  # uniform: log-prob of every completion is length · log(1/6)
    for start in ((EOS,), (5,)):
        found = exact_map(model, (1,), max_new_tokens=4, stop_ids=STOPS, start=start)
        assert found.completion_ids == start and found.proven
        assert found.log_prob == pytest.approx(-math.log(6), abs=1e-6)
    assert exact_map(model, (1,), max_new_tokens=4, stop_ids=STOPS, start=(3, 3)).completion_ids in ((EOS,), (5,))


def test_the_empty_completion_is_the_mode_where_a_stop_is_likeliest_at_once():
    model = small(seed=0)
    listed = log_probs(model, (4,), 4)
    assert exact_map(model, (4,), max_new_tokens=1, stop_ids=STOPS).completion_ids == max(
        ((stop,) for stop in STOPS), key=listed.get
    )


def test_a_start_that_does_not_end_in_time_is_no_bound():
    model = small(seed=2)
    settings = {"max_new_tokens": 3, "stop_ids": STOPS}
    expected = exact_map(model, (1, 4), **settings)
    for start in ((3, 3, 3), (3, 3, 3, 3, EOS), ()):
        assert exact_map(model, (1, 4), **settings, start=start).completion_ids == expected.completion_ids
    listed = log_probs(model, (1, 4), 3)
    assert expected.completion_ids == max(listed, key=listed.get)


def test_prompts_may_be_tensors_and_the_models_mode_is_restored():
    model = tiny_model("gpt2", vocab_size=VOCABULARY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    settings = {"max_new_tokens": 4, "stop_ids": STOPS}
    expected = exact_map(model, (1, 4, 3), **settings)
    model.gradient_checkpointing_enable()
    model.train()
    found = exact_map(model, torch.tensor([1, 4, 3]), **settings)
    assert found.completion_ids == expected.completion_ids
    assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    assert model.training


def test_rows_share_a_beam_search_and_come_back_as_rollouts_with_their_proofs():
    model = small(seed=4)
    prompts = [Prompt(str(ids), "", ids) for ids in PROMPTS]
    done = []
    found, proofs = exact_map_prompts(
        model, prompts, max_new_tokens=4, max_nodes=300, stop_ids=STOPS, progress=done.append
    )
    assert sum(done) == len(prompts) and proofs == [True] * 4
    for prompt, rollout in zip(prompts, found, strict=True):
        listed = log_probs(model, prompt.prompt_ids, 4)
        assert rollout.completion_ids == max(listed, key=listed.get)
        assert rollout.logprob == pytest.approx(listed[rollout.completion_ids], abs=1e-4)
        assert (rollout.prompt_key, rollout.finish_reason) == (prompt.key, "stop")
        assert rollout.strategy == "exact_map"
    _, none = exact_map_prompts(model, prompts, max_new_tokens=4, max_nodes=1, stop_ids=STOPS)
    assert not all(none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_nodes": 0}, "max_nodes is 0"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"width": 0}, "width is 0"),
        ({"prompt_ids": ()}, "prompt_ids is empty"),
        ({"stop_ids": ()}, "stop_ids is empty"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, message):
    settings = {"prompt_ids": (1,), "max_new_tokens": 3, "stop_ids": STOPS, **changes}
    with pytest.raises(ConfigError, match=message):
        exact_map(small(), **settings)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mamba", r"keeps states of its own \(LinearAttentionLayer\)"),
        ("qwen3_5", r"keeps states of its own \(LinearAttentionLayer\)"),
        ("falcon_h1", r"keeps states of its own \(LinearAttentionAndFullAttentionLayer\)"),
        ("rwkv", "takes no cache of keys and values"),
    ],
)
def test_a_cache_that_holds_states_is_refused_before_a_forward_pass(name, found):
    model = tiny_shape(name)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ModelError, match=f"{found}. Use beam search"):
        exact_map(model, (1, 4), max_new_tokens=3, stop_ids=[EOS])
    with pytest.raises(ModelError, match=f"{found}. Use beam search"):
        exact_map_prompts(model, [Prompt("", "", (1, 4))], max_new_tokens=3, stop_ids=[EOS])


def test_experts_and_windows_are_searched():
    for name in ("mixtral", "gemma3_text"):
        model = tiny_shape(name)
        listed = [(model_says(model, (5, 6), ids), ids) for ids in ((EOS,), *((t, EOS) for t in range(23) if t != EOS))]
        found = exact_map(model, (5, 6), max_new_tokens=2, stop_ids=[EOS])
        assert found.proven and found.completion_ids == max(listed)[1]
        assert found.log_prob == pytest.approx(max(listed)[0], abs=1e-4)


def test_a_model_that_gives_no_numbers_is_named_as_such():
    model = small()
    model.lm_head.weight.data.fill_(math.nan)
    for start in ((), (EOS,)):
        with pytest.raises(ModelError, match="are the logits NaN"):
            exact_map(model, (1,), max_new_tokens=3, stop_ids=STOPS, start=start)
