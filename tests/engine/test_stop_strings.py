"""Stop strings end a completion with the token that completes them, in every strategy and whatever the batch."""

import itertools

import pytest
from tiny import tiny_model
from tiny_bytes import byte_tokenizer
from tiny_task import tiny_tokenizer

from rlseq.engine.beam import beam
from rlseq.engine.likelihood import score
from rlseq.engine.sampling import sample
from rlseq.engine.stop_strings import StopStrings
from rlseq.engine.strategies import Beam, Greedy, Sample
from rlseq.errors import ConfigError
from rlseq.types import Prompt

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [Prompt("one", "a b =", (5, 6, 4)), Prompt("two", "c", (7,)), Prompt("three", "d e f g", (8, 9, 10, 11))]
STOPS = ("B C", "F")  # the first is spelled by two tokens and the space between them


def model():
    return tiny_model(seed=3, initializer_range=0.2)


def sampled(prompts=PROMPTS, **changes):
    settings = {"num_samples": 16, "max_new_tokens": 12, "seed": 1, "strategy": Sample(), "stop_ids": [EOS]}
    return sample(model(), prompts, tokenizer=TOKENIZER, **(settings | changes))


def by_hand(ids, stops=STOPS):
    """The same ids up to the first prefix of them whose text holds a stop string, and whether there is one."""
    for n in range(1, len(ids) + 1):
        if any(stop in TOKENIZER.decode(ids[:n], skip_special_tokens=True) for stop in stops):
            return tuple(ids[:n]), True
    return tuple(ids), False


def test_a_completion_ends_with_the_token_that_completes_a_stop_string():
    stopped = 0
    for free, ended in zip(itertools.chain(*sampled()), itertools.chain(*sampled(stop_strings=STOPS)), strict=True):
        ids, stops = by_hand(free.completion_ids)
        assert ended.completion_ids == ids  # the noise is that of the position, so all before is the same
        assert ended.finish_reason == ("stop" if stops else free.finish_reason)
        assert ended.logprobs == pytest.approx(free.logprobs[: len(ids)], abs=1e-5)
        assert all(ended.loss_mask)
        assert not any(stop in ended.text for stop in STOPS)
        if stops:
            stopped += 1
            whole = TOKENIZER.decode(ids, skip_special_tokens=True)
            assert ended.text == whole[: min(whole.find(s) for s in STOPS if s in whole)]
            assert ended.text_with_special_tokens == TOKENIZER.decode(ids)
    across = [
        r
        for r in itertools.chain(*sampled(stop_strings=("B C",)))
        if r.completion_ids[-1] == TOKENIZER("C")["input_ids"][0]
    ]
    assert stopped > 10 and across


@pytest.mark.parametrize("batch_rows", [1, 5, 1024])
def test_the_completion_is_the_same_whatever_the_batch(batch_rows):
    together = [r.completion_ids for r in itertools.chain(*sampled(stop_strings=STOPS))]
    assert together == [r.completion_ids for r in itertools.chain(*sampled(stop_strings=STOPS, batch_rows=batch_rows))]


def test_a_string_within_the_forced_prefix_does_not_end_the_completion_but_one_across_its_end_does():
    b, c, f = (TOKENIZER.vocab[letter] for letter in "BCF")
    (held,) = sampled([PROMPTS[1]], prefixes=[(f,)], stop_strings=("F",), num_samples=40)
    assert all(r.completion_ids[0] == f and len(r.completion_ids) > 1 for r in held)
    assert any(f in r.completion_ids[1:] for r in held)
    assert all(r.text.count("F") == 1 for r in held)  # the prefix's own stays, as it is in front
    (across,) = sampled([PROMPTS[1]], prefixes=[(b,)], stop_strings=("B C",), num_samples=200)
    short = [r for r in across if r.completion_ids[:2] == (b, c)]
    assert short and all(r.completion_ids == (b, c) and r.text == "" and r.finish_reason == "stop" for r in short)


def test_a_greedy_completion_ends_likewise():
    free = sampled(strategy=Greedy(), num_samples=1)
    words = TOKENIZER.decode(free[0][0].completion_ids).split()
    stop = " ".join(words[2:4])
    (ended,) = sampled([PROMPTS[0]], strategy=Greedy(), num_samples=1, stop_strings=(stop,))[0]
    assert ended.completion_ids == by_hand(free[0][0].completion_ids, (stop,))[0]


def test_beam_search_finds_the_likeliest_completion_of_all_that_end_by_token_or_string():
    """A beam wider than there are prefixes drops none, so that what it finds is the best of all completions."""
    tiny, vocabulary, longest = model(), range(TOKENIZER.vocab_size), 2
    stops = ("A B", "C")
    complete = [
        ids
        for n in range(1, longest + 1)
        for ids in itertools.product(vocabulary, repeat=n)
        if (n == longest or EOS in ids or by_hand(ids, stops)[1])
        and not any(EOS in ids[:m] or by_hand(ids[:m], stops)[1] for m in range(1, n))
    ]
    for prompt in PROMPTS:
        sums = [row.sum().item() for row in score(tiny, [prompt.prompt_ids] * len(complete), complete)]
        best = complete[max(range(len(complete)), key=sums.__getitem__)]
        settings = {"max_new_tokens": longest, "stop_ids": [EOS], "tokenizer": TOKENIZER, "strategy": Beam(width=24)}
        ((found,),) = beam(tiny, [prompt], stop_strings=stops, **settings)
        assert found.completion_ids == best
        assert found.finish_reason == ("stop" if best[-1] == EOS or by_hand(best, stops)[1] else "length")


def test_a_hypothesis_of_beam_search_ends_by_a_string_and_its_text_before_it():
    settings = {"max_new_tokens": 8, "stop_ids": [EOS], "tokenizer": TOKENIZER, "strategy": Beam(width=3)}
    found = beam(model(), PROMPTS, stop_strings=list("ABCDEFGHI"), **settings)
    for (rollout,) in found:
        ids, _ = by_hand(rollout.completion_ids, tuple("ABCDEFGHI"))
        assert rollout.completion_ids == ids
        assert not set(rollout.text) & set("ABCDEFGHI")


def test_a_character_of_several_tokens_and_special_tokens_between_are_met():
    bytes_of = byte_tokenizer(eos_token="<eos>")

    def ids(text):
        return bytes_of(text, add_special_tokens=False)["input_ids"]

    stops = StopStrings(["é!"], bytes_of)
    whole = ids("ab" * 60 + "é!")  # longer than the window that is looked at
    reached = [stops.reached([whole[:n]])[0] for n in range(1, len(whole) + 1)]
    assert reached == [False] * (len(whole) - 1) + [True]
    assert stops.end([*whole, *ids("cd")]) == len(whole)
    assert stops.text(whole, "ab" * 60 + "é!") == "ab" * 60
    pads = [bytes_of.pad_token_id] * 500  # their text is empty
    spread = [*ids("abcé"), *pads, *ids("!")]
    assert stops.reached([spread]) == [True]
    assert stops.reached([[*ids("é"), *pads]]) == [False]


@pytest.mark.parametrize(
    ("strings", "tokenizer", "message"),
    [
        ([""], TOKENIZER, "names an empty text"),
        (["<eos>"], TOKENIZER, "holds the special token '<eos>'"),
        (["A"], None, "give the tokenizer too"),
    ],
)
def test_a_string_that_can_never_be_met_is_refused(strings, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        sample(
            model(),
            PROMPTS,
            num_samples=1,
            max_new_tokens=2,
            strategy=Sample(),
            seed=0,
            stop_ids=[EOS],
            stop_strings=strings,
            tokenizer=tokenizer,
        )
