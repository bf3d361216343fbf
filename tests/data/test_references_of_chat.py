"""Prompt and reference are rendered by one function, with the same options: what could follow the prompt is scored."""

import json
import re

import pytest
import torch
import yaml
from test_dry_run import lines, run
from tiny import tiny_model
from tiny_ppo import double_sum_gae, plain_logprobs, values_of
from tiny_task import tiny_trainer, write_data
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlseq.cli.main import main
from rlseq.config.training import GRPOConfig, SFTConfig
from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.evaluation.measure.checks import check_models
from rlseq.evaluation.settings import ContrastSettings
from rlseq.recipes.sft import examples
from rlseq.scoring import load_rewards
from rlseq.training.ppo import PPOTrainer
from rlseq.training.selection import rejection
from rlseq.training.sft import check_examples
from rlseq.training.tools import check_tools
from rlseq.training.trl.sft import SFTTrainer

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if think is defined and m.role == 'assistant' and loop.last %}"
    "{{ '(' + think + ')' }}{% endif %}{{ m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% if think is defined %}"
    "{{ '(' + think + ')' }}{% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "2+2"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "it is "}]


def characters(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a token a character, and for each of the words, whose `$` ends a message."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*"$<>()+0123456789abcdefghijklmnopqrstuvwxyz ?", *words]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, words), "."])), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="$", unk_token="?", chat_template=CHATML)


@pytest.mark.parametrize(
    ("messages", "options", "prompt", "reference"),
    [
        (ASKED, {}, "<user>2+2$<assistant>", "4$"),
        (ASKED, {"think": "none"}, "<user>2+2$<assistant>(none)", "4$"),
        (BEGUN, {}, "<user>2+2$<assistant>it is ", "4$"),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": False}, "<user>2+2$<assistant>it is ", "4$"),
        (BEGUN, {"think": "yes"}, "<user>2+2$<assistant>(yes)it is ", "4$"),
        (BEGUN, {"add_generation_prompt": True}, "<user>2+2$<assistant>it is $<assistant>", "4$"),
        (ASKED, {"add_generation_prompt": False}, "<user>2+2$", "<assistant>4$"),
    ],
)
def test_a_reference_is_what_could_follow_the_prompt(messages, options, prompt, reference):
    tokenizer = characters()
    (built,) = build_prompts([{"prompt": messages, "references": "4"}], tokenizer, chat_template_kwargs=options)
    (ids,) = reference_ids(built, tokenizer, [tokenizer.eos_token_id])
    assert (tokenizer.decode(built.prompt_ids), tokenizer.decode(ids)) == (prompt, reference)


THINKS = CHATML.replace("{{ '<assistant>' }}", "{{ '<assistant>(' }}").replace(
    "{{ m.content + '$' }}", "{{ (m.role == 'assistant') * '()' + m.content + '$' }}"
)


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        ((), [")", "4", "$"]),
        (("()",), [")", "4", "$"]),  # a token of both that the prompt ends with and the answer begins with
        (("()", ")4"), [")4", "$"]),
        (("$<",), [")", "4", "$"]),
    ],
)
def test_what_the_template_puts_before_an_answer_stays_where_tokens_go_over_the_end_of_the_prompt(words, reference):
    tokenizer = characters(*words)
    tokenizer.chat_template = THINKS
    (built,) = build_prompts([{"prompt": ASKED, "references": "4"}], tokenizer)
    (ids,) = reference_ids(built, tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.decode(built.prompt_ids) == "<user>2+2$<assistant>("
    assert tokenizer.convert_ids_to_tokens(ids) == reference


def test_an_answer_of_a_template_that_takes_back_what_the_prompt_opens_stands_alone():
    tokenizer = characters()
    tokenizer.chat_template = THINKS.replace("(m.role == 'assistant') * '()' + ", "")
    (built,) = build_prompts([{"prompt": ASKED, "references": "4"}], tokenizer)
    assert tokenizer.decode(built.prompt_ids).endswith("<assistant>(")
    assert [tokenizer.decode(ids) for ids in reference_ids(built, tokenizer, [0])] == ["4$"]


def test_prompts_that_begin_an_answer_stand_beside_those_that_do_not():
    rows = [{"prompt": messages, "references": "4"} for messages in (ASKED, BEGUN, ASKED)]
    tokenizer = characters()
    found = [tokenizer.decode(prompt.prompt_ids) for prompt in build_prompts(rows, tokenizer)]
    assert found == ["<user>2+2$<assistant>", "<user>2+2$<assistant>it is ", "<user>2+2$<assistant>"]


def model_of(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), initializer_range=0.1, **{f"{x}_token_id": 0 for x in ("pad", "eos")})


@pytest.fixture
def task(tmp_path):
    """A model whose template may be told to think, and data of one question, with its answer begun or not."""
    tokenizer = characters()
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, messages in (("asked", ASKED), ("begun", BEGUN)):
        write_data(tmp_path / name, [{"prompt": messages, "references": ["4"]}] * 4)
    settings = {"model_name_or_path": str(tmp_path / "model"), "max_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"use_cpu": True, "num_cpu_threads": 1, "disable_tqdm": True, "output_dir": str(tmp_path / "run")}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.parametrize(
    "more", [[], ["--rejection_samples", 2, "--reward_funcs", "exact_match", "--max_new_tokens", 4]]
)
def test_teacher_forcing_refuses_an_answer_that_is_begun_before_a_model_loads(more, task, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(monkeypatch, "sft", "--config", task / "sft.yaml", "--dataset_name", task / "begun", *more) == 2
    said = capsys.readouterr().err
    assert "a prompt of the training examples ends in a message of the assistant" in said and "Traceback" not in said
    assert not (task / "run").exists()


@pytest.mark.parametrize("given", [{"tools": ["m:f"]}, {"environment": "m:f"}])
def test_runs_with_tools_refuse_an_answer_that_is_begun(given, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    asked, begun = (build_prompts([{"prompt": m}], characters()) for m in (ASKED, BEGUN))
    check_tools(config, asked)
    with pytest.raises(ConfigError, match="a prompt ends in a message of the assistant, which runs with tools"):
        check_tools(config, [*asked, *begun])


@pytest.mark.parametrize("own", [True, False], ids=["own sampler", "TRL's generation"])
def test_rollouts_continue_the_answer_that_a_prompt_begins(own, tmp_path):
    seen = []

    def short(completion, prompt):
        seen.append((prompt, completion))
        return -float(len(completion))

    tokenizer = characters()
    model = model_of(tokenizer)
    rows = [{"prompt": m} for m in (ASKED, BEGUN, [*BEGUN[:1], {"role": "assistant", "content": "so"}])]
    wanted = [f"<user>2+2$<assistant>{begun}" for begun in ("", "it is ", "so")]
    trainer = tiny_trainer(
        tmp_path,
        model=model,
        rows=rows,
        tokenizer=tokenizer,
        rewards=(short,),
        num_generations=2,
        per_device_train_batch_size=6,
        max_completion_length=3,
        max_steps=1,
        rlseq_sampler=own,
    )
    compute, compared = trainer.micro_batch_loss, []

    def by_hand(model, batch):
        """The tokens that the update scores, and the log-prob that was sampled, by one pass over one text."""
        for row, index in enumerate(batch.prompt_index):
            asked, said = torch.tensor(batch.prompt_ids[row]), torch.tensor(batch.completion_ids[row])
            assert tokenizer.decode(asked) == wanted[index]
            logits = model(torch.cat([asked, said])[None]).logits[0, len(asked) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, said[:, None]).sum()
            compared.append((trainer.batch.scored[row].rollout, logprobs.item()))
        return compute(model, batch)

    trainer.micro_batch_loss = by_hand
    trainer.train()
    assert len(compared) == 6
    if own:
        for rollout, logprob in compared:
            assert sum(rollout.logprobs) == pytest.approx(logprob, abs=1e-4)
    records = lines(tmp_path / "rollouts/000001.jsonl")
    assert [(r["prompt"], r["completion"]) for r in records] == seen  # what the prompt begins is no part of it
    assert all("assistant" not in completion and len(completion) <= 3 for _, completion in seen)


CONTINUED = '{"continue_final_message": true, "add_generation_prompt": false}'


@pytest.mark.parametrize("flags", [[], ["--chat_template_kwargs", CONTINUED]], ids=["told by the row", "told by flag"])
def test_ppo_continues_and_values_the_answer_that_a_prompt_begins(flags, task, tmp_path, monkeypatch):
    rows = [{"prompt": m} for m in (BEGUN, [*BEGUN[:1], {"role": "assistant", "content": "so"}])]
    begins = [f"<user>2+2$<assistant>{begun}" for begun in ("it is ", "so")]
    if not flags:  # some rows begin an answer and some do not
        rows.append({"prompt": ASKED})
        begins.append("<user>2+2$<assistant>")
    write_data(tmp_path / "mixed", rows)
    (task / "own.py").write_text(
        "def own(prompt, completion):\n    return len(completion) - len(prompt[-1]['content']) / 4\n"
    )
    tokenizer, compute, updates = characters(), PPOTrainer.micro_batch_loss, []

    def by_hand(self, model, batch):
        """What the update learns from, beside a forward of each sequence alone by the weights that sampled it."""
        updates.append(self.model.get_input_embeddings().weight.detach().clone())
        for row, index in enumerate(batch.prompt_index):
            asked, said = batch.prompt_ids[row], batch.completion_ids[row]
            rollout, length = self.batch.scored[row].rollout, len(said)
            assert tokenizer.decode(asked) == begins[index] and said == rollout.completion_ids
            logprobs = plain_logprobs(self._causal_model(), asked, said).tolist()
            assert list(rollout.logprobs) == pytest.approx(logprobs, abs=1e-4)
            values = values_of(self, asked, said).tolist()[:-1]
            assert batch.values[row, :length].tolist() == pytest.approx(values, abs=1e-4)
            begun = rows[index]["prompt"][-1]["content"]
            rewards = [0.0] * (length - 1) + [len(rollout.text) - len(begun) / 4]
            advantages = double_sum_gae(rewards, values, 0.0, 1.0, 0.95)
            assert batch.advantages[row, :length].tolist() == pytest.approx(advantages, abs=1e-3)
        return compute(self, model, batch)

    monkeypatch.setattr(PPOTrainer, "micro_batch_loss", by_hand)
    arguments = ["--config", task / "sft.yaml", "--reward_funcs", f"{task}/own.py:own"]
    arguments += ["--dataset_name", tmp_path / "mixed", "--evaluate", "false"]
    arguments += ["--max_steps", 2, "--per_device_train_batch_size", 2 * len(rows), "--num_generations", 2]
    arguments += ["--max_completion_length", 4, "--learning_rate", 0.01, "--whiten_advantages", "false"]
    assert run(monkeypatch, "ppo", *arguments, *flags) == 0
    assert len(updates) == 2 and not torch.equal(*updates)
    for step in (1, 2):
        logged = lines(task / f"run/rollouts/00000{step}.jsonl")
        asked = [row["prompt"][-1]["content"] for row in rows]
        assert sorted(r["prompt"][-1]["content"] for r in logged) == sorted(2 * asked)
        for r in logged:  # what a prompt begins is no part of the completion that is scored
            assert r["length"] <= 4 and r["total"] == len(r["completion"]) - len(r["prompt"][-1]["content"]) / 4


def test_teacher_forcing_tells_the_template_what_other_recipes_tell_it(task, monkeypatch):
    told = {"think": "none"}
    arguments = ["--config", task / "sft.yaml", "--dataset_name", task / "asked"]
    inputs, compute = [], SFTTrainer.compute_loss

    def remember(self, model, given, *args, **kwargs):
        inputs.append({name: x.clone() for name, x in given.items() if torch.is_tensor(x)})
        return compute(self, model, given, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", remember)
    tokenizer = characters()
    for flags, prompt in (([], ""), (["--chat_template_kwargs", json.dumps(told)], "(none)")):
        assert run(monkeypatch, "sft", *arguments, *flags, "--overwrite_output_dir", "true") == 0
        ids, labels = (inputs[-1][name][0].tolist() for name in ("input_ids", "labels"))
        assert tokenizer.decode(ids) == f"<user>2+2$<assistant>{prompt}4$"
        assert tokenizer.decode([label for label in labels if label != -100]) == "4$"
    assert yaml.safe_load((task / "run/config.yaml").read_text())["chat_template_kwargs"] == told


def test_samples_of_rejection_follow_and_are_trained_behind_what_the_template_is_told(task, monkeypatch):
    (task / "own.py").write_text("def own(completion):\n    return 1.0\n")
    inputs, compute = [], SFTTrainer.compute_loss

    def remember(self, model, given, *args, **kwargs):
        inputs.append(given["input_ids"].clone())
        return compute(self, model, given, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", remember)
    asked = []
    monkeypatch.setattr(
        "rlseq.training.selection.rejection.sample",
        lambda model, prompts, *, sample=rejection.sample, **more: (
            asked.extend(prompts) or sample(model, prompts, **more)
        ),
    )
    more = ["--rejection_samples", 4, "--max_new_tokens", 40, "--reward_funcs", f"{task}/own.py:own"]
    arguments = ["--config", task / "sft.yaml", "--dataset_name", task / "asked", *more]
    assert run(monkeypatch, "sft", *arguments, "--chat_template_kwargs", '{"think": "yes"}') == 0
    begins = "<user>2+2$<assistant>(yes)"
    assert {characters().decode(prompt.prompt_ids) for prompt in asked} == {begins}
    assert all(characters().decode(row).startswith(begins) for row in inputs[0])


def test_what_the_template_adds_counts_towards_the_length_of_an_example(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_length=32, chat_template_kwargs={"think": "yes"})
    (length,), cut = check_examples(
        config, examples([(ASKED, "4")], config.chat_template_kwargs), characters(), name="x"
    )
    assert (length, cut) == (len("<user>2+2$<assistant>(yes)4$"), "")
    config.max_length = 27  # one token less: the prompt alone has 26
    (length,), cut = check_examples(
        config, examples([(ASKED, "4")], config.chat_template_kwargs), characters(), name="x"
    )
    assert "cuts the end off 1 of 1 x examples" in cut and "leaves" not in cut
    config.max_length = 26
    with pytest.raises(ConfigError, match="of whose completion nothing is left"):
        check_examples(config, examples([(ASKED, "4")], config.chat_template_kwargs), characters(), name="x")


@pytest.mark.parametrize("kind", [GRPOConfig, SFTConfig])
@pytest.mark.parametrize(
    ("given", "message"),
    [("x", "'x' is not JSON"), ("[1]", r"is \[1\]; expected a mapping"), ('{"a": 1', "is not JSON")],
)
def test_what_the_template_is_told_is_a_mapping(kind, given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        kind(output_dir=str(tmp_path), use_cpu=True, chat_template_kwargs=given)
    made = kind(output_dir=str(tmp_path), use_cpu=True, chat_template_kwargs='{"year": "2020"}')
    assert made.chat_template_kwargs == {"year": "2020"}


@pytest.mark.parametrize(("flags", "prompt"), [([], ""), (["--chat_template_kwargs", '{"think": "none"}'], "(none)")])
def test_the_doctor_looks_at_prompts_as_the_template_makes_them(flags, prompt, task, monkeypatch, capsys):
    looked_at = []
    monkeypatch.setattr("rlseq.doctor.static.static_checks", lambda *given, **_: looked_at.extend(given[2]) or [])
    monkeypatch.setattr("rlseq.cli.doctor.examine_model", lambda _: [])
    assert main(["doctor", "--model_name_or_path", f"{task}/model", "--dataset_name", f"{task}/asked", *flags]) == 0
    assert {characters().decode(p.prompt_ids) for p in looked_at} == {f"<user>2+2$<assistant>{prompt}"}


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
def test_teacher_forcing_sets_itself_where_an_answer_begins(name, tmp_path):
    with pytest.raises(ConfigError, match=f"chat_template_kwargs sets {name}, which teacher forcing sets itself"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, chat_template_kwargs={name: False})


def test_an_evaluation_says_what_the_template_puts_before_the_references(tmp_path):
    tokenizer = characters()
    content = "{{ m.content + '$' }}"
    tokenizer.chat_template = CHATML.replace(content, "{{ (m.role == 'assistant') * '()' + m.content + '$' }}")
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=0)
    model.save_pretrained(tmp_path)
    rows = [{"prompt": ASKED, "references": ["4"]}]
    with load_rewards(["exact_match"]) as suite:
        (warning,) = check_models({"it": tmp_path}, rows, {}, ContrastSettings(), suite)
    assert "model 'it'" in warning and "the chat template puts '()' before 1 of 1 references" in warning
