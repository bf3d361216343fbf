"""What arrives at trackers, read back from what each of them wrote: numbers, completions, the contrast at the end."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model
from tiny_ppo import tiny_ppo
from tiny_task import ROWS, shares_letters, tiny_tokenizer

from rlseq.config.training import GRPOConfig, SFTConfig
from rlseq.data.prompts import build_prompts
from rlseq.errors import ConfigError
from rlseq.training.grpo import GRPOTrainer
from rlseq.training.trl.logging.trackers import contrast_numbers, log_contrast, markdown_table

NAN = float("nan")
RESULTS = {
    "models": {
        "base": {
            "likelihood": {"nll_per_token": {"value": 0.25}, "exact_pass_at_k": {"1": {"value": 0.5}}},
            "strategies": {"greedy": {"wer": {"value": 0.75}}},
        },
        "rl": {"likelihood": {}, "strategies": {"greedy": {"wer": {"value": 0.5}}, "sample": {"wer": {"value": None}}}},
    },
    "primary": {"metric": "wer", "strategy": "greedy", "a": "base", "b": "rl"},
    "comparisons": [
        {"a": "base", "b": "rl", "strategy": None, "metric": "nll_per_token", "difference": 9.0, "ci95": [9.0, 9.0]},
        {
            "a": "base",
            "b": "rl",
            "strategy": "greedy",
            "metric": "wer",
            "difference": -0.25,
            "ci95": [-0.5, 0.125],
            "p_value": 0.0625,
        },
    ],
}
NUMBERS = {  # every value a power of two or a sum of some: exact in the trackers' single precision
    "contrast/base/nll_per_token": 0.25,
    "contrast/base/exact_pass_at_k.1": 0.5,
    "contrast/base/greedy/wer": 0.75,
    "contrast/rl/greedy/wer": 0.5,
    "contrast/primary/difference": -0.25,
    "contrast/primary/ci_low": -0.5,
    "contrast/primary/ci_high": 0.125,
    "contrast/primary/p_value": 0.0625,
}
COLUMNS = ["step", "prompt", "completion", "shares_letters", "short", "total", "advantage"]


def short(completion: str) -> float | None:
    """1 for a completion of at most two words; of the word b it has no opinion."""
    return None if "b" in completion.split() else float(len(completion.split()) <= 2)


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_the_settings(monkeypatch):
    from transformers.integrations import integration_utils

    with pytest.raises(ConfigError, match=r"--report_to is 'wanbd'; expected one of .*Did you mean 'wandb'\?"):
        GRPOConfig(report_to="wanbd")
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    said = r"--report_to trackio needs trackio, which is not installed: pip install 'rlseq\[tracking\]'"
    with pytest.raises(ConfigError, match=said):
        SFTConfig(report_to=["tensorboard", "trackio"])
    assert GRPOConfig(report_to="tensorboard").report_to == ["tensorboard"]
    assert GRPOConfig().report_to == []


def trainer_for(path, report_to, **settings):
    """A tiny GRPO run that logs every step, evaluates at steps 2 and 4, and logs completions."""
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "scale_rewards": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_completions": True,
        "num_completions_to_print": 1,
        "report_to": report_to,
    }
    if settings.get("eval_strategy") == "no":
        del defaults["eval_steps"]
    tokenizer = tiny_tokenizer()
    return GRPOTrainer(
        tiny_model("llama", initializer_range=0.1),
        [shares_letters, short],
        GRPOConfig(output_dir=str(path), **{**defaults, **settings}),
        build_prompts(ROWS, tokenizer),
        processing_class=tokenizer,
        rollouts_dir=path / "rollouts",
        evaluator=lambda model: {"quality": 0.5, "never_measured": NAN},
    )


def logged(trainer):
    """(name, step) -> value of all numbers the trainer logged, named as transformers names them for trackers."""
    found = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            if name not in ("step", "epoch") and not (line["step"] == 3 and "train_runtime" in line):
                found["eval/" + name[5:] if name.startswith("eval_") else "train/" + name, line["step"]] = value
    assert ("eval/quality", 2) in found and ("train/reward", 3) in found and len(found) > 60
    return found


def rollouts_of(path, step):
    return [json.loads(line) for line in (path / f"rollouts/{step:06d}.jsonl").read_text().split("\n") if line]


@pytest.fixture
def figure(tmp_path):
    """A picture of 2 × 3 pixels, each of its own colour."""
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    Image.fromarray(pixels).save(tmp_path / "plane.png")
    return tmp_path / "plane.png"


def check_table(rows, path, step):
    """A table of completions holds the step's rollouts; total and advantage by hand from the rewards beside them."""
    kept = rollouts_of(path, step)
    assert [row["completion"] for row in rows] == [one["completion"] for one in kept] and len(rows) == 8
    assert [row["prompt"] for row in rows] == [one["prompt"] for one in kept]
    totals = []
    for row, one in zip(rows, kept, strict=True):
        a, b = row["shares_letters"], row["short"]
        assert a == pytest.approx(one["values"]["shares_letters"], abs=1e-6)
        # Two rewards of weight 1: their sum, or twice the one that is there.
        unsaid = b is None or b == "NaN" or math.isnan(b)
        assert unsaid == ("b" in one["completion"].split())
        totals.append(2 * a if unsaid else a + b)
        assert row["total"] == pytest.approx(totals[-1], abs=1e-5)
    for start in (0, 4):  # groups of 4; unscaled, an advantage is the total minus the group's mean
        mean = sum(totals[start : start + 4]) / 4
        for i in range(start, start + 4):
            assert rows[i]["advantage"] == pytest.approx(totals[i] - mean, abs=1e-5)


def test_the_table_of_completions_has_what_was_optimised(tmp_path):
    import pandas

    trainer = trainer_for(tmp_path, "none", eval_strategy="no")
    trainer.train()
    unsaid = 0
    for step in (1, 2, 3):
        table = pandas.read_parquet(tmp_path / f"completions/completions_{step:05d}.parquet")
        assert list(table) == COLUMNS and set(table["step"]) == {step}
        check_table(table.to_dict("records"), tmp_path, step)
        unsaid += int(table["short"].isna().sum())
    assert unsaid > 0  # else nothing was asked of abstentions


def test_the_table_of_ppo_has_the_advantages_that_were_trained(tmp_path):
    import pandas

    trainer = tiny_ppo(tmp_path, log_completions=True, num_completions_to_print=1, max_steps=1)
    kept = {}
    compute = trainer.micro_batch_loss

    def spy(model, batch):
        kept.update(advantages=batch.advantages, mask=batch.mask)
        return compute(model, batch)

    trainer.micro_batch_loss = spy
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions/completions_00001.parquet")
    means = [row[mask].mean().item() for row, mask in zip(kept["advantages"], kept["mask"], strict=True)]
    assert max(map(abs, means)) > 0.01
    assert sorted(table["advantage"]) == pytest.approx(sorted(means), abs=1e-5)


def test_the_numbers_of_a_contrast_are_those_that_have_a_value():
    assert contrast_numbers(RESULTS) == NUMBERS
    undeclared = contrast_numbers(RESULTS | {"primary": None})
    assert undeclared == {name: value for name, value in NUMBERS.items() if "primary" not in name}
    assert contrast_numbers({}) == {}


def test_no_text_in_a_table_of_completions_is_markup():
    rows = [{"prompt": "a | b\n*c*", "advantage": 1 / 3}]
    assert markdown_table(rows) == "| prompt | advantage |\n| --- | --- |\n| a \\| b ⏎ \\*c\\* | 0.3333 |"


def events_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    return read


def test_tensorboard_gets_every_number_the_completions_and_the_contrast(tmp_path, figure):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: rlseq[tracking]")
    path = tmp_path / "run"
    trainer = trainer_for(path, "tensorboard")
    trainer.train()
    log_contrast(trainer, RESULTS, [figure, None, tmp_path / "absent.png"])
    (folder,) = (path / "runs").iterdir()
    read = events_in(folder)
    scalars = {(n, e.step): e.value for n in read.Tags()["scalars"] for e in read.Scalars(n)}
    for (name, step), value in logged(trainer).items():
        if value is None:  # every completion abstained: a gap
            assert (name, step) not in scalars
        else:
            assert scalars[name, step] == pytest.approx(value, rel=1e-6, nan_ok=True), (name, step)
    assert math.isnan(scalars["eval/never_measured", 2])
    assert {name: scalars[name, 3] for name in NUMBERS} == NUMBERS
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in read.Tensors("completions/text_summary")}
    assert list(texts) == [1, 2, 3]
    lines = texts[2].split("\n")
    assert lines[0] == "| prompt | completion | shares\\_letters | short | total | advantage |" and len(lines) == 2 + 8
    first = rollouts_of(path, 2)[0]
    assert lines[2].startswith(f"| {first['prompt']} | {first['completion']} |")
    assert lines[2].endswith(f"| {first['total']:.4g} | {first['advantage']:.4g} |")
    (image,) = read.Images("contrast/plane")
    (path / "back.png").write_bytes(image.encoded_image_string)
    assert image.step == 3
    assert np.array_equal(np.asarray(Image.open(path / "back.png")), np.asarray(Image.open(figure)))


def test_a_resumed_run_goes_on_at_its_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: rlseq[tracking]")
    quiet = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 1, "log_completions": False}
    quiet["num_completions_to_print"] = None  # it would have no effect, and is refused
    trainer_for(tmp_path, "none", max_steps=2, **quiet).train()
    trainer = trainer_for(tmp_path, "tensorboard", max_steps=4, **quiet)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log_contrast(trainer, RESULTS)
    (folder,) = (tmp_path / "runs").iterdir()
    read = events_in(folder)
    assert [e.step for e in read.Scalars("train/reward")] == [3, 4]
    assert [e.step for e in read.Scalars("contrast/rl/greedy/wer")] == [4]


def test_a_run_resumed_within_a_round_logs_no_table_until_it_samples_again(tmp_path):
    settings = {"eval_strategy": "no", "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, "none", max_steps=1, **settings).train()
    trainer = trainer_for(tmp_path, "none", max_steps=3, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {p.stem for p in (tmp_path / "completions").iterdir()} == {"completions_00001", "completions_00003"}


def wandb_records(file: Path):
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little of a block is left for another record's head
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            yield record


def test_wandb_gets_every_number_the_completions_and_the_contrast(tmp_path, monkeypatch, figure):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: rlseq[tracking]")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    path = tmp_path / "run"
    trainer = trainer_for(path, "wandb")
    try:
        trainer.train()
        log_contrast(trainer, RESULTS, [figure, None])
    finally:
        wandb.finish()
        wandb.teardown()  # its writer ends, and with it the file
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    found, tables = {}, {}
    for record in wandb_records(file):
        row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        step = row.get("train/global_step")
        found |= {(name, step): value for name, value in row.items()}
        if "completions.path" in row:
            tables[len(tables) + 1] = row["completions.path"]
    for (name, step), value in logged(trainer).items():
        got = found[name, step]
        assert got == pytest.approx(value, rel=1e-6, nan_ok=True) or (value is None and got is None), (name, step)
    assert {name: found[name, 3] for name in NUMBERS} == NUMBERS
    assert found["contrast/plane.width", 3] == 3 and found["contrast/plane.height", 3] == 2
    assert list(tables) == [1, 2, 3]  # one a step, and none with the closing summary
    table = json.loads((folder / "files" / tables[2]).read_text())
    assert table["columns"] == COLUMNS
    check_table([dict(zip(COLUMNS, row, strict=True)) for row in table["data"]], path, 2)


def test_trackio_gets_every_number_the_completions_and_the_contrast(tmp_path, monkeypatch, figure):
    pytest.importorskip("trackio", reason="trackio is not installed: rlseq[tracking]")
    store = tmp_path / "trackio"
    store.mkdir()
    for name, module in list(sys.modules.items()):  # it reads TRACKIO_DIR once, when it is imported
        if name.partition(".")[0] == "trackio":
            for attribute, value in {"TRACKIO_DIR": store, "MEDIA_DIR": store / "media"}.items():
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, value)
    path = tmp_path / "run"
    trainer = trainer_for(path, "trackio", project="tiny")
    trainer.train()
    log_contrast(trainer, RESULTS, [figure, None])
    (file,) = store.glob("tiny*.db")
    with sqlite3.connect(file) as database:
        lines = list(database.execute("select run_name, metrics from metrics order by id"))
    assert len({run for run, _ in lines}) == 1  # the contrast is in the run, not in another
    rows = [json.loads(metrics) for _, metrics in lines]
    found = {(name, row.get("train/global_step")): value for row in rows for name, value in row.items()}
    for (name, step), value in logged(trainer).items():
        got = float("nan") if found[name, step] == "NaN" else found[name, step]
        assert got == pytest.approx(value, rel=1e-6, nan_ok=True) or (value is None and got is None), (name, step)
    assert {name: found[name, 3] for name in NUMBERS} == NUMBERS
    picture = next((store / "media").rglob(f"*{Path(found['contrast/plane', 3]['file_path']).name}"))
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(figure)))
    tables = [row["completions"]["_value"] for row in rows if "completions" in row]
    assert len(tables) == 3
    check_table(tables[1], path, 2)


def test_without_a_tracker_nothing_is_logged(tmp_path, figure):
    trainer = trainer_for(tmp_path / "run", "none", max_steps=1, eval_strategy="no")
    trainer.train()
    log_contrast(trainer, RESULTS, [figure])
    assert not (tmp_path / "run" / "runs").exists()
