"""What a model or a data set says is data: never markup, never a path, never code."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_report import HOSTILE
from tiny_task import ROWS, tiny_tokenizer, tiny_trainer

from rlseq.config.training import GRPOConfig, PPOConfig, SFTConfig
from rlseq.errors import ConfigError, ModelError
from rlseq.evaluation.measure.loading import load_checkpoint
from rlseq.evaluation.report import plots
from rlseq.training.models import load_tokenizer

ROOT = Path(__file__).parent.parent
FOLDERS = ("rlseq", "recipes", "rewards", "benchmarks")
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


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


def loading_calls():
    """(file, call) of every call that reads what somebody saved: models, configurations, tokenizers, adapters."""
    names = ("from_pretrained", "from_config")
    return [(file, call) for file, call in calls() if getattr(call.func, "attr", None) in names]


def test_models_load_from_safetensors_alone():
    loading = []
    for file, call in loading_calls():
        model = re.fullmatch(
            r"(AutoModel(ForCausalLM)?|causal_class\(\w+\)|kind)\.from_pretrained", ast.unparse(call.func)
        )
        saved_before = file.parts[-2:] == ("doctor", "forward.py")  # a folder that it wrote itself
        if model and not saved_before:
            loading.append((file, call))
    assert len(loading) >= 2
    for file, call in loading:
        assert is_true(keywords(call).get("use_safetensors")), f"{file}: {ast.unparse(call)}"
    package = [file for file, _ in loading if not file.is_relative_to(ROOT / "benchmarks")]
    assert package == [ROOT / "rlseq/engine/model/load.py"]  # the one loader, of rewards and recipes too


def test_every_call_that_loads_refuses_code_of_the_repository():
    assert len(loading_calls()) >= 10
    for file, call in loading_calls():
        given = keywords(call).get("trust_remote_code")
        assert isinstance(given, ast.Constant) and given.value is False, f"{file}: {ast.unparse(call)}"


def test_no_settings_let_code_of_a_models_repository_run():
    for settings in (GRPOConfig, PPOConfig, SFTConfig):
        assert {field.name: field.default for field in dataclasses.fields(settings)}["trust_remote_code"] is False
        with pytest.raises(ConfigError, match="trust_remote_code is not served"):
            settings(trust_remote_code=True)


@pytest.mark.parametrize("named", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_code_of_a_repository_does_not_run_though_the_answer_is_yes(tmp_path, monkeypatch, named):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    file = tmp_path / ("tokenizer_config.json" if named == "AutoTokenizer" else "config.json")
    saved = json.loads(file.read_text()) | {"tokenizer_class": "Own"}
    saved["model_type"] = (
        "own" if named == "AutoConfig" else "vit"
    )  # a kind without text, but for the repository's code
    saved["auto_map"] = {named: ["own.Own", None] if named == "AutoTokenizer" else "own.Own"}
    file.write_text(json.dumps(saved))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if named == "AutoTokenizer":
        with contextlib.suppress(ModelError):  # the class that wrote tokenizer.json may do without the code
            load_tokenizer(str(tmp_path))
    else:
        with pytest.raises(ModelError, match="needs code of its repository, which rlseq does not run"):
            load_checkpoint("it", str(tmp_path))
    assert not (tmp_path / "ran").exists()


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
