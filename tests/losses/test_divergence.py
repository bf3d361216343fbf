"""Divergences from a teacher: against TRL's GKD, plain torch, automatic differentiation and listed sequences."""

import itertools
import warnings

import pytest
import torch

from rlseq.losses import divergence, divergence_of_states, divergence_to_go
from rlseq.losses.divergence import DIVERGENCES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is experimental may change: it is an oracle here and nothing else
    from trl.experimental.gkd import GKDTrainer

KINDS = [(kind, 0.5) for kind in DIVERGENCES] + [("jsd", 0.1)]


def log_probs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_value_is_that_of_trls_gkd(kind, beta):
    student, teacher = log_probs(4, 9), log_probs(4, 9, seed=1)
    beta_of_trl = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[kind]
    expected = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta_of_trl, reduction="sum")
    found = divergence(student, teacher, kind=kind, jsd_beta=beta).sum()
    torch.testing.assert_close(found, expected)


def test_two_coins_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p‖q) = ½ log 2 + ½ log ⅔, KL(q‖p) = ¼ log ½ + ¾ log 1½
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    half = torch.tensor(0.5)
    reverse = half * torch.tensor(2.0).log() + half * torch.tensor(2 / 3).log()
    forward = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    torch.testing.assert_close(divergence(p, q, kind="reverse_kl"), reverse[None])
    torch.testing.assert_close(divergence(p, q, kind="forward_kl"), forward[None])


def states(tokens=300, vocabulary=7, teacher_vocabulary=7):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = [normal(tokens, 5), normal(vocabulary, 5), normal(vocabulary)]
    teacher = [normal(tokens, 3), normal(teacher_vocabulary, 3), normal(teacher_vocabulary)]
    return [x.requires_grad_() for x in student], teacher


def from_whole_logits(student, teacher, kind, beta, temperature, teacher_temperature, size=None):
    """The definition on whole logits, differentiated by torch."""
    logits = torch.nn.functional.linear(*student)[:, :size] / temperature
    p = logits.softmax(-1)
    q = (torch.nn.functional.linear(*teacher)[:, :size] / teacher_temperature).softmax(-1)
    m = beta * q + (1 - beta) * p
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(1)
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(1)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_value_and_gradients_in_tiles_are_those_of_whole_logits(kind, beta):
    student, teacher = states()  # 300 positions: two whole tiles and a part
    at = {"temperature": 0.7, "teacher_temperature": 1.3}
    weights = torch.linspace(-1, 2, 300, dtype=torch.float64)
    found = divergence_of_states(*student, *teacher, kind=kind, jsd_beta=beta, **at)
    expected = from_whole_logits(student, teacher, kind, beta, **at)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((weights * found).sum(), student)
    for mine, theirs in zip(gradients, torch.autograd.grad((weights * expected).sum(), student), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("vocabulary, teacher_vocabulary", [(7, 9), (9, 7)])
def test_rows_that_fill_up_a_head_are_left_out(vocabulary, teacher_vocabulary):
    student, teacher = states(20, vocabulary, teacher_vocabulary)
    found = divergence_of_states(*student, *teacher, kind="reverse_kl")
    expected = from_whole_logits(student, teacher, "reverse_kl", 0.5, 1.0, 1.0, size=7)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), student)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum(), student), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_tensor_of_tokens_by_vocabulary_is_kept():
    student, teacher = states(tokens=1000, vocabulary=50, teacher_vocabulary=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        divergence_of_states(*student, *teacher, kind="jsd")
    assert kept and max(kept) < 1000 * 50


def test_no_positions_have_no_divergence_and_a_gradient_of_zero():
    student, teacher = states(tokens=0)
    found = divergence_of_states(*student, *teacher, kind="reverse_kl")
    assert found.shape == (0,)
    assert all(not gradient.any() for gradient in torch.autograd.grad(found.sum(), student))


def test_divergence_to_go_by_hand():
    D = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = divergence_to_go(D, mask)
    assert found.tolist() == [[6.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert not found.requires_grad


# -- all sequences of three tokens out of two, listed ----------------------------------------------------------------

LENGTH = 3
PREFIXES = [prefix for n in range(LENGTH) for prefix in itertools.product((0, 1), repeat=n)]
SEQUENCES = list(itertools.product((0, 1), repeat=LENGTH))


def prefix_rows(y):
    return torch.tensor([PREFIXES.index(y[:t]) for t in range(LENGTH)])


def sequence_logprob(logits, y):
    return logits.log_softmax(-1)[prefix_rows(y), torch.tensor(y)].sum()


def expected_gradients(logits, teacher, kind):
    """The expectation over sampled sequences of the two terms of `divergence_to_go`'s gradient, each term alone."""
    own, sampling = torch.zeros_like(logits), torch.zeros_like(logits)
    for y in SEQUENCES:
        probability = sequence_logprob(logits, y).exp().detach()
        rows = prefix_rows(y)
        logp = logits.log_softmax(-1)[rows]
        D = divergence(logp, teacher.log_softmax(-1)[rows], kind=kind)
        chosen = logp.gather(1, torch.tensor(y)[:, None]).squeeze(1)
        to_go = divergence_to_go(D[None], torch.ones(1, LENGTH, dtype=torch.bool))[0]
        own += probability * torch.autograd.grad(D.sum(), logits, retain_graph=True)[0]
        sampling += probability * torch.autograd.grad((to_go * chosen).sum(), logits)[0]
    return own, sampling


def test_both_terms_together_are_the_gradient_of_the_kl_of_whole_sequences_and_the_loss_alone_is_not():
    generator = torch.Generator().manual_seed(3)
    shape = (len(PREFIXES), 2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_p = torch.stack([sequence_logprob(logits, y) for y in SEQUENCES])
    log_q = torch.stack([sequence_logprob(teacher, y) for y in SEQUENCES])
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)
    own, sampling = expected_gradients(logits, teacher, "reverse_kl")
    torch.testing.assert_close(own + sampling, exact)
    assert (own - exact).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_both_terms_together_are_the_gradient_of_the_expected_sum_of_any_divergence(kind):
    generator = torch.Generator().manual_seed(4)
    shape = (len(PREFIXES), 2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    D = divergence(logits.log_softmax(-1), teacher.log_softmax(-1), kind=kind)
    objective = sum(sequence_logprob(logits, y).exp() * D[prefix_rows(y)].sum() for y in SEQUENCES)
    (exact,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(sum(expected_gradients(logits, teacher, kind)), exact)


@pytest.mark.parametrize(
    "settings, message",
    [({"kind": "kl"}, "kind is 'kl'"), ({"kind": "jsd", "jsd_beta": 1.0}, "jsd_beta is 1.0")],
)
def test_a_divergence_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        divergence(log_probs(2, 3), log_probs(2, 3), **settings)
