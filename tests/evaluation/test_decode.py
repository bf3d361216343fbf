"""Choosing among samples: best of n and minimum Bayes risk against hand arithmetic, and what makes an oracle."""

import itertools

import pytest
import torch
from test_data import EOS, VOCABULARY, word_tokenizer
from tiny import tiny_model

from rlseq.data.prompts import build_prompts
from rlseq.engine.sampling import sample
from rlseq.engine.strategies import MBR, BestOf, Sample, parse_strategy
from rlseq.errors import ConfigError, RewardError
from rlseq.evaluation.measure.decode import (
    best_by_reward,
    check_choosers,
    decode,
    likeliest,
    most_useful,
    oracles,
    prompt_columns,
)
from rlseq.scoring import load_rewards, reward
from rlseq.types import Prompt, Rollout

ROWS = [
    {"prompt": "a b = ", "references": ["A B", "A"]},
    {"prompt": "c = ", "references": ["C"]},
    {"prompt": "d e f a = ", "references": ["D E"]},
]


def said(text, logprob=-1.0, ended=True, number=0, key="row"):
    """A completion by hand."""
    ids = tuple(VOCABULARY.index(word) for word in text.split()) + (EOS,) * ended
    return Rollout(
        prompt_key=key,
        sample=number,
        completion_ids=ids,
        loss_mask=(True,) * len(ids),
        logprobs=(logprob,) + (0.0,) * (len(ids) - 1),
        text=text,
        text_with_special_tokens=text,
        messages=None,
        finish_reason="stop" if ended else "length",
        strategy="sample",
    )


def group(*texts):
    return [said(text, number=i) for i, text in enumerate(texts)]


def row(**columns):
    return Prompt("row", "a = ", (7, 4), {"references": [], **columns})


def recall(completion: str, references: list[str]) -> float:
    """The share of the reference's words that the completion has: not symmetric."""
    (reference,) = references
    words = reference.split()
    return sum(word in completion.split() for word in words) / len(words)


def length(completion: str) -> float:
    return float(len(completion.split()))


def test_the_likeliest_ended_candidate_is_chosen_and_of_equal_ones_the_first():
    cut = said("A", -0.1, ended=False)
    a, b, again = said("B", -3.0, number=1), said("C", -2.0, number=2), said("C", -2.0, number=3)
    assert likeliest([cut, a, b, again]) is b
    assert likeliest([cut, said("B", -0.5, ended=False)]) is cut
    # rounding that favours a later sample of the same tokens does not change which sample is named
    assert likeliest([a, b, said("C", -1.9999, number=3)]) is b


def test_a_reward_chooses_the_candidate_it_values_most_and_none_it_abstains_on():
    def even(completion: str) -> float | None:
        return None if len(completion.split()) % 2 else float(len(completion.split()))

    groups = [group("A", "A B", "A B C D", "D C B A"), group("A B C"), group("A", "A B C", "B")]
    with load_rewards([length, even]) as suite:
        prompts = [row()] * 3
        assert [r.text for r in best_by_reward(groups, prompts, suite, "even")] == ["A B C D", "A B C", "A"]
        assert [r.text for r in best_by_reward(groups, prompts, suite, "length")] == ["A B C D", "A B C", "A B C"]


def test_expected_utility_is_over_the_other_samples_as_often_as_they_were_sampled():
    # recall of y in the others, by hand; A B was sampled twice, and each of the two is a reference for the other.
    #   A B:     [u(A B) 1 + u(C D) 0 + u(A D C) 1/3] / 3          = 4/9
    #   C D:     [u(A B) 0 + u(A B) 0 + u(A D C) 2/3] / 3          = 2/9
    #   A D C:   [u(A B) 1/2 + u(A B) 1/2 + u(C D) 1] / 3          = 6/9
    groups = [group("A B", "C D", "A B", "A D C")]
    with load_rewards([recall]) as suite:
        assert most_useful(groups, [row()], suite, "recall")[0].text == "A D C"


def test_a_sample_is_no_reference_for_itself_but_its_double_is():
    def echo(completion: str, references: list[str]) -> float:
        return len(completion.split()) * float(references == [completion])

    # A B C: [0 + 0] / 2; D: [0 + 1] / 2. Against themselves, too: 3 / 3 and 2 / 3.
    with load_rewards([echo]) as suite:
        chosen = most_useful([group("A B C", "D", "D")], [row()], suite, "echo")[0]
    assert (chosen.text, chosen.sample) == ("D", 1)


@pytest.mark.parametrize("seed", range(4))
def test_minimum_bayes_risk_is_the_double_loop_over_samples(seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [
        [
            " ".join("ABCD"[i] for i in torch.randint(4, (int(n),), generator=generator))
            for n in torch.randint(1, 4, (7,), generator=generator)
        ]
        for _ in range(6)
    ]
    groups = [group(*some) for some in texts]
    with load_rewards([recall]) as suite:
        found = most_useful(groups, [row()] * len(groups), suite, "recall")
    for some, chosen in zip(texts, found, strict=True):
        expected = [
            sum(round(recall(y, [other]) * 6) for j, other in enumerate(some) if j != i) for i, y in enumerate(some)
        ]  # in sixths, which are exact
        assert chosen.sample == expected.index(max(expected))


def test_the_true_references_are_not_read():
    def cheats(completion: str, references: list[str]) -> float:
        return 100.0 if completion in references and references == ["B"] else recall(completion, references)

    groups = [group("A", "A", "B")]
    with load_rewards([cheats]) as suite:
        assert most_useful(groups, [row(references=["B"])], suite, "cheats")[0].text == "A"
        assert best_by_reward(groups, [row(references=["B"])], suite, "cheats")[0].text == "B"


def test_a_column_that_is_mapped_to_the_references_is_replaced_too():
    spec = {"func": recall, "columns": {"references": "answer"}}
    groups = [group("A", "A", "B")]
    with load_rewards([spec]) as suite:
        assert most_useful(groups, [row(answer=["B"])], suite, "recall")[0].text == "A"
        assert best_by_reward(groups, [row(answer=["B"])], suite, "recall")[0].text == "B"
        assert oracles([parse_strategy("mbr:n=3,utility=recall")], suite, {"references", "answer"}) == {}


def test_a_utility_may_abstain_and_one_without_references_is_its_own_expectation():
    def shy(completion: str, references: list[str]) -> float | None:
        return None if references == ["A"] else recall(completion, references)

    with load_rewards([shy, length, "majority_vote"]) as suite:
        # against B alone: B 1 (its double), A 0, C 0; A is no reference for anybody
        assert most_useful([group("C", "A", "B", "B")], [row()], suite, "shy")[0].text == "B"
        assert most_useful([group("A", "A B C", "A B")], [row()], suite, "length")[0].text == "A B C"
        groups = [group("C", "A", "B", "A"), group("B", "C", "C")]
        assert [r.text for r in most_useful(groups, [row()] * 2, suite, "majority_vote")] == ["A", "C"]


def test_a_utility_that_scores_groups_gets_all_samples_against_one_reference_at_a_time():
    @reward(scope="group")
    def best_covers(completions: list[str], references: list[list[str]]) -> list[float]:
        """1 for the completions that cover most of the one reference."""
        assert len(completions) == 4 and len({tuple(some) for some in references}) == 1
        found = [recall(y, some) for y, some in zip(completions, references, strict=True)]
        return [float(value == max(found)) for value in found]

    with load_rewards([best_covers]) as suite:
        groups = [group("C D", "A", "A B", "A"), group("A", "A", "C", "C D")]
        # the others of A B: C D (0, as the others but C D), A (1), A (1) -> 2/3; A: A B (0), A (1), C D (0) -> 1/3
        assert [r.text for r in most_useful(groups, [row()] * 2, suite, "best_covers")] == ["A B", "A"]


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = tiny_model("llama", seed=0, initializer_range=0.3), word_tokenizer()
    return model, tokenizer, build_prompts(ROWS, tokenizer)


def run(setting, text, suite, **changes):
    model, tokenizer, prompts = setting
    settings = {"num_samples": 1, "max_new_tokens": 5, "seed": 0, "stream": 2, "stop_ids": [EOS], **changes}
    groups = decode(model, prompts, strategy=parse_strategy(text), suite=suite, tokenizer=tokenizer, **settings)
    assert {len(group) for group in groups} == {1}
    return [rollout for (rollout,) in groups]


def sampled(setting, n, **settings):
    model, tokenizer, prompts = setting
    common = {"num_samples": n, "max_new_tokens": 5, "seed": 0, "stream": 2, "stop_ids": [EOS], "tokenizer": tokenizer}
    return sample(model, prompts, strategy=Sample(**settings), **common)


def own_logprob(setting, prompt, ids):
    """Of the model's own distribution, by one plain forward."""
    with torch.no_grad():
        logits = setting[0](input_ids=torch.tensor([[*prompt.prompt_ids, *ids]]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    return sum(table[len(prompt.prompt_ids) + t - 1, token].item() for t, token in enumerate(ids))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_best_of_n_is_the_candidate_the_model_itself_finds_likeliest(setting, temperature):
    with load_rewards([length]) as suite:
        found = run(setting, f"best_of:n=6,temperature={temperature}", suite)
    for prompt, candidates, kept in zip(setting[2], sampled(setting, 6, temperature=temperature), found, strict=True):
        ended = [r for r in candidates if r.completion_ids[-1] == EOS] or candidates
        values = [own_logprob(setting, prompt, r.completion_ids) for r in ended]
        expected = ended[values.index(max(values))]
        assert kept.completion_ids == expected.completion_ids
        assert kept.logprob == pytest.approx(max(values), abs=1e-4)  # not that of the warped distribution
        assert kept.strategy == BestOf(6, temperature=temperature).spec


def test_candidates_are_those_that_sampling_gives_whatever_the_batch(setting):
    with load_rewards([length, recall]) as suite:
        for text in ("best_of:n=5,by=length,top_k=9", "mbr:n=5,utility=recall,top_k=9"):
            found = run(setting, text, suite)
            for candidates, kept in zip(sampled(setting, 5, top_k=9), found, strict=True):
                assert kept.completion_ids == candidates[kept.sample].completion_ids
                if "length" in text:
                    assert length(kept.text) == max(length(r.text) for r in candidates)
            again = run(setting, text, suite, batch_rows=1)
            assert [r.completion_ids for r in again] == [r.completion_ids for r in found]
            other = run(setting, text, suite, stream=3)
            assert [r.completion_ids for r in other] != [r.completion_ids for r in found]


def test_a_reward_that_fails_on_a_candidate_says_so(setting):
    def broken(completion: str) -> float:
        raise ValueError("no idea")

    with load_rewards([length, broken]) as suite, pytest.raises(RewardError, match=r"'broken'[\s\S]*no idea"):
        run(setting, "best_of:n=3,by=broken", suite)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best_of:n=4,by=lenght", "by names no reward of this evaluation: 'lenght'; there are logprob, length"),
        ("best_of:n=4,by=lenght", "Did you mean 'length'?"),
        ("best_of:n=4,by=log_prob", "Did you mean 'logprob'?"),
        ("mbr:n=4,utility=logprob", "utility names no reward of this evaluation: 'logprob'; there are length"),
        ("mbr:n=4,utility=per", "'per'"),
    ],
)
def test_choosing_by_what_is_no_reward_is_refused(text, message):
    with load_rewards([length]) as suite, pytest.raises(ConfigError) as error:
        check_choosers([parse_strategy(text)], suite)
    assert message in str(error.value)


def catches_all(completion, **columns):
    return 1.0


def reads_answer(completion, answer):
    return 1.0


def with_default(completion, unit="word"):
    return 1.0


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0


def by_query(queries, prompts, labels):
    return torch.ones(len(queries))


def of_trl(completions, **kwargs):
    return [1.0] * len(completions)


READ = {  # what each reads of the columns references, answer and unit, chosen by and as utility
    "phoneme_accuracy": (["references"], []),
    "error_rate": (["references", "unit"], ["unit"]),
    "majority_vote": ([], []),
    "own_log_prob": ([], []),
    "length": ([], []),
    "reads_answer": (["answer"], ["answer"]),
    "with_default": (["unit"], ["unit"]),
    "catches_all": (["answer", "references", "unit"], ["answer", "unit"]),
    "of_trl": (["answer", "references", "unit"], ["answer", "unit"]),
}


@pytest.mark.parametrize("name", READ)
def test_an_oracle_is_what_chooses_by_a_column_that_is_not_of_the_prompt(name):
    own = {f.__name__: f for f in (length, reads_answer, with_default, catches_all, of_trl)}
    strategies = [BestOf(4, by=name), MBR(4, utility=name)]
    with load_rewards([own.get(name, name)]) as suite:
        found = oracles(strategies, suite, {"prompt", "references", "answer", "unit"})
        expected = zip((s.spec for s in strategies), READ[name], strict=True)
        assert found == {spec: columns for spec, columns in expected if columns}


def test_rewards_of_other_libraries_are_oracles_by_their_names_for_the_answer():
    available = {"prompt", "references", "ground_truth", "label"}
    with load_rewards([compute_score, by_query]) as suite:
        found = oracles([BestOf(4, by="compute_score"), BestOf(4, by="by_query"), BestOf(4)], suite, available)
        assert list(found.values()) == [["ground_truth"], ["label"]]
        assert oracles([BestOf(4, by="compute_score")], suite, {"reward_model"}) == {
            "best_of:n=4,by=compute_score": ["reward_model"]
        }


def test_what_the_prompt_is_made_of_is_no_secret_unless_it_is_the_answer_too():
    assert prompt_columns({}) == {"prompt"}
    assert prompt_columns({"prompt_column": "question", "reference_column": "answer"}) == {"question"}
    made = {"prompt_template": "{{ word | list | join(' ') }} {{ unit }}", "reference_template": "{{ unit }}"}
    assert prompt_columns(made) == {"word"}
    with load_rewards([with_default]) as suite:
        strategies = [BestOf(4, by="with_default")]
        assert oracles(strategies, suite, {"unit", "references"}, {"unit"}) == {}


def test_arguments_from_a_rewards_spec_are_no_columns():
    with load_rewards([{"func": with_default, "kwargs": {"unit": "character"}}]) as suite:
        assert oracles([BestOf(4, by="with_default")], suite, {"unit", "references"}) == {}


def test_equal_expected_utilities_in_any_order_of_summation_keep_the_first_sampled():
    def uneven(completion: str, references: list[str]) -> float:
        (reference,) = references
        return {"A B": 0.1, "A C": 0.2, "A D": 0.3, "B C": 0.3, "B D": 0.2, "C D": 0.1}.get(
            " ".join(sorted([completion, reference])), 1.0
        )  # every one: 0.1 + 0.2 + 0.3, which floats add up differently in another order

    for order in itertools.permutations("ABCD"):
        with load_rewards([uneven]) as suite:
            assert most_useful([group(*order)], [row()], suite, "uneven")[0].sample == 0
