"""What a model or a data set says is data: never markup, never a path, never code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from test_report import HOSTILE
from tiny_task import ROWS, tiny_trainer

from rlseq.errors import ConfigError
from rlseq.evaluation import plots
from rlseq.training.config import GRPOConfig, PPOConfig, SFTConfig
from rlseq.training.models import load_tokenizer

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "rlseq").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])


def calls():
    """(file, call) of every call in the package and the recipes."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, node


def keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def test_every_torch_load_is_of_weights_only():
    found = [call for _, call in calls() if ast.unparse(call.func) == "torch.load"]
    assert found and all(is_true(keywords(call).get("weights_only")) for call in found)


def test_models_load_from_safetensors_alone():
    loading = []
    for file, call in calls():
        loads = re.fullmatch(r"(AutoModel\w*|causal_class\(\w+\))\.from_pretrained", ast.unparse(call.func))
        first = ast.unparse(call.args[0]) if call.args else ""
        handed_on = re.fullmatch(r"AutoModel\w*", first) or (ast.unparse(call.func), first) == ("_load", "kind")
        saved_before = file.parts[-2:] == ("doctor", "forward.py")  # a folder that it wrote itself
        if (loads or handed_on) and not saved_before:
            loading.append((file, call))
    assert len(loading) >= 5
    for file, call in loading:
        assert is_true(keywords(call).get("use_safetensors")), f"{file}: {ast.unparse(call)}"


def test_no_code_of_a_models_repository_runs_unless_asked():
    for file, call in calls():
        given = keywords(call).get("trust_remote_code")
        assert given is None or not is_true(given), file
    for settings in (GRPOConfig, PPOConfig, SFTConfig):
        assert {field.name: field.default for field in dataclasses.fields(settings)}["trust_remote_code"] is False
        with pytest.raises(ConfigError, match="trust_remote_code is not served"):
            settings(trust_remote_code=True)
    assert inspect.signature(load_tokenizer).parameters["trust_remote_code"].default is False


def test_the_label_of_a_figure_is_text(tmp_path):
    from html.parser import HTMLParser

    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=HOSTILE)
    axes.set_title(HOSTILE)
    axes.legend()
    tags, labels = [], []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            labels.extend(value for name, value in attributes if name == "aria-label")
            assert not any(name.startswith("on") for name, _ in attributes)

    svg = plots.inline_svg(plots.to_svg(figure), "figure", '" onload="alert(1)" ' + HOSTILE)
    Tags().feed(svg)
    assert "svg" in tags and "script" not in tags and "img" not in tags and "b" not in tags
    assert labels == ['" onload="alert(1)" ' + HOSTILE]


def test_names_in_the_data_do_not_become_paths(tmp_path):
    rows = [{**row, "id": "../../x", "key": "/etc/x", "name": f"../{i}"} for i, row in enumerate(ROWS)]
    trainer = tiny_trainer(tmp_path / "a" / "b" / "run", rows=rows, max_steps=1, report_to="none")
    trainer.prompts[:] = [dataclasses.replace(p, key=f"../../{p.key}") for p in trainer.prompts]
    trainer.train()
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert written == ["a/b/run/rollouts/000001.jsonl"]
    assert "../../" in (tmp_path / written[0]).read_text()
