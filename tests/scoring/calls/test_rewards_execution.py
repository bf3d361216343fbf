"""The bundled rewards that run something: generated code, a reward model, a judge behind HTTP."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_rollouts import rollout

from rlseq.errors import RewardError
from rlseq.scoring import load_rewards
from rlseq.scoring.specs.find import find
from rlseq.scoring.specs.options import parse_spec


def bundled(name):
    return find(name, Path("/nowhere")).function


# python_tests

ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def test_python_tests_gives_the_share_that_passes():
    value, details = bundled("python_tests")(ADD, ["assert add(1, 2) == 3", "assert add(1, 1) == 3"])
    assert value == 0.5
    assert details["passed"] == 1
    assert "AssertionError" in details["ended"]
    assert bundled("python_tests")("def add(a, b):\n  return a + b", "assert add(1, 2) == 3")[0] == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "```python3\ndef f(): return 1\n```",
        "```Python\r\ndef f(): return 1\r\n```",
        "Install it:\n```bash\npip install x\n```\nThen\n```python\ndef f(): return 1\n```\nDone.",
        "1. So:\n   ```py\n   def f():\n       return 1\n   ```",
        "```python\ndef f(): return 1\n```\nIt prints\n```\n1\n```\nor, as JSON,\n```json\n1\n```",
        "Read `x`, ``y`` and ```z```:\n```\ndef f(): return 1\n```",
    ],
)
def test_the_last_block_of_python_else_the_last_block_is_the_code(completion):
    assert bundled("python_tests")(completion, "assert f() == 1")[0] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_code_ends_with_a_worker_that_is_killed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")  # bubblewrap would hide the file that names the process
    code = f"import os, time\nopen({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))\nwhile True: time.sleep(1)"
    spec = {"func": "python_tests", "kwargs": {"seconds": 600}, "timeout": 2, "on_error": "abstain"}
    with load_rewards([spec]) as suite:
        table = suite.score([rollout(code)], {"prompt": ["?"], "tests": [["assert True"]]})
    assert table.status["python_tests"] == ["timeout"]
    process = int((tmp_path / "id").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_code_that_removes_its_folder_for_a_file_is_scored(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")  # under bubblewrap the folder cannot be removed
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os; folder = os.getcwd(); os.chdir('/'); os.rmdir(folder); open(folder, 'w').close()"
    assert bundled("python_tests")(code, "assert os.path.isfile(folder)")[0] == 1.0


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("x = (", "SyntaxError in the code"),
        ("import sys; sys.exit(0)", "SystemExit in the code"),
        ("import os; os._exit(0)", "exited with status 0 before the tests were done"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt in the code"),
        ("x = bytearray(600 * 2**20)", "MemoryError in the code"),
        ("import os; os.fork()", "PermissionError in the code"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError in the code"),
        ("import os; os.system('true')", "PermissionError in the code"),
        ("open('big', 'wb').write(bytes(2 * 2**20))", "OSError in the code"),
        ("input()", "EOFError in the code"),
    ],
)
def test_code_beyond_a_limit_passes_no_test(code, ended):
    value, details = bundled("python_tests")(code, "assert True", memory=512, file_size=1)
    assert value == 0.0
    assert details["ended"].startswith(ended)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "while True: open('f', 'w')"])
def test_endless_code_is_ended(code):
    start = time.monotonic()
    value, details = bundled("python_tests")(code, "assert True", seconds=1)
    assert value == 0.0
    assert details["ended"] == "timeout" or "SIG" in details["ended"] or "status -" in details["ended"]
    assert time.monotonic() - start < 5


def test_cpu_time_is_limited_apart_from_wall_clock_time():
    # the limit is read inside the process: seconds, rounded up
    code = "import resource; cpu = resource.getrlimit(resource.RLIMIT_CPU)[0]"
    assert bundled("python_tests")(code, "assert cpu == 3", seconds=2.5)[0] == 1.0


def test_code_runs_in_a_folder_of_its_own_without_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    monkeypatch.chdir(tmp_path)
    code = (
        "import os\nopen('left.txt', 'w').write('x')\nhere = os.getcwd()\nseen = 'SECRET_OF_THE_TRAINER' in os.environ"
    )
    tests = ["assert not seen", f"assert here != {str(tmp_path)!r}", "assert os.listdir() == ['left.txt']"]
    assert bundled("python_tests")(code, tests)[0] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_code_that_prints_a_million_lines_does_not_block():
    assert bundled("python_tests")("for i in range(200_000): print(i)", "assert i == 199_999")[0] == 1.0


# reward_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("scorer")
    words = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<unk>", "<eos>", "user", "assistant", "a", "b", "c", "d"])},
            unk_token="<unk>",
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8, num_labels=1, max_position_embeddings=32, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def logit(folder, text):
    """One text alone through the plain model: no batch, no padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = 1
    with torch.no_grad():
        return model(ids).logits[0, 0].item()


def test_a_model_path_is_a_reward_whose_scores_are_the_models_logits(model_folder):
    suite = load_rewards([model_folder])
    assert suite.names == [Path(model_folder).name]
    rollouts = [rollout("b c"), rollout("d d d a b"), rollout("")]
    values = suite.score(rollouts, {"prompt": ["a ", "b ", "c d"]}).values[suite.names[0]]
    expected = [logit(model_folder, text) for text in ("a b c", "b d d d a b", "c d")]
    assert values == pytest.approx(expected, abs=1e-5)
    assert len(set(values)) == 3


def test_reward_model_scores_do_not_depend_on_the_batch_size(model_folder):
    rollouts, prompts = [rollout("b c"), rollout("d d d a b"), rollout("a")], ["a ", "b ", "c "]
    by_size = [
        load_rewards([{"func": "reward_model", "kwargs": {"model": model_folder, "batch_size": size}}])
        .score(rollouts, {"prompt": prompts})
        .totals
        for size in (1, 2, 3)
    ]
    assert by_size[0] == pytest.approx(by_size[1], abs=1e-5)
    assert by_size[0] == pytest.approx(by_size[2], abs=1e-5)


def test_reward_model_uses_the_chat_template_for_chat_data(model_folder):
    suite = load_rewards([model_folder])
    chat = rollout("c d", messages=[{"role": "assistant", "content": "c d"}])
    totals = suite.score([chat], {"prompt": [[{"role": "user", "content": "a b"}]]}).totals
    assert totals == pytest.approx([logit(model_folder, "user a b assistant c d")], abs=1e-5)


def test_reward_model_keeps_the_end_of_a_text_that_is_too_long(model_folder):
    spec = {"func": "reward_model", "kwargs": {"model": model_folder, "max_length": 3}}
    totals = load_rewards([spec]).score([rollout("c d")], {"prompt": ["a a a b "]}).totals
    assert totals == pytest.approx([logit(model_folder, "b c d")], abs=1e-5)


def test_reward_model_heeds_the_limit_that_the_tokenizer_alone_knows(tmp_path, model_folder):
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=8, num_labels=1, max_position_embeddings=10, pad_token_id=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)  # positions start at 2: it can use 8
    AutoTokenizer.from_pretrained(model_folder, model_max_length=8, pad_token="<eos>").save_pretrained(tmp_path)
    totals = load_rewards([str(tmp_path)]).score([rollout("c d " * 8)], {"prompt": ["a "]}).totals
    assert totals == pytest.approx([logit(str(tmp_path), "c d c d c d c d")], abs=1e-5)


def test_reward_model_computes_in_the_dtype_it_is_told(model_folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_folder)("a b c", return_tensors="pt")["input_ids"]
    half = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    half.config.pad_token_id = 1
    with torch.no_grad():
        expected = half(ids).logits[0, 0].item()
    assert expected != pytest.approx(logit(model_folder, "a b c"), abs=1e-7)  # bfloat16 shows
    spec = {"func": "reward_model", "kwargs": {"model": model_folder, "dtype": "bfloat16", "device": "cpu"}}
    assert load_rewards([spec]).score([rollout("b c")], {"prompt": ["a "]}).totals == [expected]


def test_reward_model_gives_the_label_it_is_asked_for_and_names_one_that_is_not_there(tmp_path, model_folder):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=8, num_labels=2, pad_token_id=1, **sizes)).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with torch.no_grad():
        both = model(torch.tensor([[4, 5]])).logits[0].tolist()
    for label in (0, 1):
        suite = load_rewards([{"func": "reward_model", "kwargs": {"model": str(tmp_path), "label": label}}])
        assert suite.score([rollout("b")], {"prompt": ["a "]}).totals == pytest.approx([both[label]], abs=1e-5)
    suite = load_rewards([{"func": "reward_model", "kwargs": {"model": str(tmp_path), "label": 2}}])
    with pytest.raises(RewardError, match=r"label is 2, but .* has 2 labels"):
        suite.score([rollout("b")], {"prompt": ["a "]})


def test_a_model_without_a_trained_head_is_an_error_and_no_random_number(tmp_path, model_folder):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "causal")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "causal")
    with pytest.raises(RewardError, match=r"lacks 1 of the model's weights \(score.weight\), which .* Give a trained"):
        load_rewards([str(tmp_path / "causal")]).score([rollout("a")], {"prompt": ["b "]})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_reward_model_saved_under_wrapped_names_scores_as_its_own(prefix, tmp_path, model_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_folder, tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "model.safetensors"
    save_file({prefix + name: weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    score = load_rewards([str(tmp_path / "wrapped")]).score([rollout("a")], {"prompt": ["b "]})
    assert score.values["wrapped"] == pytest.approx([logit(model_folder, "b a")], abs=1e-5)


# llm_judge


class Judge(BaseHTTPRequestHandler):
    """Answers like an OpenAI-compatible server: the score is the number in the text under judgement."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        self.server.at_once += 1
        self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(self.server.delay)
        self.server.at_once -= 1
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
            return
        question = body["messages"][0]["content"]
        answer = question.split("Answer:\n")[1].split("\n")[0]
        text = f"Reasons.\nScore: {answer}" if answer != "mumble" else "I cannot say."
        payload = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.requests, server.failures, server.delay, server.at_once, server.most_at_once = [], 0, 0.0, 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def judge_spec(judge, **options):
    kwargs = {
        "base_url": f"http://127.0.0.1:{judge.server_port}/v1",
        "model": "m",
        **options.pop("kwargs", {}),
    }
    return {"func": "llm_judge", "kwargs": kwargs, **options}


def test_the_judges_score_is_scaled_and_its_reasons_are_kept(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k-1")
    suite = load_rewards([judge_spec(judge, kwargs={"api_key_variable": "JUDGE_KEY", "rubric": "Is it short?"})])
    columns = {"prompt": ["why?", [{"role": "user", "content": "how?"}]], "references": [["because"], ["so"]]}
    table = suite.score([rollout("7"), rollout("10")], columns)
    assert table.totals == [0.7, 1.0]
    assert table.details["llm_judge"][0] == {"verdict": "Reasons.\nScore: 7"}
    path, headers, _ = judge.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k-1"
    question = "".join(request[2]["messages"][0]["content"] for request in judge.requests)
    assert all(part in question for part in ("Is it short?", "why?", "user: how?", "because"))


def test_the_judges_score_keeps_its_sign_and_its_decimals(judge):
    suite = load_rewards([judge_spec(judge, kwargs={"low": -10, "high": 10}, retries=0)])
    texts = ["-5", "**-5**", "−5", ".5", "8/10"]
    assert suite.score([rollout(text) for text in texts], {"prompt": ["q"] * 5}).totals == [
        0.25,
        0.25,
        0.25,
        0.525,
        0.9,
    ]
    with pytest.raises(RewardError, match="gave no score"):
        suite.score([rollout("none, though I would score (0-10) it")], {"prompt": ["q"]})


def test_the_judge_is_asked_again_after_a_server_error(judge):
    judge.failures = 1
    assert load_rewards([judge_spec(judge)]).score([rollout("5")], {"prompt": ["q"]}).totals == [0.5]
    assert len(judge.requests) == 2


def test_a_judge_without_a_score_is_an_error_and_never_a_zero(judge):
    suite = load_rewards([judge_spec(judge, retries=0)])
    with pytest.raises(RewardError, match="the judge gave no score from 0 to 10"):
        suite.score([rollout("mumble")], {"prompt": ["q"]})
    table = load_rewards([judge_spec(judge, retries=0, on_error="abstain")]).score(
        [rollout("mumble")], {"prompt": ["q"]}
    )
    assert (table.totals, table.status["llm_judge"]) == ([None], ["error"])


def test_the_judge_is_asked_many_times_at_once_but_not_more_than_told(judge):
    judge.delay = 0.1
    rollouts = [rollout(str(i % 11)) for i in range(12)]
    table = load_rewards([judge_spec(judge, concurrency=4)]).score(rollouts, {"prompt": ["q"] * 12})
    assert table.totals == [(i % 11) / 10 for i in range(12)]
    assert 2 <= judge.most_at_once <= 4


def test_a_cached_verdict_is_not_asked_for_again(judge, tmp_path):
    spec = judge_spec(judge, cache=str(tmp_path / "verdicts.sqlite"))
    for _ in range(2):
        assert load_rewards([spec]).score([rollout("5"), rollout("5"), rollout("6")], {"prompt": ["q"] * 3}).totals == [
            0.5,
            0.5,
            0.6,
        ]
    assert len(judge.requests) == 2  # equal questions are asked once, too
    load_rewards([judge_spec(judge, cache=spec["cache"], kwargs={"rubric": "Another?"})]).score(
        [rollout("5")], {"prompt": ["q"]}
    )
    assert len(judge.requests) == 3  # other arguments, another question


class Fixed(BaseHTTPRequestHandler):
    """Answers with the bytes that the server holds, slowly where it says so."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.headers_seen.append(dict(self.headers))
        self.server.paths_seen.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(sum(map(len, self.server.parts))))
        self.end_headers()
        try:
            for part in self.server.parts:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(self.server.pause)
        except OSError:  # the reward has hung up
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fixed():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fixed)
    server.daemon_threads = True
    server.pause, server.status, server.headers_seen, server.paths_seen = 0.0, 200, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fixed_answer(content, reason="stop"):
    return [json.dumps({"choices": [{"finish_reason": reason, "message": {"content": content}}]}).encode()]


def judged(server, **kwargs):
    spec = judge_spec(server, retries=0, on_error="abstain", kwargs=kwargs)
    table = load_rewards([spec], max_error_rate=1.0).score([rollout("4")], {"prompt": ["2+2?"]})
    return table.totals[0], table.messages["llm_judge"].get(0, ""), table.details["llm_judge"][0]


@pytest.mark.parametrize(
    ("content", "reason", "expected"),
    [
        ("<think>Score: 2</think>Score: 9", "stop", 0.9),
        ("a thought that began in the template, Score: 2</think>\nScore: 9", "stop", 0.9),
        ("<think>It could get Score: 2, but", "stop", "cut off"),
        ("<think>It could get Score: 2, but", "length", "cut off"),
        ("Score: 1", "length", "cut off"),  # it may have been 10
        (None, "length", "cut off"),
        (None, "stop", "content is None"),
        ([{"type": "text"}], "stop", "expected text"),
        ("<think>Score: 3</think>I cannot say.", "stop", "gave no score"),
        ("Score: 1e5", "stop", "gave no score"),
        ("Score: 1e0", "stop", 0.1),
        ("Score: 7,5", "stop", "gave no score"),
    ],
)
def test_a_verdict_is_read_whole_or_is_an_error_in_one_line(fixed, content, reason, expected):
    fixed.parts = fixed_answer(content, reason)
    value, message, _ = judged(fixed)
    if isinstance(expected, str):
        assert value is None and expected in message
    else:
        assert value == expected


@pytest.mark.parametrize("body", [b"not json", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff"])
def test_an_answer_that_is_no_chat_completion_is_an_error_in_one_line(fixed, body):
    fixed.parts = [body]
    value, message, _ = judged(fixed)
    assert value is None and "expected a chat completion" in message and "\n" not in message


def test_the_judge_has_its_seconds_for_the_whole_answer_and_its_size_is_bounded(fixed):
    fixed.parts, fixed.pause = [b"x"] * 40, 0.25
    start = time.monotonic()
    value, message, _ = judged(fixed, seconds=1)
    assert value is None and "not complete after 1 s" in message and time.monotonic() - start < 5
    fixed.parts, fixed.pause = [b"x" * 2**20] * 8, 0.0
    value, message, _ = judged(fixed)
    assert value is None and "larger than" in message


def test_half_a_surrogate_pair_in_a_verdict_becomes_a_question_mark(fixed):
    fixed.parts = fixed_answer("Good \ud83d Score: 5")
    assert judged(fixed) == (0.5, "", {"verdict": "Good ? Score: 5"})


def test_a_template_keeps_its_braces_and_needs_the_completion(judge):
    template = 'Give {"score": 1} of {low:g} to {high:g}. {prompt}\nAnswer:\n{completion}\n{rubric}'
    spec = judge_spec(judge, kwargs={"template": template, "rubric": "{prompt} is no blank"})
    assert load_rewards([spec]).score([rollout("5")], {"prompt": ["why?"]}).totals == [0.5]
    asked = judge.requests[0][2]["messages"][0]["content"]
    assert asked == 'Give {"score": 1} of 0 to 10. why?\nAnswer:\n5\n{prompt} is no blank'
    with pytest.raises(RewardError, match=r"no \{completion\}"):
        load_rewards([judge_spec(judge, retries=0, kwargs={"template": "Rate {answer}"})]).score(
            [rollout("5")], {"prompt": ["q"]}
        )


def test_a_password_in_a_url_is_refused_and_one_from_the_environment_is_sent(fixed, monkeypatch):
    address = f"127.0.0.1:{fixed.server_port}/v1"
    with pytest.raises(RewardError, match="hold a password or key") as refused:
        load_rewards([judge_spec(fixed, kwargs={"base_url": f"http://me:hunter2@{address}"})])
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("JUDGE_PASSWORD", "hunter2")
    fixed.parts = fixed_answer("Score: 5")
    assert judged(fixed, base_url=f"http://me:${{JUDGE_PASSWORD}}@{address}")[0] == 0.5
    assert fixed.headers_seen[0]["Authorization"] == "Basic bWU6aHVudGVyMg=="  # base64 of me:hunter2
    fixed.shutdown()
    fixed.server_close()
    value, message, _ = judged(fixed, base_url=f"http://me:${{JUDGE_PASSWORD}}@{address}")
    assert value is None and message and "hunter2" not in message


@pytest.mark.parametrize("url", ["http://hunter2@{}/v1", "http://hunter2:@{}/v1", "http://{}/v1?a=b&api_key=hunter2"])
def test_a_token_in_a_url_is_refused_wherever_it_stands(fixed, url):
    url = url.format(f"127.0.0.1:{fixed.server_port}")
    for spec in (
        judge_spec(fixed, kwargs={"base_url": url}),
        {**judge_spec(fixed), "kwarg": {"base_url": url}},  # a misspelled option
        f'{{"func": "llm_judge", "kwargs": {{"base_url": "{url}"}}',  # a brace is missing
    ):
        with pytest.raises(RewardError, match="hold a password or key") as refused:
            load_rewards([parse_spec(spec)])
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://${JUDGE_TOKEN}@HOST/v1", "http://HOST/v1/?a=b&api_key=${JUDGE_TOKEN}"])
def test_a_token_of_the_environment_is_sent_and_is_in_no_log_and_no_message(fixed, monkeypatch, caplog, url):
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", logger="httpx")  # which other libraries set higher
    monkeypatch.setenv("JUDGE_TOKEN", "hunter2&x=y")
    url = url.replace("HOST", f"127.0.0.1:{fixed.server_port}")
    fixed.parts = fixed_answer("Score: 5")
    assert judged(fixed, base_url=url)[0] == 0.5
    path, sent = fixed.paths_seen[0], fixed.headers_seen[0].get("Authorization")
    if "?" in url:
        assert (path, sent) == ("/v1/chat/completions?a=b&api_key=hunter2%26x%3Dy", None)
    else:
        assert (path, sent) == ("/v1/chat/completions", "Basic aHVudGVyMiZ4PXk6")  # base64 of hunter2&x=y:
    fixed.status = 401
    value, message, _ = judged(fixed, base_url=url)
    assert value is None and "401" in message and "hunter2" not in message
    assert "chat/completions" in caplog.text and "hunter2" not in caplog.text
