"""Static checks: they read a tokenizer, a configuration and prompts, and run no model.

All prompts are checked. References are tokenised again, so only the first reference of 500 rows, evenly spaced, is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from rlseq.doctor.chat import check_template, end_of_turn
from rlseq.doctor.check import FAILED, OK, SKIPPED, WARNING, Problem, Result, judge, named
from rlseq.doctor.prompts import check_bos, check_context, check_references, reference_pairs
from rlseq.engine.model.load import adapter_base, is_adapter, load_config, reason
from rlseq.engine.sampling import stop_ids_of
from rlseq.errors import ModelError
from rlseq.types import Prompt

# Values under which a field of generation_config.json changes no distribution; None and an empty list never do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (0, 50),  # 50 is transformers' own, with or without the file
    "top_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}


def static_checks(
    model_config: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt] = (),
    *,
    generation_config: Any = None,
    max_completion_length: int | None = None,
    max_new_tokens: int | None = None,
    disable_dropout: bool = True,
    own_sampler: bool = True,
    needs_references: bool = False,
    elsewhere: bool = False,
) -> list[Result]:
    """Make every check that needs no forward pass.

    Args:
        model_config, generation_config: of the model, as `load_configs` gives them; without the second, what the
            first declares.
        tokenizer: the model's.
        prompts: what will be trained or evaluated on; without any, the checks that need data are skipped.
        max_completion_length: tokens of the longest completion; None: as long as the longest reference.
        max_new_tokens: of an evaluation, where both completions and references are read.
        disable_dropout: whether training turns dropout off.
        own_sampler: whether rollouts come from rlseq's sampler, which does not read `generation_config`.
        needs_references: whether references are completions to the run (a loss or an evaluation scores them).
        elsewhere: whether to check also what only code outside rlseq depends on: the padding, the template if prompts
            are text, conversations of several turns.
    """
    generation_config = generation_config or GenerationConfig.from_model_config(model_config)
    rows = model_config.get_text_config().vocab_size
    chat = bool(prompts) and not isinstance(prompts[0].prompt, str)
    stops = _stop_ids(generation_config, tokenizer)
    pairs = list(reference_pairs(prompts, tokenizer, stops))
    longest, setting = max_completion_length, "max_completion_length"
    if longest is None:
        longest, setting = max((len(ids) for _, ids in pairs), default=0), None
    if max_new_tokens is not None and max_new_tokens > longest:
        longest, setting = max_new_tokens, "max_new_tokens"
    return [
        check_padding(tokenizer, rows, elsewhere=elsewhere),
        check_stops(tokenizer, generation_config, rows, chat=chat, template=chat or elsewhere),
        check_bos(tokenizer, prompts),
        check_template(tokenizer, chat=chat, several_turns=elsewhere)
        if chat or elsewhere
        else Result("chat template", SKIPPED, "the prompts are text"),
        check_dropout(model_config, disabled=disable_dropout),
        check_generation_config(generation_config, ignored=own_sampler),
        check_context(model_config, prompts, longest, setting=setting),
        check_references(prompts, pairs, tokenizer, stops, needed=needs_references),
        check_vocabulary(tokenizer, rows),
        check_dtype(model_config),
    ]


def load_configs(name_or_path: str, revision: str | None = None) -> tuple[Any, Any]:
    """The model's configuration and generation configuration; of an adapter folder, those of its base.

    Raises:
        ModelError: there is no configuration that transformers knows.
    """
    if is_adapter(name_or_path):
        name_or_path, revision = adapter_base(name_or_path), None
    options = {} if revision is None else {"revision": revision}
    try:
        config = load_config(name_or_path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of {name_or_path!r}: {reason(error)}") from error
    try:
        return config, GenerationConfig.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except OSError:  # transformers, too, then takes what the model's configuration declares
        return config, GenerationConfig.from_model_config(config)


def check_padding(tokenizer: Any, rows: int, *, elsewhere: bool = True) -> Result:
    """Prompts are padded on the left for generation, by a token that the embedding (rows) holds and that is not EOS.

    rlseq pads on the left and masks by lengths whatever the tokenizer says: only what other code does (`elsewhere`)
    depends on its side, and on its pad token not being EOS.
    """
    problems: list[Problem] = []
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad >= rows:
        todo = "take a pad token that the model has, or model.resize_token_embeddings(len(tokenizer))"
        problems.append((FAILED, f"pad {named(tokenizer, pad)} is outside the embedding of {rows:,} rows", todo))
    if elsewhere and tokenizer.padding_side != "left":
        todo = "rlseq pads on the left; other code that generates must be told padding_side='left'"
        problems.append((WARNING, f"padding is on the {tokenizer.padding_side}", todo))
    if elsewhere and pad in (None, eos):
        found = "there is no pad token" if pad is None else f"the pad token is the EOS, {named(tokenizer, pad)}"
        todo = "rlseq masks by lengths; code that masks by pad id never trains the EOS: add a pad token for it"
        problems.append((WARNING, found, todo))
    side = tokenizer.padding_side if elsewhere else "left"
    return judge("padding", problems, lambda: f"{side}, by {named(tokenizer, eos if pad is None else pad)}")


def check_stops(
    tokenizer: Any, generation_config: Any, rows: int, *, chat: bool = False, template: bool = True
) -> Result:
    """Tokenizer, generation_config and chat template agree on what ends a completion, and rlseq stops at all of it.

    Args:
        rows: of the embedding.
        chat: whether the prompts are chat: a turn's end that stops nothing is then a failure.
        template: whether to look at the chat template.
    """
    eos = tokenizer.eos_token_id
    declared = generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    stops = _stop_ids(generation_config, tokenizer)
    problems: list[Problem] = []
    if eos is None:
        problems.append((FAILED, "the tokenizer has no EOS token", "set tokenizer.eos_token: no completion could end"))
    elif eos not in declared:
        others = ", ".join(named(tokenizer, i) for i in declared) or "none"
        found = f"the tokenizer's EOS is {named(tokenizer, eos)}, generation_config declares {others}"
        problems.append((WARNING, found, f"add {eos} to generation_config.eos_token_id: `generate` runs past it"))
    outside = [i for i in stops if i >= rows]
    if outside:
        todo = "correct eos_token_id, or resize the embeddings"
        problems.append((FAILED, f"stop ids {outside} are outside the embedding of {rows:,} rows", todo))
    if template and getattr(tokenizer, "chat_template", None):
        turn = end_of_turn(tokenizer)
        if turn is None:
            todo = "end an assistant's turn with EOS in the template, or answers are never taught to end"
            problems.append((WARNING, "the chat template closes an answer with no special token", todo))
        elif turn not in stops:
            found = f"the chat template ends a turn with {named(tokenizer, turn)}, which stops nothing"
            todo = f"add {turn} to generation_config.eos_token_id; completions run past it into the next turn"
            problems.append((FAILED if chat else WARNING, found, todo))
    return judge("stop tokens", problems, lambda: ", ".join(named(tokenizer, i) for i in stops))


def check_dropout(config: Any, *, disabled: bool = True) -> Result:
    """Dropout is off in RL, else the ratio of a recomputed log-prob to the sampled one is not 1 on policy."""
    rates = [
        f"{name} {value:g}"
        for name, value in _fields(config.to_dict())
        if "drop" in str(name)
        and not name.startswith(("summary", "classifier"))  # of heads that a language model does not have
        and isinstance(value, (int, float))
        and value > 0
    ]
    if not rates:
        return Result("dropout", OK, "none")
    if disabled:
        return Result("dropout", OK, f"{', '.join(rates)}: RL turns it off (disable_dropout)")
    return Result(
        "dropout",
        WARNING,
        f"{', '.join(rates)} stays on",
        "leave disable_dropout on: log-probs are not of what sampled",
    )


def check_generation_config(generation_config: Any, *, ignored: bool = False) -> Result:
    """No field of generation_config.json changes the distribution that rollouts are sampled from."""
    values = generation_config.to_dict()
    leaks = [
        f"{name} {values[name]}"
        for name, neutral in NEUTRAL.items()
        if values.get(name) not in (None, [], {}) and values[name] not in neutral
    ]
    if not leaks:
        return Result("generation config", OK, "changes no sampling")
    if ignored:
        return Result("generation config", OK, f"{', '.join(leaks)}: rlseq's sampler reads none of it")
    todo = "rlseq's sampler reads none of it; if `generate` or vLLM samples, reset it there"
    return Result("generation config", WARNING, ", ".join(leaks), todo)


def check_vocabulary(tokenizer: Any, rows: int) -> Result:
    """Every token of the tokenizer has a row in the embedding."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        todo = "model.resize_token_embeddings(len(tokenizer)) and save, or take the model's own tokenizer"
        return Result("vocabulary", FAILED, f"{tokens:,} tokens, but an embedding of {rows:,} rows", todo)
    spare = f", {rows - tokens:,} rows to spare" if rows > tokens else ""
    return Result("vocabulary", OK, f"{tokens:,} tokens in {rows:,} rows{spare}")


def check_dtype(config: Any) -> Result:
    """The precision that the weights were saved in."""
    dtype = str(getattr(config, "dtype", None) or "unstated").removeprefix("torch.")
    if dtype == "float16":
        return Result("dtype", WARNING, dtype, "small updates round to nothing: train in float32 or bfloat16 (--dtype)")
    return Result("dtype", OK, f"{dtype} on disk; float32 in training unless --dtype says otherwise")


def _stop_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    try:
        return stop_ids_of(SimpleNamespace(generation_config=generation_config), tokenizer)
    except ModelError:
        return []


def _fields(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration and of those inside it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        else:
            yield name, value
