"""A file of another format version is refused in one line, by everything that reads it."""

import json
import re
from pathlib import Path

import pytest
from test_run_directory import make_checkpoint
from tiny_task import tiny_trainer

from rlseq.cli.main import main
from rlseq.cli.show import load_step
from rlseq.common import formats
from rlseq.config.commands import LoggedRowsArguments
from rlseq.config.parsing.parser import RecipeParser, write_config
from rlseq.config.training import DataArguments
from rlseq.errors import FormatError
from rlseq.evaluation.results.files import read_evaluation, read_jsonl
from rlseq.scoring import load_rewards
from rlseq.scoring.check.rows import with_columns
from rlseq.scoring.replay import read_rollouts
from rlseq.training.run.checkpoints import write_format
from rlseq.training.run.directory import check_available, prepare
from rlseq.training.run.inputs import check_unchanged, write

ROLLOUT = {"step": 1, "prompt_key": "a", "sample": 0, "prompt": "a", "completion": "b", "total": 1.0}


def test_a_format_reads_its_own_version_and_the_older_ones_that_it_names():
    log = formats.Format("log", version=3, oldest=2, remedy="Train again")
    for found in (2, 3):
        log.check({"format_version": found}, "log.jsonl")
    for record, said in (({"format_version": 1}, "1"), ({"format_version": 4}, "4"), ({}, "0"), ([], "0")):
        with pytest.raises(FormatError, match=rf"^log.jsonl is a log of format version {said}; rlseq .* reads 2 to 3"):
            log.check(record, "log.jsonl")
    for found in ("3", True, None, 2.5):
        with pytest.raises(FormatError, match=r"\. Train again, or use the rlseq that wrote it\.$"):
            log.check({"format_version": found}, "log.jsonl")
    assert log.stamp({"a": 1, "format_version": 2}) == {"a": 1, "format_version": 3}


@pytest.fixture
def run_directory(tmp_path):
    """A run that was stopped at step 2, without versions, as one before them is."""
    write_format(make_checkpoint(tmp_path, 2))
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/000001.jsonl").write_text(json.dumps(ROLLOUT) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (tmp_path / "config.yaml").write_text("dataset_name: words.json\n")
    return tmp_path


def newer(file):
    """The same file, of a version to come."""
    if file.suffix == ".yaml":
        file.write_text(f"format_version: 99\n{file.read_text()}")
        return
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**record, "format_version": 99}) + "\n" for record in lines))


def resume(path):
    return prepare(path, resume="latest", overwrite=False, main_process=True)


def replay(path):
    return with_columns(load_rewards(["constant"]), read_rollouts(path), path, LoggedRowsArguments())


READERS = {
    "rlseq show": ("rollouts/000001.jsonl", load_step),
    "a replay": ("rollouts/000001.jsonl", read_rollouts),
    "resuming, of the rollouts": ("rollouts/000001.jsonl", resume),
    "resuming, of the metrics": ("metrics.jsonl", resume),
    "resuming, of the checkpoint": ("checkpoint-2/resume_state/format.json", resume),
    "resuming, of the settings": ("config.yaml", resume),
    "--config": ("config.yaml", lambda path: RecipeParser([DataArguments]).parse(["--config", f"{path}/config.yaml"])),
    "a replay, of the settings": ("config.yaml", replay),
    "a dry run": (
        "checkpoint-2/resume_state/format.json",
        lambda path: check_available(path, resume="latest", overwrite=False),
    ),
    "the curves of a report": ("metrics.jsonl", lambda path: read_jsonl(path / "metrics.jsonl", formats.METRICS)),
}


@pytest.mark.parametrize("name", READERS)
def test_who_reads_a_file_of_a_run_refuses_a_newer_one_and_takes_one_without_a_version(run_directory, name):
    file, read = READERS[name]
    found = read(run_directory)
    if hasattr(found, "release"):
        found.release()
    newer(run_directory / file)
    before = {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file()}
    with pytest.raises(FormatError, match=r"of format version 99; rlseq .* reads (0 to 1|3)\. (Run|Start) the .*again"):
        read(run_directory)
    assert before == {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file()}


def test_the_command_says_it_in_one_line(run_directory, capsys):
    newer(run_directory / "rollouts/000001.jsonl")
    assert main(["show", str(run_directory)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "000001.jsonl is a rollout log of format version 99" in line


def test_what_a_run_started_with_has_a_version(tmp_path):
    rows = {"training rows": {"count": 1, "rows": "01234567"}}
    write(tmp_path, rows)
    assert json.loads((tmp_path / "run_inputs.json").read_text())["format_version"] == 1
    assert check_unchanged(tmp_path, rows, accepted=False) is None
    record = json.loads((tmp_path / "run_inputs.json").read_text())
    (tmp_path / "run_inputs.json").write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(FormatError, match=r"run_inputs.json is a record of .* of format version 2"):
        check_unchanged(tmp_path, rows, accepted=True)


def test_the_settings_of_a_run_have_a_version_and_repeat_it(tmp_path):
    file = tmp_path / "config.yaml"
    write_config(file, DataArguments(train_rows=3))
    assert "format_version: 1" in file.read_text().splitlines()
    assert RecipeParser([DataArguments]).parse(["--config", str(file)]) == (DataArguments(train_rows=3),)


def test_an_evaluation_without_a_version_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FormatError, match=r"results.json is a result of .* version 0; rlseq .* reads 4. Evaluate"):
        read_evaluation(tmp_path)


def test_a_run_writes_the_versions_and_its_checkpoint_is_refused_where_they_are_newer(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (log,) = (tmp_path / "rollouts").iterdir()
    assert {json.loads(line)["format_version"] for line in log.read_text().splitlines()} == {1}
    file = tmp_path / "checkpoint-1/resume_state/format.json"
    assert json.loads(file.read_text()) == {"format_version": 3}
    newer(file)
    with pytest.raises(FormatError, match="checkpoint-1 is a checkpoint of format version 99"):
        tiny_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    file.unlink()
    with pytest.raises(FormatError, match=r"checkpoint-1 is a checkpoint of format version 0; rlseq .* reads 3"):
        tiny_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_the_table_of_the_docs_has_the_versions_of_the_code():
    page = (Path(__file__).parents[2] / "docs/reliability.md").read_text(encoding="utf-8")
    table = page.partition("## Format versions")[2]
    rows = re.findall(r"^\| .* \| `(\w+)` \| (\d+) \| (\d+)(?: to (\d+))? \|$", table, re.M)
    written = [
        (f.key, str(f.version), str(f.oldest), "" if f.oldest == f.version else str(f.version))
        for f in (
            *(formats.ROLLOUTS, formats.METRICS, formats.RUN_CONFIG, formats.RUN_INPUTS),
            *(formats.CHECKPOINT, formats.RESULTS, formats.PARTIAL_RESULTS),
        )
    ]
    assert rows == written
