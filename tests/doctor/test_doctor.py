"""The doctor's checks of tokenizer, configuration and data: every trouble they name is caused here."""

import time
from types import SimpleNamespace

import pytest
import tiny_chat
from tiny import EOS, PAD, VOCAB, tiny_config, tiny_model
from tiny_task import ROWS, save_model, tiny_tokenizer, write_data, write_rows
from tokenizers import normalizers, processors
from transformers import GenerationConfig

from rlseq.config.training import GRPOConfig, ModelArguments, RewardArguments, SFTConfig, TrainingDataArguments
from rlseq.data.prompts import build_prompts
from rlseq.doctor.chat import check_template, end_of_turn
from rlseq.doctor.prompts import check_bos, check_context, check_references, reference_pairs
from rlseq.doctor.static import (
    check_dropout,
    check_dtype,
    check_generation_config,
    check_padding,
    check_stops,
    check_vocabulary,
    load_configs,
    static_checks,
)
from rlseq.errors import ModelError, RewardError
from rlseq.training.run.recipe import check_fit, load_task
from rlseq.types import Prompt

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def chat_tokenizer(template=CHAT):
    """White space splits words, and each role is a special token."""
    tokenizer = tiny_tokenizer()
    words = "What is 2 + 3? It 5. And 5 5? That 10. Add. <think> </think> refused".split()
    tokenizer.add_tokens(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def beginning_with_bos(tokenizer, template="<bos> $A"):
    tokenizer.bos_token = "<bos>"
    special = [("<bos>", 1), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def generation(**fields):
    return GenerationConfig(**{"eos_token_id": EOS, "pad_token_id": PAD, **fields})


def told(result, status, *words):
    assert result.status == status, result
    for word in words:
        assert word in f"{result.found}\n{result.todo}"
    assert bool(result.todo) == (status in ("warning", "failed"))


def test_a_sound_tokenizer_and_configuration_pass_every_check():
    tokenizer = tiny_tokenizer()
    results = static_checks(tiny_config(), tokenizer, build_prompts(ROWS, tokenizer), elsewhere=True)
    assert {r.check: r.status for r in results if r.status != "ok"} == {"chat template": "skipped"}
    assert len({r.check for r in results}) == len(results) == 10


def test_padding():
    tokenizer = tiny_tokenizer()
    told(check_padding(tokenizer, VOCAB), "ok", "left, by <pad> (0)")
    told(check_padding(tokenizer, 0), "failed", "outside the embedding of 0 rows")
    tokenizer.padding_side = "right"
    told(check_padding(tokenizer, VOCAB), "warning", "padding is on the right")
    told(check_padding(tokenizer, VOCAB, elsewhere=False), "ok")  # rlseq pads by itself
    tokenizer.padding_side, tokenizer.pad_token = "left", "<eos>"
    told(check_padding(tokenizer, VOCAB), "warning", "the pad token is the EOS, <eos> (2)")
    tokenizer.pad_token = None
    told(check_padding(tokenizer, VOCAB), "warning", "there is no pad token")


def test_stop_tokens():
    tokenizer = tiny_tokenizer()
    told(check_stops(tokenizer, generation(), VOCAB), "ok", "<eos> (2)")
    told(check_stops(tokenizer, generation(eos_token_id=[EOS, 5]), VOCAB), "ok", "<eos> (2), a (5)")
    told(check_stops(tokenizer, generation(eos_token_id=[5, 6]), VOCAB), "warning", "declares a (5), b (6)", "add 2")
    told(check_stops(tokenizer, generation(eos_token_id=None), VOCAB), "warning", "declares none")
    told(check_stops(tokenizer, generation(eos_token_id=[EOS, 99]), VOCAB), "failed", "[99] are outside")
    tokenizer.eos_token = None
    told(check_stops(tokenizer, generation(eos_token_id=5), VOCAB), "failed", "no EOS token")


def test_the_end_of_a_turn_must_stop_a_completion():
    told(check_stops(chat_tokenizer(), generation(), 99, chat=True), "ok")
    other = chat_tokenizer(CHAT.replace("<eos>", "<|end|>"))
    end = other.convert_tokens_to_ids("<|end|>")
    assert end_of_turn(other) == end
    told(check_stops(other, generation(), 99, chat=True), "failed", f"<|end|> ({end})", f"add {end}")
    told(check_stops(other, generation(), 99), "warning", f"add {end}")  # the prompts are text
    told(check_stops(other, generation(), 99, template=False), "ok")
    told(check_stops(other, generation(eos_token_id=[EOS, end]), 99, chat=True), "ok")
    told(check_stops(chat_tokenizer(CHAT.replace("<eos>", "")), generation(), 99), "warning", "no special token")


def test_bos():
    told(check_bos(tiny_tokenizer()), "ok", "none, as the tokenizer intends")
    tokenizer = beginning_with_bos(tiny_tokenizer())
    told(check_bos(tokenizer), "ok", "<bos> (1) once")
    twice = build_prompts([{"prompt": "<bos> a = "}, {"prompt": "a = "}], tokenizer)
    assert twice[0].prompt_ids[:2] == (1, 1)
    told(check_bos(tokenizer, twice), "failed", "1 of 2 prompts begin with more than one <bos> (1)")
    told(check_bos(beginning_with_bos(chat_tokenizer())), "warning", "1 of 2 prompts lack <bos> (1)")
    told(check_bos(beginning_with_bos(chat_tokenizer("<bos> " + CHAT))), "ok", "<bos> (1) once")


def test_a_tokenizer_that_ends_prompts_with_eos():
    told(check_bos(beginning_with_bos(tiny_tokenizer(), "<bos> $A <eos>")), "failed", "1 of 1 prompts end with <eos>")


def test_a_chat_template_that_keeps_what_was_said():
    told(check_template(tiny_tokenizer()), "skipped", "has none")
    told(check_template(chat_tokenizer()), "ok")


def test_a_chat_template_whose_answer_changes_its_prompt():
    # the generation prompt is "<|assistant|> <think>", and an answer is rendered without it
    thinking = chat_tokenizer(CHAT.replace("<|assistant|> {% endif", "<|assistant|> <think> {% endif"))
    # <|user|> What is 2 + 3? <eos> <|assistant|> <think>: the ninth token, from 0
    told(check_template(thinking, chat=True), "failed", "at token 8")
    told(check_template(thinking), "warning", "at token 8")


def test_a_chat_template_that_rewrites_earlier_turns():
    content = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    forgetful = chat_tokenizer(CHAT.replace("{{ m.content }}", content))
    told(check_template(forgetful), "warning", "message 3 changes what was said before it")
    told(check_template(forgetful, several_turns=False), "ok")
    stripping = chat_tokenizer(CHAT.replace("m.content", "m.content | trim"))
    told(check_template(stripping), "warning", "strips white space")
    told(check_template(stripping, several_turns=False), "ok")
    refusing = chat_tokenizer("{{ raise_exception('refused') }}")
    told(check_template(refusing), "warning", "refused")


def test_dropout():
    told(check_dropout(tiny_config()), "ok", "none")
    on = tiny_config("gpt2", attn_pdrop=0.25)
    told(check_dropout(on), "ok", "attn_pdrop 0.25: RL turns it off")
    told(check_dropout(on, disabled=False), "warning", "attn_pdrop 0.25 stays on")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("top_k", 20),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.05),
        ("min_new_tokens", 4),
        ("suppress_tokens", [5]),
        ("forced_eos_token_id", EOS),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5]]),
    ],
)
def test_generation_config_that_would_leak_into_rollouts(name, value):
    told(check_generation_config(generation(**{name: value})), "warning", f"{name} {value}")
    told(check_generation_config(generation(**{name: value}), ignored=True), "ok", f"{name} {value}")


def test_generation_config_that_changes_nothing():
    told(check_generation_config(generation()), "ok")
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": True}
    told(check_generation_config(generation(**neutral, suppress_tokens=[])), "ok")


def prompts_of(*lengths):
    return [Prompt(key=str(i), prompt="a", prompt_ids=(5,) * n) for i, n in enumerate(lengths)]


def test_context():
    config = tiny_config(max_position_embeddings=20)
    told(check_context(config, prompts_of(3, 8), 12), "ok", "prompt 8 + completion 12 of 20")
    told(check_context(config, prompts_of(3, 8), 13), "warning", "1 of 2 rows may exceed 20", "to 12")
    told(check_context(config, prompts_of(3, 20), 1), "failed", "1 of 2 rows", "no room")
    told(check_context(tiny_config("gpt2", n_positions=20), prompts_of(3, 8), 13), "failed", "do not exist", "to 12")
    told(check_context(config, [], 13), "skipped", "no data")
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4, "factor": 5.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 20, **factors}
    switches = tiny_config(max_position_embeddings=100, rope_parameters=rope)
    told(check_context(switches, prompts_of(3, 8), 12), "ok", "prompt 8 + completion 12 of 20")
    told(
        check_context(switches, prompts_of(3, 8), 13), "failed", "1 of 2 rows may exceed 20", "frequencies of its whole"
    )
    unlimited = SimpleNamespace(get_text_config=lambda: SimpleNamespace(to_dict=dict))
    told(check_context(unlimited, prompts_of(3), 13), "ok", "no limit")


def references(rows, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    prompts = build_prompts(rows, tokenizer)
    return check_references(prompts, list(reference_pairs(prompts, tokenizer, [EOS])), tokenizer, [EOS], **options)


def test_references():
    fine, unknown = {"prompt": "a = ", "references": ["A"]}, {"prompt": "a = ", "references": ["A zebra"]}
    told(references([fine]), "ok", "1 looked at")
    told(references([{"prompt": "a = "}]), "ok", "the data has none")
    told(references([fine, fine, unknown]), "warning", "1 of 3 references become <unk>: 'A zebra'")
    told(references([fine, unknown, unknown]), "failed", "2 of 3 references become <unk>")
    told(references([fine, unknown, unknown], needed=False), "warning", "2 of 3")
    special = {"prompt": "a = ", "references": ["A <eos> B"]}
    told(references([fine, fine, special]), "warning", "1 of 3 references hold a special token: 'A <eos> B'")
    double = {"prompt": "a = ", "references": ["A  B"]}
    told(references([fine, fine, double]), "warning", "1 of 3 references decode to another text: 'A  B'")
    strange = {"prompt": "zebra = ", "references": ["A"]}
    told(references([fine, fine, strange]), "warning", "1 of 3 prompts hold <unk>: 'zebra = '")
    told(references([strange]), "failed", "1 of 1 prompts")
    uncased = tiny_tokenizer()
    uncased.backend_tokenizer.normalizer = normalizers.Lowercase()
    told(references([fine], uncased), "failed", "1 of 1 references decode to another text: 'A'")
    told(check_references([], [], tiny_tokenizer(), [EOS]), "skipped", "no data")


def test_what_a_chat_template_puts_before_an_answer_is_no_fault_of_the_reference():
    tokenizer = tiny_chat.chat_tokenizer()  # Qwen3's template, with <think>\n\n</think>\n\n before the last answer
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<eos>")
    rows = [{"prompt": [{"role": "user", "content": "6 times 7?"}], "references": ["42", "It is 42."]}] * 2
    prompts = build_prompts(rows, tokenizer)
    found = check_references(prompts, list(reference_pairs(prompts, tokenizer, [EOS])), tokenizer, [EOS])
    told(found, "warning", r"puts '<think>\n\n</think>\n\n' before 2 of 2 references")
    silent = build_prompts(rows, tokenizer, chat_template_kwargs={"enable_thinking": False})
    found = check_references(silent, list(reference_pairs(silent, tokenizer, [EOS])), tokenizer, [EOS])
    told(found, "ok", "2 looked at")


def test_vocabulary_and_dtype():
    told(check_vocabulary(tiny_tokenizer(), VOCAB), "ok", "23 tokens in 23 rows")
    told(check_vocabulary(tiny_tokenizer(), 32), "ok", "9 rows to spare")
    told(check_vocabulary(chat_tokenizer(), VOCAB), "failed", "an embedding of 23 rows")
    told(check_dtype(tiny_config(dtype="bfloat16")), "ok", "bfloat16")
    told(check_dtype(tiny_config(dtype="float16")), "warning", "float16")


def test_preflight_of_100_000_prompts_takes_less_than_a_second():
    tokenizer = tiny_tokenizer()
    few = build_prompts(ROWS, tokenizer)
    prompts = [few[i % len(few)] for i in range(100_000)]
    began = time.process_time()
    static_checks(tiny_config(), tokenizer, prompts, max_completion_length=8)
    assert time.process_time() - began < 1


def settings(**changes):
    return GRPOConfig(output_dir="x", **{"max_completion_length": 8, "num_generations": 2, **changes})


def test_a_run_stops_at_a_failure_and_prints_warnings_once(tmp_path, capsys):
    tiny_model(max_position_embeddings=20).save_pretrained(tmp_path)
    model, tokenizer = ModelArguments(model_name_or_path=str(tmp_path)), tiny_tokenizer()
    check_fit(settings(), model, tokenizer, build_prompts(ROWS, tokenizer))
    assert capsys.readouterr().out == ""
    check_fit(settings(max_completion_length=17), model, tokenizer, build_prompts(ROWS, tokenizer))
    (line,) = capsys.readouterr().out.splitlines()  # three letters and "=" are 4 tokens, and 4 + 17 > 20
    assert line.startswith("rlseq: warning: context: 3 of 8 rows may exceed 20 tokens")
    with pytest.raises(ModelError, match=r"vocabulary: \d+ tokens, but an embedding of 23 rows"):
        check_fit(settings(), model, chat_tokenizer(), build_prompts(ROWS, tokenizer))


def test_a_sampler_that_reads_the_generation_config_is_warned_of_it(tmp_path, capsys):
    model = tiny_model()
    model.generation_config.update(do_sample=True, repetition_penalty=1.1)
    model.save_pretrained(tmp_path)
    assert load_configs(str(tmp_path))[1].repetition_penalty == 1.1
    for changes in ({}, {"rlseq_sampler": False}, {"use_vllm": True}):
        prompts = build_prompts(ROWS, tiny_tokenizer())
        check_fit(settings(**changes), ModelArguments(model_name_or_path=str(tmp_path)), tiny_tokenizer(), prompts)
        assert ("repetition_penalty 1.1" in capsys.readouterr().out) == bool(changes)


def test_a_path_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot read the configuration"):
        load_configs(str(tmp_path))


def test_recipes_make_these_checks_before_they_start(tmp_path):
    tiny_model("gpt2", n_positions=20).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    write_rows(tmp_path / "train.jsonl")
    (tmp_path / "reward.py").write_text("def length(completion): return len(completion)\n")
    data = TrainingDataArguments(dataset_name=str(tmp_path / "train.jsonl"), train_split="train")
    rewards = RewardArguments(reward_funcs=[f"{tmp_path / 'reward.py'}:length"])
    model = ModelArguments(model_name_or_path=str(tmp_path))
    config = GRPOConfig(per_device_train_batch_size=2, num_generations=2, max_completion_length=32, use_cpu=True)
    with pytest.raises(ModelError, match=r"context: \d of \d rows may exceed 20 tokens"):
        load_task(data, rewards, model, config, evaluates=False)


@pytest.mark.parametrize("first", ["answered", "unanswered"])
def test_a_reward_is_tried_on_the_row_that_lacks_what_it_asks_for(tmp_path, first):
    save_model(tmp_path)
    write_data(tmp_path / "data", [*ROWS, {**ROWS[0], "references": []}][:: 1 if first == "answered" else -1])
    data = TrainingDataArguments(dataset_name=str(tmp_path / "data"))
    model = ModelArguments(model_name_or_path=str(tmp_path))
    config = GRPOConfig(per_device_train_batch_size=2, num_generations=2, max_completion_length=8, use_cpu=True)
    row = 9 if first == "answered" else 1
    said = rf"^tried on row {row} of 9, which has nothing in 'references': (?s:.*)references is empty"
    with pytest.raises(RewardError, match=said):
        load_task(data, RewardArguments(reward_funcs=["exact_match"]), model, config, evaluates=False)


@pytest.mark.parametrize(("prompts", "said"), [(7, "1 of 7 prompts are left out of each epoch"), (8, None)])
def test_prompts_left_out_of_an_epoch_and_prompts_of_two_splits_are_counted(tmp_path, capsys, prompts, said):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS[:prompts]), ("validation", ROWS[5:])):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    data = TrainingDataArguments(dataset_name=str(tmp_path / "data"))
    model = ModelArguments(model_name_or_path=str(tmp_path))
    config = GRPOConfig(per_device_train_batch_size=4, num_generations=2, max_completion_length=4, use_cpu=True)
    rewards = RewardArguments(reward_funcs=["exact_match"])
    task = load_task(data, rewards, model, config, evaluates=True)
    task.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert lines == ([f"rlseq: {said} (others in each): a batch is of 2"] if said else [])
    shared = len({row["prompt"] for row in ROWS[:prompts]} & {row["prompt"] for row in ROWS[5:]})
    of = len({row["prompt"] for row in ROWS[5:]})
    assert task.describe() == f"{prompts} prompts ({shared} of {of} validation prompts also in train)"


def test_teacher_forcing_makes_these_checks_too(tmp_path, capsys):
    tiny_model("gpt2", n_positions=4, attn_pdrop=0.1).save_pretrained(tmp_path)
    model = ModelArguments(model_name_or_path=str(tmp_path))
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    prompts = build_prompts(ROWS, tiny_tokenizer())
    with pytest.raises(ModelError, match=r"context: \d of \d rows may exceed 4 tokens"):
        check_fit(config, model, tiny_tokenizer(), prompts)
    check_fit(config, model, tiny_tokenizer(), [p for p in prompts if len(p.prompt_ids) == 2])  # dropout is no fault
    assert capsys.readouterr().out == ""
