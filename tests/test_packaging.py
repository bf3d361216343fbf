"""What is installed: the wheel's contents and metadata, the types it declares, and a clean start from it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlseq
from rlseq.cli.main import Parser
from rlseq.config.arguments import DataArguments, EvaluateArguments
from rlseq.config.parsing.flags import add_flags, from_flags
from rlseq.config.parsing.parser import RecipeParser
from rlseq.config.parsing.yaml_file import bundled_paths, find_config
from rlseq.scoring.specs.find import bundled_folder
from rlseq.scoring.specs.reward_files import describe_file

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
NAMED = [*map(Requirement, PROJECT["dependencies"]), *(r for extra in EXTRAS.values() for r in extra)]
OTHERS = [requirement for requirement in NAMED if requirement.name != "rlseq"]  # dev names rlseq's own extras


def files_under(folder: Path) -> set[str]:
    """Paths in a folder, without what Python compiles there."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_the_bundled_rewards_and_recipes():
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="the build backend, of the extra dev, is absent")
    held = [file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()]
    expected = {f"rlseq/{name}" for name in files_under(ROOT / "rlseq")}
    for folder in ("rewards", "recipes"):
        expected |= {f"rlseq/bundled/{folder}/{name}" for name in files_under(ROOT / folder)}
    assert sorted(held) == sorted(expected)
    for name in ("py.typed", "bundled/rewards/phoneme_accuracy.py", "bundled/recipes/g2p/base/model.safetensors"):
        assert f"rlseq/{name}" in held


def test_a_path_of_the_bundled_recipes_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("recipes/g2p/grpo.yaml") == ROOT / "recipes/g2p/grpo.yaml"
    own = ["recipes/none", "runs/g2p-grpo", "phoneme_accuracy", "a/b=recipes/g2p/base", 0.5]
    settings = {
        "models": ["base=recipes/g2p/base", "recipes/g2p/half-base", *own],
        "new_tokenizer": "recipes/g2p/data.py:build_tokenizer",
        "reward_funcs": [{"func": "brevity", "kwargs": {"path": "recipes/g2p/base"}}],
        "output_dir": "recipes/g2p/base",
        "temperature": 0.5,
    }
    assert bundled_paths(settings) == {
        "models": [f"base={ROOT}/recipes/g2p/base", f"{ROOT}/recipes/g2p/half-base", *own],
        "new_tokenizer": f"{ROOT}/recipes/g2p/data.py:build_tokenizer",
        "reward_funcs": [{"func": "brevity", "kwargs": {"path": f"{ROOT}/recipes/g2p/base"}}],
        "output_dir": "recipes/g2p/base",
        "temperature": 0.5,
    }


def test_flags_and_an_own_config_find_the_bundled_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("train_split: words\ndataset_name: recipes/g2p/data.py\n")
    flags = ["--config", "own.yaml", "--models", "base=recipes/g2p/base"]
    types = (EvaluateArguments, DataArguments)
    add_flags(command := Parser(), types)
    for parsed in (RecipeParser(types).parse(flags), from_flags(types, command.parse_args(flags))):
        assert parsed[0].models == [f"base={ROOT}/recipes/g2p/base"]
        assert (parsed[1].dataset_name, parsed[1].train_split) == (f"{ROOT}/recipes/g2p/data.py", "words")


def test_the_working_directorys_own_recipes_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/g2p/base").mkdir(parents=True)
    (tmp_path / "recipes/g2p/grpo.yaml").touch()
    assert find_config("recipes/g2p/grpo.yaml") == Path("recipes/g2p/grpo.yaml")
    assert bundled_paths({"model_name_or_path": "recipes/g2p/base"}) == {"model_name_or_path": "recipes/g2p/base"}


def test_every_extra_that_a_reward_asks_for_is_offered():
    asked = {describe_file(path)["extra"] for path in bundled_folder().glob("[!_]*.py")} - {None}
    assert asked and asked <= set(EXTRAS)
    assert {"g2p", "text", "math", "judge", "code", "tracking", "dev"} <= set(EXTRAS)


def test_dev_takes_every_other_extra():
    (own,) = [requirement for requirement in EXTRAS["dev"] if requirement.name == "rlseq"]
    assert own.extras | {"dev"} == set(EXTRAS)


def test_every_dependency_is_pinned_within_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in OTHERS:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement}: constraints.txt has {version}"


def test_only_trl_whose_inside_is_relied_on_has_an_upper_bound():
    bounded = {r.name for r in OTHERS if any(s.operator not in (">=", "!=") for s in r.specifier)}
    assert bounded == {"trl"}


def test_the_public_modules_pass_a_type_checker():
    pytest.importorskip("mypy", reason="mypy, of the extra dev, is absent")
    ended = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_public_names_have_the_types_of_what_they_load(tmp_path):
    pytest.importorskip("mypy", reason="mypy, of the extra dev, is absent")
    names = [name for name in rlseq.__all__ if name != "__version__"]
    wrong = {  # call: what is wrong with it
        "rlseq.smaple": "attr-defined",
        "rlseq.Greedy('x')": "call-arg",
        "rlseq.load_rewards(3)": "arg-type",
        "rlseq.PPOConfig(critic='both')": "arg-type",
        "rlseq.load_rewards(['exact_match']).score([], {}).no": "attr-defined",
    }
    right = ["rlseq.load_rewards(['exact_match']).score([], {})", "rlseq.PPOConfig(critic='shared', learning_rate=0.1)"]
    lines = ["import rlseq", *(f"reveal_type(rlseq.{name})" for name in names), *wrong, *right]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    mypy = [sys.executable, "-m", "mypy", "--no-error-summary", tmp_path / "user.py"]
    ended = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
    said = re.findall(r"user\.py:(\d+): (?:note: Revealed type is |error: .*\[)(.*?)\]?$", ended.stdout, re.M)
    types = {name: dict(said)[str(i)] for i, name in enumerate(names, start=2)}
    assert all(kind.startswith(('"def (', '"Overload(def ')) for kind in types.values()), types  # "Any" is neither
    assert types["sample"].endswith('-> list[list[rlseq.types.Rollout]]"') and "num_samples: int" in types["sample"]
    errors = [(lines[int(line) - 1], code) for line, code in said[len(names) :]]
    assert errors == list(wrong.items()), ended.stdout


def test_what_a_type_checker_sees_is_what_is_loaded():
    (block,) = [
        node
        for node in ast.parse((ROOT / "rlseq/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in rlseq._PUBLIC.items()}


def test_two_messages_that_nobody_can_act_on_are_not_printed_and_others_are(tmp_path):
    script = (
        "import logging, rlseq\n"
        "from tiny import tiny_model\n"
        "import transformers.trainer\n"  # which imports peft, and that bitsandbytes
        "tiny_model().is_gradient_checkpointing\n"  # as TRL reads it
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s', 'why')\n"
        "log.warning('a word of its own')\n"
        "import warnings; warnings.warn('another is deprecated', FutureWarning)\n"
    )
    started = {"env": os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, "cwd": tmp_path}
    ended = subprocess.run([sys.executable, "-c", script], **started, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == ["a word of its own", "<string>:8: FutureWarning: another is deprecated"]


@pytest.mark.soak
def test_a_wheel_installed_in_a_fresh_environment_trains_and_evaluates_from_an_empty_folder(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend, of the extra dev, is absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words: object) -> str:
        ended = subprocess.run(list(map(str, words)), cwd=empty, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("rlseq-*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    call(*pip, "--python", python, "install", "--no-deps", wheel)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Everything else is this environment's, by a path of which Python reads no .pth: not that of this checkout.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    assert call(python, "-c", "import rlseq; print(rlseq.__file__)").strip() == str(site / "rlseq" / "__init__.py")
    assert "usage: rlseq COMMAND" in call(python.parent / "rlseq", "--help")
    listed = call(python.parent / "rlseq", "reward", "list")
    assert all(path.stem in listed for path in (ROOT / "rewards").glob("[!_]*.py"))
    for recipe in ("grpo", "evaluate"):
        assert "[--config FILE.yaml]" in call(python, "-m", f"rlseq.recipes.{recipe}", "--help")
    for recipe, options in (("grpo", []), ("ppo", ["--config", "recipes/g2p/ppo.yaml"]), ("sft", [])):
        sizes = call(python, "-m", f"rlseq.recipes.{recipe}", *options, "--dry_run", "true")
        assert "checkpoints on disk" in sizes
    launched = [python, "-m", "accelerate.commands.launch", "-m", "rlseq.recipes.grpo", "--dry_run", "true"]
    assert "checkpoints on disk" in call(*launched)
    assert list(empty.iterdir()) == []

    # A user's folder holds a reward, and then what the recipes, the bundled task and the bundled rewards make in it.
    (empty / "brevity.py").write_text("def brevity(completion):\n    return -float(len(completion.split()))\n")
    trained = call(
        *(python, "-m", "rlseq.recipes.grpo", "--reward_funcs", "phoneme_accuracy", "brevity.py:brevity"),
        *("--reward_weights", "1", "0.01", "--max_steps", "2", "--per_device_train_batch_size", "16"),
        *("--warmup_steps", "0", "--save_steps", "2", "--eval_strategy", "no", "--no_evaluate", "--output_dir", "run"),
    )
    assert "53,821 prompts" in trained
    rollouts = [json.loads(line) for line in (empty / "run/rollouts/000002.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 and set(rollouts[0]["values"]) == {"phoneme_accuracy", "brevity"}
    assert all(r["values"]["brevity"] == -len(r["completion"].split()) for r in rollouts)
    weights = [folder / "model.safetensors" for folder in (ROOT / "recipes/g2p/half-base", empty / "run")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert "Step 2: 16 rollouts of 2 prompts" in call(python.parent / "rlseq", "show", "run")
    replayed = call(python.parent / "rlseq", *"reward replay run --reward_funcs exact_match".split())
    assert ["exact_match", "1", "32"] in [line.split()[:3] for line in replayed.splitlines()]
    base = site / "rlseq/bundled/recipes/g2p/half-base"
    call(
        *(python, "-m", "rlseq.recipes.evaluate", "--config", "recipes/g2p/evaluate.yaml", "--output_dir", "contrast"),
        *("--models", f"base={base}", "rl=run", "--eval_rows", "20"),
    )
    results = json.loads((empty / "contrast/results.json").read_text())
    assert list(results["models"]) == ["base", "rl"] and results["rows"] == 20
    assert 0.7 < results["models"]["base"]["strategies"]["greedy"]["phoneme_accuracy"]["value"] <= 1.0
    assert "<html" in (empty / "contrast/report.html").read_text()
    assert {path.name for path in empty.iterdir()} - {"__pycache__"} == {"brevity.py", "run", "contrast"}
