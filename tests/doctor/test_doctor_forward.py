"""The doctor's checks that run a model, each on a model that is wrong in that way alone; and the command."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from test_doctor import told
from tiny import FAMILIES, tiny_model
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from rlseq.cli.doctor import examine_model
from rlseq.cli.main import main
from rlseq.config.training import ModelArguments
from rlseq.doctor import forward
from rlseq.errors import ModelError
from rlseq.training.models import disable_dropout, load_model


def altered(kind, family="llama", **changes):
    """A tiny model whose forward is another class's."""
    model = tiny_model(family, **changes)
    model.__class__ = kind
    return model


class ForgetsPositions(GPT2LMHeadModel):
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class TakesNoPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class BreaksInLongRows(LlamaModel):
    """Wrong from column 40 on, which `supports_packing` does not reach."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.cat([hidden[:, :40], -hidden[:, 40:]], dim=1)
        return output


class CountsOneTooFar(LlamaForCausalLM):
    """Decodes with a cache one position too late."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            position_ids = position_ids + 1
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


class AsThoughItWereAnother(CountsOneTooFar):
    """Its forward does not say what it takes, so that it is tried before it is decoded."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def mask_like(inputs_embeds, visible):
    size = inputs_embeds.shape[1]
    seen = torch.tensor([[visible(i, j) for j in range(size)] for i in range(size)])
    return torch.zeros(1, 1, size, size).masked_fill(~seen, torch.finfo(torch.float32).min)


class LooksAhead(LlamaForCausalLM):
    def forward(self, inputs_embeds=None, **kwargs):
        mask = mask_like(inputs_embeds, lambda i, j: True)
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)


class SeesTheLastTokenOnly(LlamaForCausalLM):
    def forward(self, inputs_embeds=None, **kwargs):
        mask = mask_like(inputs_embeds, lambda i, j: i == j)
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)


class SavesHalf(LlamaForCausalLM):
    """Has a bias on its logits that the saved model's class does not know."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(23) / 23
        return output


class SavesUntied(LlamaForCausalLM):
    """Saves equal copies of embedding and head, which then train apart."""

    def save_pretrained(self, folder, **kwargs):
        apart = copy.deepcopy(self)
        apart.__class__ = LlamaForCausalLM
        apart.config.tie_word_embeddings = False
        apart.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        apart.save_pretrained(folder)


MODEL_CHECKS = (
    forward.check_weights,
    forward.check_left_padding,
    forward.check_packing,
    forward.check_cache,
    forward.check_causality,
    forward.check_saving,
    forward.check_lora,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_passes_every_check_and_is_left_as_it_was(family):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    statuses = {check.__name__: check(model).status for check in MODEL_CHECKS}
    # GPT-2 has absolute positions: without position_ids, padding shifts them
    padding = "warning" if family == "gpt2" else "ok"
    assert statuses == {check.__name__: "ok" for check in MODEL_CHECKS} | {"check_left_padding": padding}
    assert {name for name, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_left_padding_says_how_far_log_probs_move_without_position_ids():
    model = tiny_model("gpt2")
    alone = []
    watching = model.register_forward_pre_hook(
        lambda _, args, given: alone.append(given["input_ids"]), with_kwargs=True
    )
    result = forward.check_left_padding(model)
    watching.remove()
    told(result, "warning", "where position_ids are left out", "rlseq sends position_ids everywhere")
    # GPT-2's own positions of a row padded by k tokens begin at k: the row alone, at those positions
    rows = [ids for ids in alone if len(ids) == 1]
    width = max(ids.shape[1] for ids in rows)
    differences = []
    with torch.no_grad():
        for ids in rows:
            shifted = torch.arange(width - ids.shape[1], width)[None]
            right, wrong = (
                model(input_ids=ids, **more).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                for more in ({}, {"position_ids": shifted})
            )
            differences.append((right - wrong).abs().max().item())
    largest = max(differences)
    assert len(rows) == 3 and min(differences) == 0 < largest
    assert f"move by {largest:.2g} nats" in result.found


def test_left_padding_that_no_position_ids_mend():
    told(forward.check_left_padding(altered(ForgetsPositions, "gpt2")), "failed", "position_ids or not")
    told(forward.check_left_padding(altered(TakesNoPositions)), "failed", "takes no position_ids")


def test_packing():
    broken = tiny_model()
    broken.model.__class__ = BreaksInLongRows
    told(forward.check_packing(broken), "failed", "log-probs move by", "pack_updates")
    told(forward.check_packing(tiny_model("mistral")), "skipped", "attention window of 4", "one sequence per row")


def test_cache():
    told(forward.check_cache(altered(CountsOneTooFar)), "failed", "log-probs move by")
    told(forward.check_cache(altered(AsThoughItWereAnother)), "warning", "decoded without a cache", "slow rollouts")


def test_causality():
    told(forward.check_causality(altered(LooksAhead)), "failed", "7 of 7 tokens' losses depend on")
    # the first of 7 has one token before it, which is the last one
    told(forward.check_causality(altered(SeesTheLastTokenOnly)), "failed", "6 of 7 tokens' losses do not depend")


def test_saving():
    told(forward.check_saving(tiny_model(tie_word_embeddings=True)), "ok", "stay tied")
    told(forward.check_saving(tiny_model()), "ok", "not tied")
    apart = tiny_model(tie_word_embeddings=True)
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach() * 2)
    told(forward.check_saving(apart), "failed", "two tensors", "tie_weights()")
    # the largest bias that is lost is 22/23
    told(forward.check_saving(altered(SavesHalf)), "failed", "logits differ by 0.96 once loaded again")
    told(forward.check_saving(altered(SavesUntied, tie_word_embeddings=True)), "failed", "no longer tied")


def test_weights():
    model = tiny_model()
    told(forward.check_weights(model, ["lm_head.weight"]), "failed", "lm_head.weight not in the checkpoint")
    model.lm_head.weight.data[3, 2] = float("nan")
    told(forward.check_weights(model), "failed", "lm_head.weight holds NaN")
    told(forward.check_packing(model), "skipped")
    told(forward.check_left_padding(model), "failed", "nan")


def test_lora():
    told(forward.check_lora(tiny_model()), "ok", "q_proj, v_proj", "KL 0")
    told(forward.check_lora(tiny_model(), init_lora_weights=False), "failed", "nats per token from the model")
    unheard = tiny_model()
    unheard.config.__class__ = type("Unheard", (LlamaConfig,), {"model_type": "unheard-of"})
    told(forward.check_lora(unheard), "warning", "--lora_target_modules")


class DropsInItsForward(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = nn.functional.dropout(output.logits, 0.1, training=self.training)
        return output


@pytest.mark.parametrize(("family", "rate"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_dropout_is_off_in_training_however_a_model_applies_it(family, rate, tmp_path):
    model = tiny_model(family, initializer_range=0.1, **{rate: 0.5})
    told(forward.check_train_mode(copy.deepcopy(model), lambda model: None), "failed", "log-probs move by")
    told(forward.check_train_mode(copy.deepcopy(model), disable_dropout), "ok", "at most 0 nats")
    told(forward.check_train_mode(altered(DropsInItsForward), disable_dropout), "failed", "config.json")
    # what the check stands for: the policy that a trainer updates is the one that was sampled from
    trained = tiny_trainer(tmp_path, model=model).model.train()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)
    assert getattr(model.config, rate) == 0.5


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter that is far from its base."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model(initializer_range=0.2).save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_an_adapter_trains_on_against_a_copy_of_itself(adapter, tmp_path):
    model = load_model(ModelArguments(model_name_or_path=str(adapter)))
    told(forward.check_adapter(model), "ok", "the reference, 0")
    # what the check stands for: the first step's KL to the reference is 0, and the next one's no more
    trainer = tiny_trainer(tmp_path, model=model, beta=0.1, learning_rate=0.1)
    trainer.train()
    first, second = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert first == pytest.approx(0, abs=1e-9) and second > 1e-3
    frozen = AutoModelForCausalLM.from_pretrained(adapter)
    told(forward.check_adapter(frozen), "failed", "the adapter is frozen")
    with pytest.raises(ModelError, match="leave out --use_peft"):
        load_model(ModelArguments(model_name_or_path=str(adapter), use_peft=True))


def test_an_adapter_folder_is_examined_with_its_base(adapter):
    found = {result.check: result for result in examine_model(str(adapter))}
    assert {r.status for r in found.values()} == {"ok", "skipped"}
    assert "the adapter trains on" in found["LoRA"].found


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def doctor(saved, *more):
    data = ["--dataset_name", str(saved / "validation.jsonl")]
    return main(["doctor", "--model_name_or_path", str(saved / "model"), *data, *more])


def test_the_command_prints_a_line_a_check(saved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert doctor(saved) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rlseq doctor: ") and lines[-1] == "17 ok, 1 skipped"
    assert [line.split()[1] for line in lines[2:-2]] == ["ok"] * 3 + ["skipped"] + ["ok"] * 14


def test_the_command_fails_with_a_check_and_json_says_which(saved, capsys):
    assert doctor(saved, "--json", "--prompt_template", "zebra = ") == 1
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert not report["ok"] and [check["check"] for check in failed] == ["references"]
    assert "8 of 8 prompts hold <unk>" in failed[0]["found"] and failed[0]["todo"]


def test_neither_json_nor_lines_hold_raw_characters_that_hide_text(saved, capsys):
    path = str((saved / "model").rename(saved / "mo\u202edel"))
    assert main(["doctor", "--model_name_or_path", path, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["model"] == path and out.replace("\n", "").isprintable()
    assert main(["doctor", "--model_name_or_path", path]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert r"mo\u202edel" in out and out.isprintable()


def test_pickled_weights_are_a_failure_and_not_loaded(saved, capsys):
    (saved / "model" / "model.safetensors").unlink()
    (saved / "model" / "pytorch_model.bin").write_bytes(b"no pickle")
    assert doctor(saved) == 1
    assert "pickled, not safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "./nowhere"], "there is no model at './nowhere'"),
        (["--eval_rows", "0"], "--eval_rows is 0; expected at least 1"),
        (["--dataset_name", "./nowhere.jsonl"], "there is no data file"),
        (["--prompt_column", "promt"], "Did you mean 'prompt'"),
        (["--row", "3"], "unknown argument --row"),
    ],
)
def test_bad_input_ends_with_2_and_a_line(saved, capsys, flags, message):
    assert doctor(saved, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_check_that_breaks_is_a_failure(saved, monkeypatch):
    def breaks(model):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(forward, "check_packing", breaks)
    found = {result.check: result for result in examine_model(str(saved / "model"))}
    told(found["packing"], "failed", "stopped by ZeroDivisionError: by zero")


def test_the_help_imports_no_torch():
    code = "import sys; from rlseq.cli.main import main\ntry: main(['doctor', '--help'])\nexcept SystemExit: pass\n"
    ended = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert "Exit status: 0 when nothing failed" in ended.stdout and ended.stdout.splitlines()[-1] == "False"
