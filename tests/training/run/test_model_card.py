"""The card of a result, and its push, by way of a hub that is a local folder."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from tiny_report import results, samples  # noqa: F401 - fixtures
from tiny_task import tiny_tokenizer, tiny_trainer, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlseq
from rlseq.config.training import GRPOConfig
from rlseq.evaluation.report.write import write_report
from rlseq.training.run import model_card as module
from rlseq.training.run.model_card import launch_command, model_card, report_sections
from rlseq.training.trl.checkpoint import publish as publish_module
from rlseq.training.trl.checkpoint.publish import publish

GIVEN = {
    "model_name": "speller",
    "method": "GRPO",
    "base_model": "me/base",
    "dataset_name": "me/words",
    "rewards": [("letters", 1.0), ("brevity", 0.25)],
    "report": "",
    "command": ["accelerate", "launch", "recipes/grpo.py", "--reward_funcs", "my file.py:letters"],
    "where": "me/speller",
    "tags": ["trl", "grpo"],
}


class LocalHub:
    """What transformers calls of HfApi; a repository is a folder, and an upload a copy."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.messages = folder, [], []

    def create_repo(self, repo_id, *, token, private, exist_ok):
        self.made.append({"repo_id": repo_id, "token": token, "private": private})
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns=None, run_as_future=False, **_):
        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            (self.folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.folder / repo_id / name)
        self.messages.append(commit_message)
        done = concurrent.futures.Future()
        done.set_result(None)
        return done

    def files(self, repo_id):
        return {str(p.relative_to(self.folder / repo_id)) for p in (self.folder / repo_id).rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "the-hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(publish_module, "upload_folder", hub.upload_folder)
    return hub


PUSHED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
}


def parsed(text):
    """A card as the hub's own class reads it."""
    card = ModelCard(text)
    return card.data.to_dict(), card.text


def test_the_metadata_is_what_the_hub_reads():
    data, _ = parsed(str(model_card(**GIVEN)))
    assert data == {
        "base_model": "me/base",
        "datasets": "me/words",
        "library_name": "transformers",
        "model_name": "speller",
        "pipeline_tag": "text-generation",
        "tags": ["rlseq", "generated_from_trainer", "trl", "grpo"],
    }


def test_local_names_are_in_the_text_and_not_in_the_metadata(tmp_path):
    (tmp_path / "base").mkdir()
    given = GIVEN | {"base_model": str(tmp_path / "base"), "dataset_name": "data/gone.jsonl/train"}
    given["adapter_of"] = str(tmp_path / "base")
    data, text = parsed(str(model_card(**given)))
    assert "base_model" not in data and "datasets" not in data
    assert f"`{tmp_path / 'base'}`" in text and "`data/gone.jsonl/train`" in text
    assert data["library_name"] == "peft" and f"`peft` loads them on top of their base, `{tmp_path}/base`." in text


def test_characters_that_hide_text_or_cannot_be_encoded_are_escapes_in_the_card():
    given = GIVEN | {"dataset_name": "w\u202eords", "rewards": [("re\u200fward", 1.0)], "where": "a\udcffb"}
    text = str(model_card(**given | {"model_name": "m\x1b[31m", "command": ["run", "a\rb"]}))
    for escaped in ("w\\u202eords", "re\\u200fward", "a\\udcffb", "# m\\u001b[31m", "run 'a\\u000db'"):
        assert escaped in text
    assert text.encode() and text.replace("\n", "").isprintable()


def test_of_an_adapter_the_metadata_name_what_it_is_loaded_on():
    # Trained on from an adapter: what it began from is one thing, what it needs to be loaded another.
    data, text = parsed(str(model_card(**GIVEN | {"base_model": "me/adapter", "adapter_of": "you/base"})))
    assert data["base_model"] == "you/base"
    assert "`me/adapter`, trained by GRPO" in text and "on top of their base, `you/base`." in text


def test_the_text_has_rewards_command_and_versions():
    import transformers
    import trl

    text = model_card(**GIVEN).text
    assert "| `letters` | 1 |\n| `brevity` | 0.25 |\n" in text
    assert "accelerate launch recipes/grpo.py --reward_funcs 'my file.py:letters'\n" in text
    versions = f"rlseq {rlseq.__version__}, trl {trl.__version__}, transformers {transformers.__version__}, torch "
    assert versions + torch.__version__.partition("+")[0] in text
    assert "Not evaluated yet" in text and "Evaluation spec" not in text
    supervised = model_card(**GIVEN | {"rewards": [], "method": "SFT"}).text
    assert "## Rewards" not in supervised and "by teacher forcing" in supervised


def test_the_card_repeats_headline_tables_and_spec_of_the_report(results, samples, tmp_path):  # noqa: F811
    write_report(results, samples, tmp_path)
    report = (tmp_path / "report.md").read_text()
    text = model_card(**GIVEN | {"report": report}).text
    assert "**Better: WER under greedy is 30.0% for rl, against 32.0% for base.**" in text
    assert "The references became less likely: NLL per token 0.21" in text
    lines = [line for line in report.split("\n") if line.startswith(("| greedy | ", "| sample | "))]
    values = [line for line in lines if line.startswith(("| greedy | base | ", "| greedy | rl | "))]
    assert len(values) >= 2 and all(line in text.split("\n") for line in values)
    assert "| seed | 0 |" in text and "| rl | runs/rl |" in text
    assert "\n### How likely the references are\n" in text and "Not evaluated" not in text
    assert "prompt r1" not in text and "evil.example" not in text  # samples are evaluated rows: they stay at home


def test_sections_are_told_by_their_headings():
    assert report_sections("# T\n\nlead\n\n## A b\n\n| ## |\n\n## C\nx\n### D\n") == {
        "": "lead",
        "A b": "| ## |",
        "C": "x\n### D",
    }
    assert report_sections("") == {"": ""}


@pytest.mark.parametrize(
    ("parent", "argv", "expected"),
    [
        (
            ["/x/python", "/x/bin/accelerate", "launch", "--num_processes", "2", "recipes/grpo.py", "--beta", "0"],
            ["recipes/grpo.py", "--beta", "0"],
            ["accelerate", "launch", "--num_processes", "2", "recipes/grpo.py", "--beta", "0"],
        ),
        (["bash"], ["recipes/grpo.py", "--hub_token", "hf_x"], ["python", "recipes/grpo.py", "--hub_token", "HIDDEN"]),
        (
            ["bash"],
            ["a.py", "--hub-token=hf_x", "--seed", "1"],
            ["python", "a.py", "--hub-token=HIDDEN", "--seed", "1"],
        ),
        (["bash"], ["/somewhere/bin/train", "--seed", "1"], ["train", "--seed", "1"]),
    ],
)
def test_the_command_is_the_one_given_without_tokens(monkeypatch, parent, argv, expected):
    process = types.SimpleNamespace(parent=lambda: types.SimpleNamespace(cmdline=lambda: parent))
    monkeypatch.setattr(module.psutil, "Process", lambda: process)
    monkeypatch.setattr(sys, "argv", argv)
    assert launch_command() == expected


def test_a_push_holds_model_tokenizer_and_card_and_nothing_else(hub, tmp_path):
    run = tmp_path / "run"
    trainer = tiny_trainer(
        run,
        push_to_hub=True,
        hub_model_id="me/speller",
        hub_token="hf_secret",
        hub_private_repo=True,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        log_completions=True,
        num_completions_to_print=1,
    )
    trainer.train()
    assert hub.made == [{"repo_id": "me/speller", "token": "hf_secret", "private": True}]
    assert hub.messages == ["Training in progress, step 1"]
    assert hub.files("me/speller") == PUSHED
    assert "Not evaluated yet" in (hub.folder / "me/speller/README.md").read_text()
    report = tmp_path / "report.md"
    report.write_text("# T\n\nA finding.\n\n## Samples\n\nsecret row\n")
    publish(trainer, base_model=None, dataset_name="me/words", report=report)
    assert hub.messages == ["Training in progress, step 1", "End of training"]
    assert hub.files("me/speller") == PUSHED and trainer.args.output_dir == str(run)
    pushed = hub.folder / "me/speller"
    assert b"hf_secret" not in b"".join(p.read_bytes() for p in pushed.iterdir())
    data, text = parsed((pushed / "README.md").read_text())
    assert data["datasets"] == "me/words" and "A finding." in text and "secret row" not in text
    assert "`shares_letters` | 1 |" in text and 'from_pretrained("me/speller")' in text
    assert (run / "README.md").read_text() == (pushed / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(pushed)
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert AutoTokenizer.from_pretrained(pushed).get_vocab() == tiny_tokenizer().get_vocab()


def test_settings_keep_their_token_and_files_of_them_do_not(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret")
    torch.save(config, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert config.hub_token == "hf_secret" and again.hub_token is None
    assert again.learning_rate == config.learning_rate
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()


def test_the_recipe_pushes_once_its_result_was_contrasted(hub, tmp_path, monkeypatch):
    from rlseq.recipes.grpo import main

    write_task(tmp_path)
    (tmp_path / "rewards.py").write_text("def letters(completion, references):\n    return len(completion) / 10\n")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "reward_funcs": [f"{tmp_path}/rewards.py:letters"],
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "strategies": ["greedy"],
        "studies": [],
        "resamples": 100,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_strategy": "end",
        "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
        "hub_model_id": "me/speller",
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["recipes/grpo.py", "--config", str(tmp_path / "grpo.yaml")])
    main()
    assert hub.messages == ["End of training"] and hub.files("me/speller") == PUSHED
    report = (tmp_path / "run/evaluation/report.md").read_text()
    _, text = parsed((hub.folder / "me/speller/README.md").read_text())
    finding = next(line for line in report.split("\n") if line.startswith("**"))
    assert finding in text.split("\n")
    assert (tmp_path / "run/README.md").read_text() == (hub.folder / "me/speller/README.md").read_text()
    if find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "run/runs").iterdir()
        read = EventAccumulator(str(folder)).Reload()
        evaluated = json.loads((tmp_path / "run/evaluation/results.json").read_text())["models"]
        for model in ("base", "rl"):
            (event,) = read.Scalars(f"contrast/{model}/nll_per_token")
            assert event.value == pytest.approx(evaluated[model]["likelihood"]["nll_per_token"]["value"], rel=1e-6)
        assert read.Images("contrast/plane")[0].step == 1
