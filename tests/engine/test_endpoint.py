"""A model behind an endpoint gives what the same model gives in process: the server is plain forwards."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny import tiny_model
from tiny_task import ROWS, tiny_tokenizer

from rlseq.data.prompts import build_prompts
from rlseq.engine.endpoint import Endpoint, _tokens
from rlseq.engine.likelihood import teacher_force
from rlseq.engine.sampling import sample, stop_ids_of
from rlseq.engine.strategies import Beam, Greedy, Sample
from rlseq.errors import ConfigError, ModelError

LENGTH = 6


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.scores, self.gives_ids, self.failures, self.asked = model, True, True, 0, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1#tiny"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.failures:
            self.server.failures -= 1
            return self.answer(503, {"error": "busy"})
        ids, choice = list(body["prompt"]), {}
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        if "prompt_logprobs" in body and self.server.scores:
            choice["prompt_logprobs"] = [None, *(self.position(ids[:t], ids[t]) for t in range(1, len(ids)))]
        new, logprobs, reason = [], [], "length"
        while len(new) < body["max_tokens"] and reason == "length":
            row = self.logprobs([*ids, *new])
            warped = (row / (body["temperature"] or 1)).softmax(-1)
            token = int(torch.multinomial(warped, 1, generator=generator) if body["temperature"] else row.argmax())
            new.append(token)
            logprobs.append(row[token].item())
            reason = "stop" if token in body.get("stop_token_ids", ()) else "length"
        text = tiny_tokenizer().decode(new, skip_special_tokens=True)
        choice |= {"text": text, "finish_reason": reason}
        if self.server.gives_ids:
            choice |= {"token_ids": new, "logprobs": {"token_logprobs": logprobs, "tokens": [str(t) for t in new]}}
        self.answer(200, {"choices": [choice]})

    def logprobs(self, ids):
        with torch.no_grad():
            return self.server.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    def position(self, before, token):
        row = self.logprobs(before)
        shown = {token, *row.topk(2).indices.tolist()}
        return {str(i): {"logprob": row[i].item(), "rank": int((row > row[i]).sum()) + 1} for i in shown}


@pytest.fixture
def model():
    return tiny_model(initializer_range=0.3).eval()


@pytest.fixture
def server(model):
    with Server(model) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def decoded(server, model, strategy, samples=1, **more):
    tokenizer = tiny_tokenizer()
    prompts = build_prompts(ROWS, tokenizer)
    options = {"strategy": strategy, "num_samples": samples, "max_new_tokens": LENGTH, "seed": 3, "stream": 0}
    options |= {"stop_ids": stop_ids_of(model, tokenizer), "tokenizer": tokenizer, **more}
    return Endpoint.of(server.url).sample(prompts, **options), sample(model, prompts, **options)


def test_greedy_completions_and_logprobs_are_those_of_the_model_in_process(server, model):
    counted = []
    found, expected = decoded(server, model, Greedy(), progress=counted.append)
    assert len({r.completion_ids for (r,) in expected}) > 1
    for (mine,), (own,) in zip(found, expected, strict=True):
        assert (mine.prompt_key, mine.completion_ids, mine.text) == (own.prompt_key, own.completion_ids, own.text)
        assert mine.finish_reason == own.finish_reason and mine.strategy == own.strategy
        assert mine.logprobs == pytest.approx(own.logprobs, abs=1e-5)
    assert sum(counted) == 2 * len(ROWS)  # the endpoint's, and those in process


def test_references_have_the_logprobs_argmaxes_and_margins_of_the_model_in_process(server, model):
    tokenizer = tiny_tokenizer()
    prompts = [p.prompt_ids for p in build_prompts(ROWS, tokenizer)]
    ids = [[*tokenizer(row["references"][0])["input_ids"], 2] for row in ROWS]
    with torch.no_grad():
        ids[0] = [int(model(torch.tensor([prompts[0]])).logits[0, -1].argmax()), 2]  # one argmax at least
        expected = teacher_force(model, prompts, ids)
    for mine, own in zip(Endpoint.of(server.url).teacher_force(prompts, ids), expected, strict=True):
        assert torch.allclose(mine.logprobs, own.logprobs.float(), atol=1e-5)
        assert torch.allclose(mine.margins, own.margins.float(), atol=1e-5)
        assert mine.right.tolist() == own.right.tolist()
    server.scores = False
    assert Endpoint.of(server.url).teacher_force(prompts, ids) is None


def test_samples_differ_repeat_with_the_seed_and_have_no_logprobs_of_a_warped_distribution(server, model):
    found, _ = decoded(server, model, Sample(), samples=4)
    again, _ = decoded(server, model, Sample(), samples=4)
    assert found == again and any(len({r.completion_ids for r in group}) > 1 for group in found)
    assert [r.sample for r in found[0]] == [0, 1, 2, 3]
    assert all(math.isfinite(r.logprob) and r.logprobs for group in found for r in group)
    warped, _ = decoded(server, model, Sample(temperature=0.5, top_p=0.9))
    assert not any(r.logprobs for (r,) in warped)
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sent.items() <= server.asked[-1].items()


def test_without_token_ids_the_text_is_tokenised_again(server, model):
    server.gives_ids = False
    found, expected = decoded(server, model, Greedy())
    plain = [(m, o) for (m,), (o,) in zip(found, expected, strict=True) if not {0, 1, 2, 3} & {*o.completion_ids[:-1]}]
    assert plain and all(m.completion_ids == o.completion_ids and not m.logprobs for m, o in plain)
    answer = {"text": "a b", "finish_reason": "stop"}  # servers leave the stop token out of the text
    assert _tokens(answer, tiny_tokenizer(), [2]) == ([5, 6, 2], ())
    assert _tokens(answer | {"finish_reason": "length"}, tiny_tokenizer(), [2]) == ([5, 6], ())
    assert _tokens(answer | {"stop_reason": "b"}, tiny_tokenizer(), [2]) == ([5, 6], ())


def test_what_passes_is_tried_again_and_what_does_not_is_one_line(server, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    endpoint, body = Endpoint.of(server.url), {"prompt": [5], "max_tokens": 1, "temperature": 0.0}
    server.failures = 2
    assert endpoint._complete(body)["text"] is not None
    server.failures = 3
    with pytest.raises(ModelError, match=r"completions failed: 503 .*busy") as error:
        endpoint._complete(body)
    assert "\n" not in str(error.value) and server.failures == 0
    endpoint.check()
    with pytest.raises(ModelError, match="does not serve 'other'; it serves tiny"):
        Endpoint.of(server.url.replace("#tiny", "#other")).check()
    with pytest.raises(ModelError, match=r"http://127.0.0.1:9/v1/models failed: .*refused.* Is the server running"):
        Endpoint.of("http://127.0.0.1:9/v1#tiny").check()
    with pytest.raises(ConfigError, match="names no model; write it as"):
        Endpoint.of("http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="an endpoint decodes greedy and sample, not 'beam"):
        decoded(server, model, Beam())
