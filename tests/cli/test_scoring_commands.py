"""`rlseq reward list | check | score | replay`, through the command line."""

from __future__ import annotations

import json
import random

import pytest

from rlseq.cli.main import main
from rlseq.scoring.check.check import run_checks
from rlseq.scoring.check.probe import corrupt
from rlseq.types import Prompt


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"sum of {i} and {i}: ", "answer": f"it is {2 * i}"} for i in range(1, 25)]
    return str(jsonl(tmp_path / "rows.jsonl", rows))


def save_tiny_model(folder):
    """A random model of 8 words, with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "d", "e", "f"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, eos_token_id=1, **sizes)).save_pretrained(folder)
    return str(folder)


def findings(spec, prompts, root="/nowhere"):
    return {check.question: check for check in run_checks(spec, prompts, root)}


def prompts(count=12):
    answers = [f"the answer to {i} is {i * 37 % 101}" for i in range(count)]
    return [Prompt(f"k{i}", f"question {i}?", (), {"references": [a]}) for i, a in enumerate(answers)]


def test_list_shows_the_bundled_rewards_and_those_beside_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text('def mine(completion):\n    """How mine it is."""\n    return 1\n')
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["bleu"].split()[1:5] == ["0", "to", "1", "text"]
    assert lines["own_log_prob"].split()[1:4] == ["-inf", "to", "0"]
    assert "How mine it is. [rewards/mine.py]" in lines["mine"]


def test_check_passes_a_sound_reward_and_exits_0(data, capsys):
    spec = '{"func": "exact_match", "columns": {"references": "answer"}}'
    assert main(["reward", "check", spec, "--dataset_name", data, "--reference_column", "answer"]) == 0
    out = capsys.readouterr().out
    assert "Nothing is wrong with it." in out
    assert "FAIL" not in out


def test_check_exits_1_for_a_reward_that_everything_satisfies(data, capsys):
    assert main(["reward", "check", "constant", "--dataset_name", data, "--reference_column", "answer"]) == 1
    out = capsys.readouterr().out
    assert "hackable by the empty string?" in out
    assert "Training will find this" in out


def test_check_without_data_tries_made_up_rows(capsys):
    assert main(["reward", "check", "number_match"]) == 0
    assert "made-up rows" in capsys.readouterr().err


def test_check_names_a_reward_that_cannot_be_found(capsys):
    assert main(["reward", "check", "exact_mach"]) == 1
    assert "Did you mean 'exact_match'" in " ".join(capsys.readouterr().out.split())


def test_check_names_a_missing_column(data, capsys):
    spec = '{"func": "regex_match"}'
    assert main(["reward", "check", spec, "--dataset_name", data]) == 1
    assert "asks for 'pattern'" in " ".join(capsys.readouterr().out.split())


POSITION = "def f(completions, **kwargs):\n    return [i for i, _ in enumerate(completions)]"
OUT_OF_RANGE = "from rlseq import reward\n@reward(range=(0, 1))\ndef f(completion):\n    return 2"


@pytest.mark.parametrize(
    ("source", "question"),
    [
        ("calls = []\ndef f(completion):\n    calls.append(1)\n    return len(calls) % 7", "the same twice"),
        (POSITION, "together equals one at a time"),
        (POSITION, "order does not matter"),
        ("def f(completion):\n    return 1 / len(completion)", "it survives strange completions"),
        ("def f(completion):\n    return float(completion.encode() != b'')", "it survives strange completions"),
        ("def f(completion):\n    return None", "it runs on these rows"),
        (OUT_OF_RANGE, "it runs on these rows"),
        ("def f(completion):\n    return -len(completion)", "hackable by the empty string?"),
        ("def f(completion):\n    return len(completion)", "hackable by the maximum length?"),
        ("def f(completion, prompt):\n    return 2 * (prompt == completion)", "hackable by the prompt copied?"),
        ("def f(completion, references): return float('it' in completion)", "a reference scores above a damaged one"),
        ("def f(completion):\n    return 'high'", "it runs on these rows"),
        ("def f(completions, **kwargs):\n    return [1.0]", "it runs on these rows"),
    ],
)  # fmt: skip
def test_check_finds_what_is_wrong(tmp_path, source, question):
    path = tmp_path / "f.py"
    path.write_text(source)
    found = findings({"func": f"{path}:f"}, prompts(), tmp_path)
    assert found[question].passed is False
    assert found[question].advice or "returned" in found[question].finding


def test_check_stops_at_a_reward_that_abstains_on_everything():
    found = findings({"func": lambda completion: None, "name": "f"}, prompts(), "/nowhere")
    assert list(found) == ["it loads", "it runs on these rows"]
    assert "36 completions: 0 failed, 36 abstained" in found["it runs on these rows"].finding


def test_check_says_that_all_values_are_the_same():
    found = findings({"func": lambda completion: 0.5, "name": "f"}, prompts(), "/nowhere")
    assert found["it runs on these rows"].finding.endswith("; all values are 0.5")
    assert "all values" not in findings({"func": "exact_match"}, prompts())["it runs on these rows"].finding


def test_check_says_that_a_reward_is_slow_but_slow_is_not_wrong(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("import time\ndef f(completion):\n    time.sleep(0.05)\n    return 0")
    speed = findings({"func": f"{path}:f"}, prompts(1), tmp_path)["speed"]
    assert speed.passed is None
    assert "slow: try `workers: n`" in speed.finding
    rate = float(speed.finding.split()[0])
    assert 1 < rate <= 20  # it sleeps 50 ms
    assert "slow" not in findings({"func": "constant"}, prompts(1))["speed"].finding


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_eror": "raise"}, "has the option 'on_eror'"), ({"on_error": "floor"}, "states no lowest value")],
)
def test_check_finds_options_that_a_run_would_refuse(options, message):
    found = findings({"func": "constant", **options}, prompts())
    assert found["it loads"].passed is False
    assert message in found["it loads"].finding
    assert "'cache'" not in found["it loads"].finding  # what the check itself adds is not the user's


@pytest.mark.parametrize("answers", [["it is 7"], ["it is 7", "it is 7"]])
def test_check_does_not_call_the_one_answer_of_all_rows_a_hack(answers):
    rows = [Prompt(f"k{i}", f"question {i}?", (), {"references": [answer]}) for i, answer in enumerate(answers)]
    found = findings({"func": "exact_match"}, rows)
    assert all(check.passed is not False for check in found.values())
    assert found["hackable by the most frequent completion?"].passed is None
    other = findings({"func": "exact_match"}, [*rows, Prompt("k", "question?", (), {"references": ["it is 8"]})])
    assert other["hackable by the most frequent completion?"].passed is True


def numbers(*references):
    return [Prompt(f"k{i}", f"question {i}?", (), {"references": [text]}) for i, text in enumerate(references)]


@pytest.mark.parametrize("pattern", [r"boxed\{.*\}", r"<final>.*</final>"])
def test_check_does_not_call_a_format_reward_hackable_where_references_are_bare_answers(pattern, tmp_path):
    (tmp_path / "form.py").write_text(
        f"import re\nfrom rlseq import reward\n@reward(range=(0, 1))\ndef form(completion):\n"
        f"    return float(re.search({pattern!r}, completion) is not None)\n"
    )
    found = findings({"func": f"{tmp_path}/form.py:form"}, numbers("4", "7", "12"), tmp_path)
    assert [name for name, check in found.items() if check.passed is False] == []
    assert found["a reference scores above a damaged one"].finding == "it does not ask for the references"
    assert "judges something else" in found["a reference, written as models write it, earns the highest value"].finding


def test_check_counts_references_that_cannot_be_read_and_those_that_never_earn_the_highest_value(tmp_path):
    (tmp_path / "last.py").write_text(
        "import re\nfrom rlseq import reward\n@reward(range=(0, 1))\ndef last(completion, references):\n"
        "    if references[0] == 'pi':\n        return None\n"
        "    found = re.findall(r'\\d+', completion)\n"
        "    return float(bool(found) and found[-1] == references[0])\n"
    )
    question = "a reference, written as models write it, earns the highest value"
    found = findings({"func": f"{tmp_path}/last.py"}, numbers("4", "pi", "3/4", "12"), tmp_path)[question]
    assert found.passed is False
    assert found.finding.startswith(
        "1 of 4 earn less than 1 in every form, the first '3/4'; 1 of 4 references cannot be"
    )
    assert "alone 0.667, in \\boxed{} 0.667" in found.finding  # 4 and 12 of the three that can be read
    assert findings({"func": f"{tmp_path}/last.py"}, numbers("4", "12"), tmp_path)[question].passed is True


def test_check_names_a_form_that_is_read_for_only_some_references(tmp_path):
    (tmp_path / "cut.py").write_text(
        "from rlseq import reward\n@reward(range=(0, 1))\ndef cut(completion, references):\n"
        "    text = completion.removeprefix('```\\n').removesuffix('\\n```')\n"
        "    boxed = completion.startswith('\\\\boxed{') and completion[7:-1].isdigit()\n"
        "    return float((completion[7:-1] if boxed else text) == references[0])\n"
    )
    question = "a reference, written as models write it, earns the highest value"
    found = findings({"func": f"{tmp_path}/cut.py"}, numbers("4", "3/4", "x", "12", "-1", "0.5"), tmp_path)[question]
    assert found.passed is False
    assert found.finding.startswith("in \\boxed{} only 2 of 6 earn 1, not '3/4', 'x', '-1'; means: alone 1, ")
    assert "between dollars 0, " in found.finding  # a form that it reads for none is no fault
    assert findings({"func": f"{tmp_path}/cut.py"}, numbers("4", "12"), tmp_path)[question].passed is True


@pytest.mark.parametrize("flag", ["--train_rows", "--samples_per_row", "--max_new_tokens"])
def test_check_refuses_numbers_that_nothing_can_be_done_with(flag, data, capsys):
    for number in ("0", "-3"):
        assert main(["reward", "check", "exact_match", "--dataset_name", data, flag, number]) == 2
        assert capsys.readouterr().err == f"error: {flag} is {number}; expected at least 1\n"


def test_check_gives_the_same_advice_once(capsys):
    assert main(["reward", "check", "constant"]) == 1
    assert capsys.readouterr().out.count("Training will find this") == 1


def test_check_survives_a_reward_that_hangs_on_a_strange_completion(tmp_path, monkeypatch):
    monkeypatch.setattr("rlseq.scoring.check.check.PATIENCE", 0.5)
    path = tmp_path / "f.py"
    path.write_text("def f(completion):\n    while '\\x00' in completion: pass\n    return len(completion) > 5")
    found = findings({"func": f"{path}:f"}, prompts(), tmp_path)
    assert found["it survives strange completions"].passed is False
    assert "a null character" in found["it survives strange completions"].finding


def test_a_group_reward_is_checked_group_by_group():
    found = findings({"func": "majority_vote"}, prompts())
    assert found["all groups together equal one group at a time"].passed
    assert found["a reference scores above a damaged one"].passed is None


def test_a_damaged_text_is_never_the_same_text():
    rng = random.Random(0)
    for text in ("a", "a a", "a a a a a", "x y", "7", "it is 12", ""):
        for _ in range(20):
            assert corrupt(text, rng).split() != text.split()


def test_check_samples_from_a_model_to_see_whether_grpo_would_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # in fewer, findings are wrapped
    folder = save_tiny_model(tmp_path / "model")
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a b {'c ' * i}", "references": ["a b"]} for i in range(4)])
    flags = ["--dataset_name", str(data), "--model_name_or_path", folder, "--max_new_tokens", "6"]
    main(["reward", "check", "token_f1", *flags])
    table = " ".join(capsys.readouterr().out.split())
    assert "ok samples of a prompt differ in reward 4 of 4 groups (100%)" in table
    assert main(["reward", "check", "constant", *flags]) == 1
    assert "FAIL samples of a prompt differ in reward 0 of 4 groups" in " ".join(capsys.readouterr().out.split())


def test_check_samples_from_a_model_on_the_made_up_rows_too(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    main(["reward", "check", "token_f1", "--model_name_or_path", folder, "--max_new_tokens", "6"])
    assert "samples of a prompt differ in reward 0 of 8 groups" in " ".join(capsys.readouterr().out.split())


def test_check_refuses_a_model_without_room_for_the_samples_before_it_loads(tmp_path, data, capsys, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = save_tiny_model(tmp_path / "model")
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    monkeypatch.setattr("rlseq.cli.reward._spread", lambda *_: pytest.fail("the model was loaded"))
    assert main(["reward", "check", "exact_match", "--dataset_name", data, "--model_name_or_path", folder]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "may exceed 64 tokens" in err  # said at once, not below a table
    assert "lower max_new_tokens to 59" in err  # a prompt of 5 words: "sum of 1 and 1:"


def test_check_names_a_model_that_cannot_be_loaded(capsys, tmp_path):
    assert main(["reward", "check", "constant", "--model_name_or_path", str(tmp_path / "none")]) == 2
    assert "cannot load --model_name_or_path" in capsys.readouterr().err
