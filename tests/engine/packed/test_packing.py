"""Packing: the layout against rows written by hand, its numbers against one plain forward a sequence."""

import random

import pytest
import torch
from tiny import FAMILIES, PAD, tiny_model

from rlseq.engine.model.info import eval_mode
from rlseq.engine.packed.packing import IGNORED, pack, pad, rows_of_group, unpack, unpack_padded
from rlseq.engine.packed.self_tests import supports_packing

GROUPS = [
    ([5, 6, 7], [[10, 11, 2], [12], []]),
    ([8], [[13, 14], [15, 2]]),
    ([9, 5, 6, 7], [[16, 17, 18, 2], [10, 11, 2], [19, 2]]),
]
SEQUENCES = [(prompt, completion) for prompt, completions in GROUPS for completion in completions]
# Completions that share a prefix, equal ones, and ones that others continue, in no order: of three symbols.
_noise = random.Random(0)
SHARING = [
    ([5, 6, 7], [[_noise.choice((10, 11, 2)) for _ in range(_noise.randrange(6))] for _ in range(24)]),
    ([8], [[_noise.choice((10, 11, 2)) for _ in range(_noise.randrange(1, 4))] for _ in range(9)]),
]
BOTH_ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def alone(model, prompt, completion):
    """Token log-probs of one completion by one plain forward: no mask, no positions, no padding."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, -1)
    steps = range(len(prompt), len(prompt) + len(completion))
    return torch.stack([logprobs[t - 1, (prompt + completion)[t]] for t in steps]) if completion else logits[:0, 0]


def shifted_logprobs(model, batch):
    """(R, S-1), as a fused head gives them: column t-1 scores the label of column t, 0 where ignored."""
    logprobs = torch.log_softmax(model(**batch.model_inputs, use_cache=False).logits[:, :-1], -1)
    labels = batch.labels[:, 1:]
    return logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORED)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_row_is_the_one_written_by_hand():
    batch = pack([([5, 6, 7], [[10, 11], [12]])], pad_id=PAD)
    o = IGNORED
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 11, 7, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.labels.tolist() == [[o, o, o, 10, 11, o, 12]]
    assert batch.lengths == (2, 1)
    sees = [
        [1, 0, 0, 0, 0, 0, 0],  # 5
        [1, 1, 0, 0, 0, 0, 0],  # 6
        [1, 1, 1, 0, 0, 0, 0],  # 7, the first copy
        [1, 1, 1, 1, 0, 0, 0],  # 10
        [1, 1, 1, 1, 1, 0, 0],  # 11
        [1, 1, 0, 0, 0, 1, 0],  # 7, the second copy: the prompt before it and itself
        [1, 1, 0, 0, 0, 1, 1],  # 12
    ]
    lowest = torch.finfo(torch.float32).min
    expected = [[0.0 if seen else lowest for seen in row] for row in sees]
    assert batch.attention_mask.dtype == torch.float32
    assert batch.attention_mask.tolist() == [[expected]]


def test_what_completions_begin_with_in_common_is_written_once():
    # a b c, a b d, e, the first again, one that another continues, and none at all
    completions = [[12, 10, 14], [12, 10, 13], [15], [12, 10, 14], [12, 10], []]
    batch = pack([([5, 6], completions)], pad_id=PAD)
    o = IGNORED
    assert batch.input_ids.tolist() == [[5, 6, 12, 10, 13, 10, 14, 6, 15]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 1, 2]]
    assert batch.labels.tolist() == [[o, o, 12, 10, 13, o, 14, o, 15]]
    assert (batch.attention_mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],  # 5
        [1, 1, 0, 0, 0, 0, 0, 0, 0],  # 6
        [1, 1, 1, 0, 0, 0, 0, 0, 0],  # 12
        [1, 1, 1, 1, 0, 0, 0, 0, 0],  # 10
        [1, 1, 1, 1, 1, 0, 0, 0, 0],  # 13
        [1, 1, 1, 0, 0, 1, 0, 0, 0],  # the copy of 10, which does not see 10
        [1, 1, 1, 0, 0, 1, 1, 0, 0],  # 14
        [1, 0, 0, 0, 0, 0, 0, 1, 0],  # the copy of 6
        [1, 0, 0, 0, 0, 0, 0, 1, 1],  # 15
    ]
    places = [batch.token_columns[i:j].tolist() for i, j in ((0, 3), (3, 6), (6, 7), (7, 10), (10, 12))]
    assert places == [[2, 3, 6], [2, 3, 4], [8], [2, 3, 6], [2, 3]]
    assert batch.lengths == (3, 3, 1, 3, 2, 0)


def test_groups_that_share_a_row_do_not_see_each_other_and_padding_sees_only_itself():
    batch = pack([([5, 6], [[10]]), ([7], [[11], []]), ([8, 9, 5], [[12, 13, 14]])], pad_id=PAD, row_tokens=6)
    # Longest first: the third group fills a row; the first (5 6 10) and second (7 11) share the other,
    # where the empty completion takes no token of its own.
    assert batch.input_ids.tolist() == [[8, 9, 5, 12, 13, 14], [5, 6, 10, 7, 11, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    sees = (batch.attention_mask[1, 0] == 0).int().tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    batch = pack([([5], [[10]]), ([6], [[11, 12, 13]])], pad_id=PAD)
    assert (batch.attention_mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert batch.labels.tolist()[0] == [IGNORED, 10, IGNORED, IGNORED]


def test_a_group_beyond_the_budget_is_split_with_its_prompt_repeated():
    batch = pack([([5, 6, 7], [[10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20]])], pad_id=PAD, row_tokens=8)
    rows = {tuple(x for x in row if x != PAD) for row in batch.input_ids.tolist()}
    # 2 + 3 + 3 = 8 tokens fit; the third stands alone; the fourth (2 + 7 = 9) exceeds the budget by itself.
    assert rows == {(5, 6, 7, 10, 11, 7, 12, 13), (5, 6, 7, 14), (5, 6, 7, 15, 16, 17, 18, 19, 20)}
    tokens = [x.tolist() for x in unpack(batch.input_ids, batch)]
    assert tokens == [[10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20]]


def test_a_row_holds_as_many_tokens_as_sequences_do_not_share():
    # The oracle: the nodes of the tree of each group's sequences, and a copy for each branch beyond a node's first.
    for prompt, completions in SHARING:
        nodes = {(*prompt, *c)[:n] for c in completions for n in range(1, len(prompt) + len(c) + 1)}
        branches = [sum(node[:-1] == parent for node in nodes) for parent in nodes]
        tokens = len(nodes) + sum(max(0, b - 1) for b in branches)
        assert pack([(prompt, completions)], pad_id=PAD).input_ids.shape == (1, tokens)
        assert rows_of_group(prompt, completions, None)[0][0] == tokens
        for budget in (8, 12, 20):
            rows = rows_of_group(prompt, completions, budget)
            assert sorted(i for _, members in rows for i in members) == list(range(len(completions)))
            for found, members in rows:
                alone = pack([(prompt, [completions[i] for i in members])], pad_id=PAD)
                assert alone.input_ids.shape[1] == found and (found <= budget or len(members) == 1)
        whole = pack([(prompt, completions)], pad_id=PAD, row_tokens=4, whole_groups=True)
        assert whole.input_ids.shape == (1, tokens)


@pytest.mark.parametrize("groups", [GROUPS, SHARING], ids=["different", "sharing"])
@pytest.mark.parametrize("row_tokens", [None, 1, 6, 12, 1000])
def test_unpack_returns_completions_in_the_order_given(row_tokens, groups):
    batch = pack(groups, pad_id=PAD, row_tokens=row_tokens)
    expected = [completion for _, completions in groups for completion in completions]
    assert [x.tolist() for x in unpack(batch.input_ids, batch, shifted=False)] == expected
    assert [x.tolist() for x in unpack(batch.input_ids[:, 1:], batch, shifted=True)] == expected
    padded = [completion + [0] * (5 - len(completion)) for completion in expected]
    assert unpack_padded(batch.input_ids, batch, 5).tolist() == padded
    assert unpack_padded(batch.input_ids[:, 1:], batch, 5).tolist() == padded


@BOTH_ATTENTIONS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [GROUPS, SHARING], ids=["different", "sharing"])
@pytest.mark.parametrize("row_tokens", [None, 12, 64])
def test_packed_log_probs_and_gradients_equal_one_sequence_at_a_time(family, attention, row_tokens, groups):
    sequences = [(prompt, completion) for prompt, completions in groups for completion in completions]
    model = tiny_model(family, attn_implementation=attention)
    weights = [torch.linspace(-1, 2, len(c)) for _, c in sequences]  # a gradient of every token, none alike
    expected = [alone(model, *sequence) for sequence in sequences]
    wanted = gradients(model, sum((w * x).sum() for w, x in zip(weights, expected, strict=True)))

    batch = pack(groups, pad_id=PAD, row_tokens=row_tokens)
    found = unpack(shifted_logprobs(model, batch), batch, shifted=True)
    assert [len(x) for x in found] == [len(c) for _, c in sequences]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    got = gradients(model, sum((w * x).sum() for w, x in zip(weights, found, strict=True)))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=2e-5 * wanted[name].abs().max().item(), rtol=1e-3)

    padded = unpack_padded(shifted_logprobs(model, batch), batch, 6)
    T = [torch.linspace(-1, 2, len(c)).tolist() + [7.0] * (6 - len(c)) for _, c in sequences]  # padding counts 0
    got = gradients(model, (torch.tensor(T) * padded).sum())
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=2e-5 * wanted[name].abs().max().item(), rtol=1e-3)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_padded_rows_equal_one_sequence_at_a_time(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    batch = pad([p for p, _ in SEQUENCES], [c for _, c in SEQUENCES], pad_id=PAD)
    with torch.no_grad():
        found = unpack(shifted_logprobs(model, batch), batch)
        for a, sequence in zip(found, SEQUENCES, strict=True):
            torch.testing.assert_close(a, alone(model, *sequence), atol=2e-5, rtol=1e-5)


def test_a_row_may_be_longer_than_the_positions_a_model_has():
    model = tiny_model("gpt2", n_positions=8)
    batch = pack(GROUPS, pad_id=PAD, row_tokens=64)
    assert batch.input_ids.shape[1] > 8
    with torch.no_grad():
        found = unpack(shifted_logprobs(model, batch), batch)
        for a, sequence in zip(found, SEQUENCES, strict=True):
            torch.testing.assert_close(a, alone(model, *sequence), atol=2e-5, rtol=1e-5)


def test_a_copy_that_saw_the_original_last_token_would_be_noticed():
    # The layout this one improves on: the whole prompt, then copies that see it all.
    model = tiny_model()
    prompt, completion = [5, 6, 7], [10, 11, 2]
    ids, positions = torch.tensor([[5, 6, 7, 7, 10, 11, 2]]), torch.tensor([[0, 1, 2, 2, 3, 4, 5]])
    hidden = torch.ones(7, 7).tril() == 0
    mask = torch.zeros(1, 1, 7, 7).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits[0]
        wrong = torch.log_softmax(logits, -1)[3, 10]
        assert (wrong - alone(model, prompt, completion)[0]).abs() > 0.05


@BOTH_ATTENTIONS
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_full_attention_support_packing(family, attention):
    assert supports_packing(tiny_model(family, attn_implementation=attention)) == (True, "")
    model = tiny_model(family, attn_implementation=attention, dtype=torch.bfloat16)
    assert supports_packing(model) == (True, "")


def test_a_freshly_initialised_model_supports_packing():
    assert supports_packing(tiny_model(initializer_range=0.02)) == (True, "")


@BOTH_ATTENTIONS
def test_a_sliding_window_is_served_only_where_it_cannot_bite(attention):
    supported, reason = supports_packing(tiny_model("mistral", attn_implementation=attention))
    assert not supported and "window of 4 tokens" in reason
    model = tiny_model("mistral", attn_implementation=attention, sliding_window=16)
    assert supports_packing(model, longest=16) == (True, "")
    supported, reason = supports_packing(model, longest=17)
    assert not supported and "17" in reason


def test_a_model_that_sees_too_much_is_found_by_trying():
    # The window is real but the configuration no longer tells: only the numbers can.
    model = tiny_model("mistral")
    attend = model.model.layers[0].self_attn.forward
    model.config.sliding_window = None
    model.model.layers[0].self_attn.forward = lambda *a, **k: attend(*a, **{**k, "attention_mask": None})
    supported, reason = supports_packing(model)
    assert not supported and "differ" in reason


def test_a_model_that_refuses_positions_is_found_by_trying():
    model = tiny_model()
    forward = model.forward
    model.forward = lambda input_ids, use_cache=False: forward(input_ids=input_ids, use_cache=use_cache)
    supported, reason = supports_packing(model)
    assert not supported and "TypeError" in reason and "position_ids" in reason


@BOTH_ATTENTIONS
def test_the_trial_leaves_mode_and_random_state_alone(attention):
    model = tiny_model(attn_implementation=attention).train()
    model.model.layers[0].eval()  # a part kept in eval mode on purpose stays there
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    supports_packing(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes


def test_modes_are_restored_after_an_exception():
    model = tiny_model().train()
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert all(m.training for m in model.modules())


def test_only_empty_completions_make_a_batch_without_tokens():
    for batch in (pack([([5], [[], []])], pad_id=PAD), pad([[5], [5]], [[], []], pad_id=PAD)):
        assert (batch.labels == IGNORED).all()
        assert [len(x) for x in unpack(torch.zeros_like(batch.labels[:, 1:]), batch)] == [0, 0]
        assert unpack_padded(torch.zeros_like(batch.labels), batch, 2).tolist() == [[0, 0], [0, 0]]


def test_a_model_gives_finite_numbers_at_padding():
    for attention in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=attention)
        batch = pack([([5], [[10]]), ([6], [[11] * 9])], pad_id=PAD)
        loss = model(**batch.model_inputs).logits.square().sum()
        assert all(g.isfinite().all() for g in gradients(model, loss).values())


def test_wrong_input_is_refused_by_name():
    with pytest.raises(ValueError, match="no groups"):
        pack([], pad_id=PAD)
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        pack([([5], [[6]]), ([], [[6]])], pad_id=PAD)
    with pytest.raises(ValueError, match="row_tokens is 0"):
        pack(GROUPS, pad_id=PAD, row_tokens=0)
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        pad([[5], [6]], [[7]], pad_id=PAD)
    batch = pack(GROUPS, pad_id=PAD)
    R, S = batch.input_ids.shape
    with pytest.raises(ValueError, match=rf"expects \({R}, {S - 1}\)"):
        unpack(torch.zeros(R, S), batch, shifted=True)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        unpack(torch.zeros(2, 2), batch)
    with pytest.raises(ValueError, match="T is 3, but a completion has 4 tokens"):
        unpack_padded(torch.zeros(R, S), batch, 3)
