"""--system_prompt, --chat_template, --max_prompt_length: the same prompts in every recipe and in evaluation."""

import json

import pytest
import yaml
from test_dry_run import lines, run
from test_references_of_chat import ASKED, BEGUN, characters, model_of
from tiny_task import write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlseq
from rlseq.cli.main import main
from rlseq.data.chat import reference_ids
from rlseq.data.prompts import build_prompts

SYSTEM = [{"role": "system", "content": "be brief"}]
# Other marks around roles, and another end of what the assistant says.
BRACKETS = (
    "{% for m in messages %}{{ '(' + m.role + ')' + m.content + (m.role == 'assistant') * ' ' + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)
LONG = [{"role": "user", "content": "2+2+2+2+2"}]


@pytest.fixture
def task(tmp_path):
    """A model, chat rows of which one is longer, text rows, and a chat template in a file."""
    tokenizer = characters()
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"prompt": ASKED, "references": ["4"]}] * 4
    write_data(tmp_path / "asked", asked)
    write_data(tmp_path / "long", [*asked[:2], {"prompt": LONG, "references": ["9"]}, *asked[2:]])
    write_data(tmp_path / "text", [{"prompt": "2+2", "references": ["4"]}] * 4)
    write_data(tmp_path / "with_system", [{"prompt": [*SYSTEM, *ASKED], "references": ["4"]}] * 4)
    (tmp_path / "brackets.jinja").write_text(BRACKETS)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (tmp_path / "empty.jinja").write_text("\n")
    settings = {"model_name_or_path": str(tmp_path / "model"), "max_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"use_cpu": True, "num_cpu_threads": 1, "disable_tqdm": True, "output_dir": str(tmp_path / "run")}
    settings["dataset_name"] = str(tmp_path / "asked")
    rollouts = {"reward_funcs": ["exact_match"], "max_completion_length": 3, "num_generations": 2}
    rollouts |= {"strategies": ["greedy"], "studies": ["none"], "resamples": 10, "samples_per_row": 1}
    for name, more in (("sft", {}), ("grpo", rollouts), ("ppo", rollouts)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | more))
    return tmp_path


def evaluate(task, *flags, data="asked", models=None):
    command = ["evaluate", "--models", *(models or [f"it={task}/model"]), "--dataset_name", f"{task}/{data}"]
    command += ["--reward_funcs", "exact_match", "--strategies", "greedy", "--studies", "none", "--resamples", "10"]
    command += ["--max_new_tokens", "3", "--output_dir", f"{task}/contrast"]
    return main([*command, *map(str, flags)])


def test_a_system_prompt_and_a_template_stand_around_prompts_and_references():
    tokenizer = characters()
    rows = [{"prompt": messages, "references": "4"} for messages in (ASKED, BEGUN)]
    built = build_prompts(rows, tokenizer, system_prompt="be brief", chat_template=BRACKETS)
    begins = [tokenizer.decode(prompt.prompt_ids) for prompt in built]
    assert begins == [
        "(system)be brief$(user)2+2$(assistant)",
        "(system)be brief$(user)2+2$(assistant)it is ",  # the completion continues it
    ]
    ids = [reference_ids(prompt, tokenizer, [tokenizer.eos_token_id]) for prompt in built]
    assert [[tokenizer.decode(own) for own in each] for each in ids] == [["4 $"], ["4 $"]]
    assert [prompt.prompt for prompt in built] == [[*SYSTEM, *ASKED], [*SYSTEM, *BEGUN]]  # as rewards and logs have it


WRONG = [
    ("text", ["--system_prompt", "be brief"], "--system_prompt is for chat messages, but the prompt is the text '2+2'"),
    ("with_system", ["--system_prompt", "so"], "the prompt has a system message already"),
    ("asked", ["--system_prompt", " "], "--system_prompt is empty"),
    ("text", ["--chat_template", "brackets.jinja"], "--chat_template is for chat messages, but the prompts are text"),
    ("asked", ["--chat_template", "brackts.jinja"], "brackts.jinja' cannot be read: No such file"),
    ("asked", ["--chat_template", "empty.jinja"], "empty.jinja' is an empty file"),
    ("asked", ["--chat_template", "broken.jinja"], "broken.jinja' is not valid Jinja: Unexpected end of template"),
    ("long", ["--max_prompt_length", 22], "1 of 5 {split} prompts have more tokens than max_prompt_length 22 ({file}"),
    ("long", ["--max_prompt_length", 9, "--overlong_prompts", "drop"], "none would be left"),
    ("asked", ["--max_prompt_length", 0], "max_prompt_length is 0; expected at least 1"),
    ("asked", ["--overlong_prompts", "drop"], "which has no effect without --max_prompt_length"),
    ("asked", ["--max_prompt_length", 22, "--overlong_prompts", "cut"], "overlong_prompts"),
]


@pytest.mark.parametrize(
    ("name", "data", "flags", "message"),
    [(name, *case) for i, case in enumerate(WRONG) for name in (("grpo", "evaluate"), ("ppo", "sft"))[i % 2]],
)
def test_what_cannot_be_is_refused_before_a_model_loads(name, data, flags, message, task, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    flags = [task / flag if str(flag).endswith(".jinja") else flag for flag in flags]
    if name == "evaluate":
        assert evaluate(task, *flags, data=data) == 2
    else:
        assert run(monkeypatch, name, "--config", task / f"{name}.yaml", "--dataset_name", task / data, *flags) == 2
    split = "train" if name in ("grpo", "ppo") else "validation"
    said = capsys.readouterr().err
    assert message.format(split=split, file=f"{task}/long/{split}.jsonl, line 3: 27") in said
    assert "Traceback" not in said and not (task / "run").exists()


def test_a_reward_is_checked_on_samples_of_the_prompts_that_the_template_renders(task, monkeypatch, capsys):
    sampled, sample = [], rlseq.sample
    monkeypatch.setattr(
        rlseq, "sample", lambda model, prompts, **more: sampled.extend(prompts) or sample(model, prompts, **more)
    )
    command = ["reward", "check", "exact_match", "--model_name_or_path", task / "model", "--max_new_tokens", "2"]
    command += ["--dataset_name", task / "asked", "--samples_per_row", "2", "--system_prompt", "be brief"]
    main([*map(str, command), "--chat_template", str(task / "brackets.jinja")])
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    assert {tokenizer.decode(prompt.prompt_ids) for prompt in sampled} == {"(system)be brief$(user)2+2$(assistant)"}
    assert main([*map(str, command), "--chat_template", str(task / "broken.jinja")]) == 2
    assert "broken.jinja' is not valid Jinja" in capsys.readouterr().err


def test_sft_names_the_template_flag_that_is_read_in_time(task, monkeypatch, capsys):
    flags = ["--chat_template_path", task / "brackets.jinja"]
    assert run(monkeypatch, "sft", "--config", task / "sft.yaml", *flags) == 2
    assert "give --chat_template FILE instead" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_and_the_evaluation_of_its_result_have_the_same_prompts(name, task, monkeypatch, capsys):
    flags = ["--system_prompt", "be brief", "--chat_template", task / "brackets.jinja"]
    assert run(monkeypatch, name, "--config", task / f"{name}.yaml", *flags) == 0
    out = capsys.readouterr().out
    assert "4 prompts (1 of 1 validation prompts also in train)" in out
    logged = lines(task / "run/rollouts/000001.jsonl")
    assert all(record["prompt"] == [*SYSTEM, *ASKED] for record in logged)
    tokenizer = AutoTokenizer.from_pretrained(task / "run")
    text = "(system)be brief$(user)2+2$(assistant)"
    assert tokenizer.chat_template == BRACKETS  # what is made of the result elsewhere has it too
    written = yaml.safe_load((task / "run/config.yaml").read_text())
    assert (written["system_prompt"], written["chat_template"]) == ("be brief", str(task / "brackets.jinja"))
    spec = json.loads((task / "run/evaluation/results.json").read_text())["spec"]
    assert spec["settings"]["prompt"]["system_prompt"] == "be brief"
    assert spec["settings"]["prompt"]["chat_template"] == BRACKETS
    # The rows that a log lacks are found by the prompts of the run.
    (task / "has.py").write_text("def has(completion, references):\n    return float(references[0] == '4')\n")
    assert main(["reward", "replay", f"{task}/run", "--reward_funcs", f"{task}/has.py:has"]) == 0
    assert evaluate(task, *flags) == 0
    alone = json.loads((task / "contrast/results.json").read_text())["spec"]
    assert (alone["data"], alone["settings"]["prompt"]) == (spec["data"], spec["settings"]["prompt"])
    built = build_prompts(
        [{"prompt": ASKED}],
        characters(),
        **{n: spec["settings"]["prompt"][n] for n in ("system_prompt", "chat_template")},
    )
    assert characters().decode(built[0].prompt_ids) == text


def test_teacher_forcing_trains_behind_the_system_prompt_by_the_template(task, monkeypatch):
    from rlseq.training.trl.sft import SFTTrainer

    inputs, compute = [], SFTTrainer.compute_loss

    def remember(self, model, given, *args, **kwargs):
        inputs.append({name: given[name].clone() for name in ("input_ids", "labels")})
        return compute(self, model, given, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", remember)
    flags = ["--system_prompt", "be brief", "--chat_template", task / "brackets.jinja"]
    assert run(monkeypatch, "sft", "--config", task / "sft.yaml", *flags) == 0
    ids, labels = (inputs[-1][name][0].tolist() for name in ("input_ids", "labels"))
    tokenizer = characters()
    assert tokenizer.decode(ids) == "(system)be brief$(user)2+2$(assistant)4 $"
    assert tokenizer.decode([label for label in labels if label != -100]) == "4 $"
    assert AutoTokenizer.from_pretrained(task / "run").chat_template == BRACKETS


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft"])
def test_a_run_resumes_with_the_system_prompt_and_the_template_it_began_with(name, task, monkeypatch, capsys):
    flags = ["--config", task / f"{name}.yaml", "--save_steps", 1, "--system_prompt", "be brief"]
    flags += ["--chat_template", task / "brackets.jinja"]
    flags += [] if name == "sft" else ["--evaluate", "false"]
    assert run(monkeypatch, name, *flags) == 0
    again = ["--resume_from_checkpoint", "latest", "--max_steps", 2]
    assert run(monkeypatch, name, *flags, *again, "--system_prompt", "so") == 2
    assert "system prompt: another text" in capsys.readouterr().err
    # The prompts stay what they are, the end of an answer does not.
    (task / "brackets.jinja").write_text(BRACKETS.replace("* ' '", "* '  '"))
    assert run(monkeypatch, name, *flags, *again) == 2
    said = capsys.readouterr().err
    assert "chat template: another text" in said and "accept the change by --resume_with_changes true" in said
    (task / "brackets.jinja").write_text(BRACKETS)
    assert run(monkeypatch, name, *flags, *again) == 0


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft"])
def test_prompts_that_are_too_long_are_left_out_and_counted(name, task, monkeypatch, capsys):
    flags = ["--config", task / f"{name}.yaml", "--dataset_name", task / "long"]
    flags += ["--max_prompt_length", 21, "--overlong_prompts", "drop"]  # <user>2+2$<assistant> has 21
    assert run(monkeypatch, name, *flags, "--dry_run", "true") == 0
    out = capsys.readouterr().out
    for split in ("train", "validation"):
        place = f"{task}/long/{split}.jsonl, line 3: 27"
        assert f"1 of 5 {split} prompts are left out: they have more tokens than max_prompt_length 21 ({place})" in out
    assert any(line.split()[:2] in (["prompts", "4"], ["examples", "4"]) for line in out.splitlines())
    assert run(monkeypatch, name, *flags) == 0
    if name != "sft":
        results = json.loads((task / "run/evaluation/results.json").read_text())
        assert results["rows"] == 4 and "1 of 5 validation prompts are left out" in results["notes"][0]
        assert {json.dumps(r["prompt"]) for r in lines(task / "run/rollouts/000001.jsonl")} == {json.dumps(ASKED)}


def test_models_that_are_compared_leave_out_the_same_rows(task, capsys):
    """A row is left out where it is too long for one of them: the comparison is by rows."""
    folder = task / "words"
    tokenizer = characters("2+2+2", "+2+2")  # the long prompt is two tokens less long, the short one stays
    model_of(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models = [f"words={folder}", f"it={task}/model"]
    flags = ["--max_prompt_length", 21, "--overlong_prompts", "drop"]
    assert evaluate(task, *flags, data="long", models=models[:1]) == 0
    assert json.loads((task / "contrast/results.json").read_text())["rows"] == 5
    assert evaluate(task, *flags, data="long", models=models) == 0
    results = json.loads((task / "contrast/results.json").read_text())
    assert results["rows"] == 4 and "are left out" in results["notes"][0]
    assert "1 of 5 validation prompts are left out" in capsys.readouterr().out


def test_evaluations_with_other_templates_are_not_joined(task, capsys):
    assert evaluate(task, "--chat_template", task / "brackets.jinja") == 0
    (task / "contrast").rename(task / "one")
    (task / "brackets.jinja").write_text(BRACKETS.replace("* ' '", "* '  '") + "\n")
    assert evaluate(task, "--chat_template", task / "brackets.jinja") == 0
    capsys.readouterr()
    joined = ["evaluate", "--compare", f"a={task}/one", f"b={task}/contrast", "--output_dir", f"{task}/joined"]
    assert main(joined) == 2
    said = capsys.readouterr().err
    assert "settings.prompt.chat_template is" in said and len(said.strip().splitlines()) == 1


def test_the_doctor_looks_at_prompts_as_training_makes_them(task, monkeypatch):
    looked_at, tokenizers = [], []

    def checks(config, tokenizer, prompts, **_):
        tokenizers.append(tokenizer)
        looked_at.extend(prompts)
        return []

    monkeypatch.setattr("rlseq.doctor.static.static_checks", checks)
    monkeypatch.setattr("rlseq.cli.doctor.examine_model", lambda _: [])
    command = ["doctor", "--model_name_or_path", f"{task}/model"]
    assert main([*command, "--chat_template", f"{task}/brackets.jinja"]) == 0
    assert tokenizers.pop().chat_template == BRACKETS
    command += ["--dataset_name", f"{task}/asked"]
    assert main([*command, "--system_prompt", "be brief", "--chat_template", f"{task}/brackets.jinja"]) == 0
    assert {characters().decode(p.prompt_ids) for p in looked_at} == {"(system)be brief$(user)2+2$(assistant)"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--system_prompt", "be brief"], "4 of 4 logged prompts do not begin with --system_prompt"),
        (["--max_prompt_length", 20, "--overlong_prompts", "fail"], "4 of 4"),
    ],
)
def test_logged_rollouts_have_the_prompts_that_the_settings_say(flags, message, task, monkeypatch, capsys):
    record = {"prompt": ASKED, "completion": "4", "total": 1.0, "finish_reason": "stop", "key": "a"}
    (task / "logged.jsonl").write_text("".join(json.dumps({**record, "key": str(i)}) + "\n" for i in range(4)))
    write_data(task / "short", [{"prompt": [{"role": "user", "content": "2"}], "references": ["2"]}] * 4)
    flags += ["--from_rollouts", task / "logged.jsonl", "--dataset_name", task / "short"]
    assert run(monkeypatch, "sft", "--config", task / "sft.yaml", *flags) == 2
    assert message in capsys.readouterr().err
