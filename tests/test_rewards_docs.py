"""docs/rewards.md, run: its files are written, its sessions replayed, its tables compared with the code.

The table of docs/bundled-rewards.md is compared too.
"""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rlseq import load_rewards
from rlseq.cli.main import main
from rlseq.scoring.signatures import FIELDS
from rlseq.scoring.specs.find import bundled_folder
from rlseq.scoring.specs.options import OPTIONS
from rlseq.scoring.specs.reward_files import describe_file

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def table(heading, text=TEXT):
    """Rows of the first table whose header starts with these cells, as lists of cells."""
    lines = text[text.index(heading) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """A folder with the page's files, as the working directory."""
    for kind, block in BLOCKS:
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", block)[1]
            (tmp_path / name).write_text(block, encoding="utf-8")
        elif kind == "json":
            (tmp_path / "rollouts.jsonl").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_sessions_of_the_page_give_what_it_shows(page_folder):
    session = "\n".join(block for kind, block in BLOCKS if kind == "pycon")
    assert session.count(">>>") > 20
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(session, {}, "docs/rewards.md", str(PAGE), 0)
    said = []
    doctest.DocTestRunner(verbose=False, optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_yaml_of_the_page_loads(page_folder):
    blocks = [yaml.safe_load(block)["reward_funcs"] for kind, block in BLOCKS if kind == "yaml"]
    assert [load_rewards(block).names for block in blocks] == [["error_rate", "short"], ["llm_judge"]]


def test_the_commands_of_the_page_print_what_it_shows(page_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # the page's; the rule under a table's head is no wider than the terminal
    commands = [block.split("\n", 1) for kind, block in BLOCKS if kind == "console"]
    assert len(commands) == 3
    for line, expected in commands:
        arguments = shlex.split(line.removeprefix("$ rlseq "))
        code = main(arguments)
        printed = capsys.readouterr().out
        if expected.strip():
            assert (code, printed.split()) == (0, expected.split())
        else:
            assert code in (0, 1)
            assert "hackable by the maximum length?" in printed


def test_the_page_lists_every_bundled_reward_as_it_is():
    text = PAGE.with_name("bundled-rewards.md").read_text(encoding="utf-8")
    rows = {row[0].strip("`"): row[1:3] for row in table("| name | range | extra | value |", text)}
    for path in bundled_folder().glob("[!_]*.py"):
        about = describe_file(path)
        limits = "-" if about["range"] is None else "{:g} to {:g}".format(*about["range"])
        assert rows.pop(path.stem) == [limits, about["extra"] or ""]
    assert rows == {}


def test_the_page_lists_every_option_and_every_field():
    options = {name for row in table("| option | meaning | default |") for name in re.findall(r"`(\w+)`", row[0])}
    assert options == set(OPTIONS)
    fields = {name for row in table("| name | what it is |") for name in re.findall(r"`(\w+)`", row[0])}
    assert fields == {"prompt", *FIELDS}
