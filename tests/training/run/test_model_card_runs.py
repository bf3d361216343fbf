"""Cards and pushes of adapters, of every trainer, and under two processes: one process writes, a base is named."""

from __future__ import annotations

import json
import os
import shutil
import sys

import datasets
import pytest
import torch
from forks import run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from test_model_card import PUSHED, hub, parsed  # noqa: F401 - a fixture
from tiny import tiny_model
from tiny_ppo import tiny_ppo
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from rlseq.config.training import SFTConfig
from rlseq.training.trl.checkpoint.publish import publish
from rlseq.training.trl.sft import SFTTrainer

ADAPTER = (PUSHED - {"config.json", "generation_config.json", "model.safetensors"}) | {
    "adapter_config.json",
    "adapter_model.safetensors",
}
CRITIC = {"critic/config.json", "critic/model.safetensors", "critic/value_head.safetensors"}
PUSHES = {"push_to_hub": True, "hub_model_id": "me/speller", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
FEW = {"per_device_train_batch_size": 4}  # a process


def base_on_disk(folder):
    """A model, and the path that names it."""
    tiny_model("llama", initializer_range=0.1).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def tiny_sft(folder, *, model=None, peft_config=None, **settings):
    common = {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    rows = {"prompt": [r["prompt"] for r in ROWS], "completion": [r["references"][0] for r in ROWS]}
    return SFTTrainer(
        model=model if model is not None else tiny_model("llama", initializer_range=0.1),
        args=SFTConfig(output_dir=str(folder), **{**common, **settings}),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def grpo(folder, peft_config=None, **settings):
    return tiny_trainer(folder, peft_config=peft_config, **settings)


def ppo(folder, peft_config=None, **settings):
    return tiny_ppo(folder, more={"peft_config": peft_config}, **settings)


MADE = {"GRPO": grpo, "PPO": ppo, "SFT": tiny_sft}


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("method", MADE)
def test_every_trainer_pushes_its_model_and_names_what_it_began_from(method, adapted, hub, tmp_path):  # noqa: F811
    base = str(tmp_path / "base")
    config = lora() if adapted else None
    trainer = MADE[method](tmp_path / "run", model=base_on_disk(base), peft_config=config, **PUSHES)
    trainer.train()
    pushed = hub.folder / "me/speller"
    files = (ADAPTER if adapted else PUSHED) | (CRITIC if method == "PPO" else set())
    assert hub.messages == ["Training in progress, step 1"] and hub.files("me/speller") == files
    critic = {name: (pushed / name).read_bytes() for name in files & CRITIC}
    shutil.rmtree(pushed)
    publish(trainer, base_model=base, dataset_name="me/words")
    assert hub.messages[1:] == ["End of training"] and hub.files("me/speller") == files
    assert critic == {name: (pushed / name).read_bytes() for name in files & CRITIC}  # the step was the last
    data, text = parsed((pushed / "README.md").read_text())
    assert data["library_name"] == ("peft" if adapted else "transformers") and method.lower() in data["tags"]
    assert f"`{base}`, trained by {method} on `me/words`" in text
    assert ("## Rewards" in text) == (method != "SFT")
    assert (f"on top of their base, `{base}`." in text) == adapted
    assert (tmp_path / "run/README.md").read_text() == (pushed / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(base if adapted else pushed)
    if adapted:
        assert json.loads((pushed / "adapter_config.json").read_text())["base_model_name_or_path"] == base
        loaded = PeftModel.from_pretrained(loaded, pushed)
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())


def test_of_an_adapter_beside_its_frozen_copy_one_is_pushed(hub, tmp_path):  # noqa: F811
    started = get_peft_model(base_on_disk(tmp_path / "base"), lora())
    started.save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(base_on_disk(tmp_path / "base"), tmp_path / "sft", is_trainable=True)
    trainer = grpo(tmp_path / "run", model=model, beta=0.1, **PUSHES)
    assert len(trainer.model.peft_config) == 2  # that of the start is the reference
    trainer.train()
    publish(trainer, base_model="me/sft", dataset_name=None)
    assert hub.files("me/speller") == ADAPTER
    _, text = parsed((hub.folder / "me/speller/README.md").read_text())
    assert "`me/sft`, trained by GRPO" in text and f"on top of their base, `{tmp_path}/base`." in text


def test_a_push_at_the_end_alone_writes_nothing_before(hub, tmp_path):  # noqa: F811
    trainer = tiny_trainer(tmp_path / "run", **PUSHES, hub_strategy="end")
    trainer.train()
    assert hub.messages == [] and not (tmp_path / "run/hub").exists()
    publish(trainer, base_model=None, dataset_name=None)
    assert hub.messages == ["End of training"] and hub.files("me/speller") == PUSHED


@pytest.mark.parametrize("method", MADE)
def test_of_two_processes_the_first_writes_and_pushes(method, hub, tmp_path):  # noqa: F811
    base_on_disk(tmp_path / "base")

    def act():
        written, rank = set(), os.environ["RANK"]

        def note(event, arguments):
            if event == "open" and isinstance(arguments[0], str) and set(arguments[1] or "") & set("wax"):
                written.add(arguments[0])

        sys.addaudithook(note)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trainer = MADE[method](tmp_path / "run", model=model, peft_config=lora(), **PUSHES, **FEW)
        trainer.train()
        publish(trainer, base_model=str(tmp_path / "base"), dataset_name="me/words")
        found = [str(p) for p in written if p.startswith(str(tmp_path)) and ("/hub/" in p or "README.md" in p)]
        said = {"made": len(hub.made), "pushed": hub.messages, "world": trainer.args.world_size, "written": found}
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(said))

    run_ranks(2, act, tmp_path / "log")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    written = first.pop("written")
    assert {f"{tmp_path}/run/README.md", f"{tmp_path}/run/hub/README.md"} <= set(written)
    assert first == {"made": 1, "pushed": ["Training in progress, step 1", "End of training"], "world": 2}
    assert second == {"made": 0, "pushed": [], "world": 2, "written": []}
    assert hub.files("me/speller") == ADAPTER | (CRITIC if method == "PPO" else set())
    assert (tmp_path / "log").read_text().count("pushed to the hub: me/speller") == 1
    _, text = parsed((hub.folder / "me/speller/README.md").read_text())
    assert f"on top of their base, `{tmp_path}/base`." in text
