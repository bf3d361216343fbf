"""`--use_vllm` in server mode: TRL's client against a stand-in server, one step of rlseq's trainer.

TRL's client and its requests are real, and so are rlseq's trainer, rewards and rollouts. Stood in for are:

* vLLM itself: an HTTP server in a thread that samples from a tiny model, token by token, and scores as it samples;
* NCCL: `init_communicator` joins nothing (the real one takes a CUDA device), and the tensors that TRL streams reach
  the server's model by a function call, once the request that announces them has;
* the check that vLLM is installed.

The colocate mode runs vLLM's engine in the trainer's process; nothing of it can be had without vLLM.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny import EOS, tiny_model
from tiny_task import tiny_tokenizer, tiny_trainer
from trl.generation import vllm_client, vllm_generation

G, LONGEST = 4, 8
SETTINGS = {
    "num_generations": G,
    "max_completion_length": LONGEST,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,  # else a gradient that is smaller would be clipped less
    "logging_steps": 1,
    "report_to": "none",
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_importance_sampling_mode": "token_truncate",
}


class StandIn:
    """What `vllm serve` answers TRL 1.16's client; `off` is added to the log-probs it reports, as other kernels would.

    Attributes:
        asked: (path, body) of each request.
        answers: the answers to /v1/completions.
        sent: names that were streamed, an update each.
    """

    def __init__(self, model, off):
        self.model, self.off = model, off
        self.noise = torch.Generator().manual_seed(3)
        self.asked, self.answers, self.sent = [], [], []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                stand_in.asked.append((self.path.partition("?")[0], body))
                text = json.dumps(stand_in.answer(*stand_in.asked[-1])).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path, body):
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path == "/server_info":
            return {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
        if path == "/v1/completions":
            self.answers.append([self.complete(ids, body) for ids in body["prompt"] for _ in range(body["n"])])
            return {"choices": self.answers[-1]}
        return {"success": True}

    @torch.no_grad()
    def complete(self, prompt, body):
        """A completion by plain forwards, without cache, padding or rlseq."""
        ids, logprobs, tokenizer = [], [], tiny_tokenizer()

        def ended():
            return EOS in ids or any(stop in tokenizer.decode(ids) for stop in body.get("stop") or [])

        while len(ids) < body["max_tokens"] and not ended():
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            each = (logits / body["temperature"]).log_softmax(-1)
            ids.append(torch.multinomial(each.exp(), 1, generator=self.noise).item())
            logprobs.append(each[ids[-1]].item() + self.off)
        tokens = [f"token_id:{token}" for token in ids]
        told = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [None] * len(ids)}
        return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": told}

    def receive(self, iterator, trainer_args):
        """What a broadcast would bring: the weights that the last request announced, in its order."""
        while self.asked[-1][0] != "/update_weights":  # it is posted by another thread
            threading.Event().wait(0.001)
        told = self.asked[-1][1]["update_info"]
        streamed = [(name, x.clone()) for name, x in iterator]
        assert [name for name, _ in streamed] == told["names"]
        assert [list(x.shape) for _, x in streamed] == told["shapes"]
        self.model.load_state_dict(dict(streamed), strict=True)
        self.sent.append(told["names"])


@pytest.fixture
def serve(monkeypatch):
    """Starts a stand-in whose model is another than the trainer's until that sends its weights."""
    started = []

    def start(off=0.0):
        server = StandIn(tiny_model(seed=9, initializer_range=0.1), off)
        started.append(server)
        engine = types.SimpleNamespace(trainer_send_weights=server.receive)
        monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", engine, raising=False)
        monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", lambda **_: None, raising=False)
        return server

    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def ends_early(completion: str) -> float:
    return -float(len(completion.split()))


def trained(tmp_path, server, **settings):
    """The trainer after its steps, and the server's weights as each round was sampled."""
    trainer = tiny_trainer(
        tmp_path, rewards=[ends_early], **{**SETTINGS, "vllm_server_base_url": server.url, **settings}
    )
    seen, submit = [], trainer.scorer.submit

    def keep(batch):
        policy = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        seen.append((batch.rollouts, policy, copy.deepcopy(server.model.state_dict())))
        submit(batch)

    trainer.scorer.submit = keep
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters()}
    return trainer, seen, moved


def test_a_step_trains_on_what_the_server_sampled_from_the_weights_it_was_sent(tmp_path, serve):
    server = serve(off=0.1)
    trainer, seen, _ = trained(tmp_path, server)
    assert len(seen) == len(server.answers) == len(server.sent) == 2  # each step sends its weights, then samples
    tokenizer = tiny_tokenizer()
    for (rollouts, policy, served), answers in zip(seen, server.answers, strict=True):
        assert all(torch.equal(served[name], x) for name, x in policy.items())
        assert [list(r.completion_ids) for r in rollouts] == [choice["token_ids"] for choice in answers]
        assert [r.sample for r in rollouts] == list(range(G)) * (len(answers) // G)
        assert {r.finish_reason for r in rollouts} == {"stop", "length"}
        assert all((r.finish_reason == "stop") == (r.completion_ids[-1] == EOS) for r in rollouts)
        prompts = {p.key: list(p.prompt_ids) for p in trainer.prompts}
        assert [prompts[r.prompt_key] for r in rollouts] == [choice["prompt_token_ids"] for choice in answers]
    assert not torch.equal(seen[0][1]["lm_head.weight"], seen[1][1]["lm_head.weight"])
    logged = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    texts = [tokenizer.decode(c["token_ids"], skip_special_tokens=True) for c in server.answers[0]]
    assert [record["completion"] for record in logged] == texts
    assert [record["total"] for record in logged] == [-float(len(text.split())) for text in texts]
    assert {record["logprob"] for record in logged} == {None}  # those of another engine are not the policy's

    asked = next(body for path, body in server.asked if path == "/v1/completions")
    assert (asked["n"], asked["max_tokens"], asked["temperature"], asked["logprobs"]) == (G, LONGEST, 1.0, 0)
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)

    # The server says 0.1 nats too much of each token: policy − server is −0.1, its ratio exp(−0.1), every token alike.
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        for name in ("mean", "max"):
            assert line[f"sampling/sampling_logp_difference/{name}"] == pytest.approx(0.1, abs=1e-5)
        for name in ("min", "mean", "max"):
            assert line[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(math.exp(-0.1), abs=1e-5)


def test_stop_strings_are_looked_for_by_the_server(tmp_path, serve):
    server, capitals = serve(), list("ABCDEFGHI")
    _, ((rollouts, *_), *_), _ = trained(tmp_path, server, stop_strings=capitals, max_steps=1)
    asked = next(body for path, body in server.asked if path == "/v1/completions")
    assert asked["stop"] == capitals
    by_string = [r for r in rollouts if tiny_tokenizer().decode(r.completion_ids[-1]) in capitals]
    assert by_string
    assert all(r.finish_reason == "stop" and not set(r.text) & set(capitals) for r in by_string)
    logged = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert not any(set(record["completion"]) & set(capitals) for record in logged)


def test_the_mismatch_is_corrected_by_its_importance_ratio(tmp_path, serve):
    moves = {}
    for off in (0.0, 0.25):
        settings = {"max_steps": 1, "beta": 0.0}
        moves[off] = trained(tmp_path / str(off), serve(off), **settings)[2]
    for name, move in moves[0.0].items():
        assert move.abs().max() > 1e-6, name
        # all of the gradient is weighed by exp(−0.25); float32 rounds weights of up to 1, of which the move is taken
        torch.testing.assert_close(moves[0.25][name], math.exp(-0.25) * move, rtol=1e-3, atol=2e-7)
