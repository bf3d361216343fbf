"""The bundled reward `judge`: verdicts of a model behind HTTP, its errors, and passwords in URLs."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_rollouts import rollout

from rlseq.errors import RewardError
from rlseq.scoring import load_rewards
from rlseq.scoring.specs.options import parse_spec


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
