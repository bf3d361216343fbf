"""From a spec to a function: names, files, modules, packages, models; and options that cannot work."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest
from tiny_rollouts import rollout, source_writer, values

from rlseq import load_rewards
from rlseq.cli.main import main
from rlseq.errors import RewardError
from rlseq.scoring import reward
from rlseq.scoring.specs import find


@pytest.fixture
def folder(tmp_path):
    return source_writer(tmp_path)


def test_kwargs_come_from_the_spec_and_a_wrong_one_is_named():
    def f(completion, bonus=0):
        return bonus

    assert values({"func": f, "kwargs": {"bonus": 2}}, ["a"]) == [2.0]
    with pytest.raises(RewardError, match=r"takes no argument 'bonsu'\. Did you mean 'bonus'"):
        load_rewards([{"func": f, "kwargs": {"bonsu": 2}}])


def test_on_the_command_line_a_mapping_is_json():
    suite = load_rewards(['{"func": "constant", "kwargs": {"value": 3}, "weight": 0.5}', "exact_match"])
    assert (suite.names, suite.weights) == (["constant", "exact_match"], [0.5, 1.0])
    assert suite.rewards[0].kwargs == {"value": 3}
    with pytest.raises(RewardError, match="both in the reward specs and in reward_weights"):
        load_rewards(['{"func": "constant", "weight": 0.5}'], weights=[1])
    with pytest.raises(RewardError, match="is not a JSON mapping: Expecting"):
        load_rewards(['{"func": "constant"'])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"func": "constant", "wieght": 2}, "Did you mean 'weight'"),
        ({"weight": 2}, "has no 'func'"),
        ({"func": "constant", "on_error": "ignore"}, "expected raise, abstain, floor"),
        ({"func": "constant", "on_error": "floor"}, "states no lowest value"),
        ({"func": "own_log_prob", "on_error": "floor"}, "states no lowest value"),
        ({"func": "constant", "timeout": 0}, "expected a finite number above 0"),
        ({"func": "constant", "timeout": math.inf}, "expected a finite number above 0"),
        ({"func": "constant", "on_error": "floor", "floor": math.nan}, "floor is nan; expected a finite number"),
        ({"func": "constant", "on_error": "floor", "floor": -math.inf}, "floor is -inf; expected a finite number"),
        ({"func": "constant", "workers": 0}, "at least 1"),
        ({"func": "constant", "retries": 1}, "are for async functions"),
        ({"func": "constant", "cache": 3}, "cache is 3"),
        ({"func": "constant", "scope": "row"}, "scope is 'row'"),
        ({"func": "constant", "kwargs": [1]}, "expected a mapping"),
        ({"func": "constant", "weight": "1"}, "expected a finite number"),
        ({"func": "constant", "weight": float("nan")}, "expected a finite number"),
        ({"func": lambda completion: 0, "name": "f", "timeout": 1}, "no worker process can find"),
        ("constnat", "Did you mean 'constant'"),
        ("no_such_package.rewards:f", "cannot import 'no_such_package.rewards'"),
        ("textwrap:dedant", "Did you mean 'dedent'"),
        ("missing.py:f", "there is no file"),
        (["constant"], "has no 'func'"),
    ],
)
def test_a_spec_that_cannot_work_says_why(spec, message):
    with pytest.raises(RewardError, match=message):
        load_rewards([spec])


def test_no_rewards_at_all_is_an_error():
    with pytest.raises(RewardError, match="no rewards were given"):
        load_rewards([])


def test_a_path_alone_serves_where_the_file_has_one_reward(folder):
    folder("mine/one.py", "from rlseq import reward\n@reward\ndef f(completion): return 1\ndef helper(x): return x\n")
    folder("mine/two.py", "def f(completion): return 1\ndef g(completion): return 2\n")
    folder("mine/named.py", "def named(completion): return 3\ndef g(completion): return 2\n")
    assert load_rewards(["mine/one.py"], search_root=folder.root).names == ["f"]
    assert values("mine/named.py", ["a"], search_root=folder.root) == [3.0]
    with pytest.raises(RewardError, match=r"has 2 rewards \(f, g\)"):
        load_rewards(["mine/two.py"], search_root=folder.root)
    with pytest.raises(RewardError, match=r"no function 'h'.*It has f, g"):
        load_rewards(["mine/two.py:h"], search_root=folder.root)


def test_rewards_beside_the_working_directory_are_found_by_name(folder):
    folder("rewards/kindness.py", "def kindness(completion): return 1.0\n")
    assert values("kindness", ["a"], search_root=folder.root) == [1.0]


def test_one_name_in_two_places_is_an_error_naming_both(folder):
    path = folder("rewards/exact_match.py", "def exact_match(completion): return 1.0\n")
    with pytest.raises(RewardError) as caught:
        load_rewards(["exact_match"], search_root=folder.root)
    assert str(path) in str(caught.value)
    assert str(find.bundled_folder() / "exact_match.py") in str(caught.value)


def test_the_bundled_folder_as_working_directory_is_no_second_place():
    assert load_rewards(["exact_match"], search_root=find.bundled_folder().parent).names == ["exact_match"]


def test_installed_packages_offer_rewards_by_entry_point(folder, monkeypatch):
    folder("kind_package.py", "def kind(completion): return 4.0\n")
    folder("kind_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: kind-package\nVersion: 1.0\n")
    folder("kind_package-1.0.dist-info/entry_points.txt", "[rlseq.rewards]\nkindly = kind_package:kind\n")
    monkeypatch.syspath_prepend(str(folder.root))
    suite = load_rewards(["kindly"])
    assert suite.names == ["kindly"]
    assert suite.score([rollout("a")], {"prompt": ["q"]}).totals == [4.0]


def test_loading_leaves_sys_path_alone_and_makes_no_module_called_rewards(folder):
    before = list(sys.path)
    path = folder("mine.py", "def f(completion): return 1\n")
    load_rewards(["exact_match", f"{path}:f"])
    assert sys.path == before
    assert "rewards" not in sys.modules
    assert "mine" not in sys.modules


def test_an_installed_wheel_finds_the_bundled_rewards_and_installs_no_module_called_rewards(folder):
    # what the wheel's force-include makes: rlseq/bundled/rewards inside the package, nothing beside it
    package = find.bundled_folder().parent / "rlseq"
    site = folder.root / "site"
    shutil.copytree(package, site / "rlseq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(find.bundled_folder(), site / "rlseq" / "bundled" / "rewards")
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from rlseq import load_rewards; from rlseq.scoring.specs.find import find; from pathlib import Path\n"
        "print(find('exact_match', Path('/nowhere')).address)\n"
        "suite = load_rewards([{'func': 'exact_match', 'timeout': 20}], search_root='/nowhere')\n"
        "import importlib.util; print(importlib.util.find_spec('rewards'))"
    )
    ended = subprocess.run([sys.executable, "-S", "-P", "-c", script], capture_output=True, text=True, cwd=folder.root)
    assert ended.returncode == 0, ended.stderr
    address, spec = ended.stdout.split()
    assert address == f"{site / 'rlseq' / 'bundled' / 'rewards' / 'exact_match.py'}:exact_match"
    assert spec == "None"


def test_a_changed_file_is_loaded_afresh(folder):
    path = folder("mine.py", "def f(completion): return 1\n")
    first = load_rewards([f"{path}:f"])
    folder("mine.py", "def f(completion): return 2\n")
    second = load_rewards([f"{path}:f"])
    assert second.score([rollout("a")], {"prompt": ["q"]}).totals == [2.0]
    assert first.fingerprint() != second.fingerprint()


def test_a_missing_extra_is_named_with_the_command_that_installs_it(folder):
    source = "import no_such_library\nfrom rlseq import reward\n@reward(extra='text')\ndef f(completion): return 1\n"
    path = folder("mine.py", source)
    with pytest.raises(RewardError, match=r"needs the extra 'text': pip install 'rlseq\[text\]'"):
        load_rewards([f"{path}:f"])


def test_a_helper_beside_the_file_is_explained(folder):
    folder("helper.py", "")
    path = folder("mine.py", "import helper\ndef f(completion): return 1\n")
    with pytest.raises(RewardError, match="imports 'helper', which is in the same folder"):
        load_rewards([f"{path}:f"])


def test_a_file_that_fails_on_import_says_so(folder):
    path = folder("mine.py", "1 / 0\n")
    with pytest.raises(RewardError, match=r"mine\.py fails when imported: ZeroDivisionError"):
        load_rewards([str(path)])


POOLS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

@dataclass
class Letters:
    text: str

def count(letters):
    return len(letters.text)

def pool(completion):
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.map_async(count, [Letters(completion)]).get(timeout=60)[0]

def executor(completion):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        return processes.submit(pool, completion).result(timeout=60)
"""


@pytest.mark.parametrize("workers", [{}, {"workers": 1}], ids=["here", "in a worker"])
@pytest.mark.parametrize("function", ["pool", "executor"])
def test_processes_that_a_reward_file_spawns_find_its_functions_and_classes(folder, function, workers):
    path = folder("pools.py", POOLS)
    with load_rewards([{"func": f"{path}:{function}", **workers}]) as suite:
        path.unlink()  # they run what was loaded
        assert suite.score([rollout("abc")], {"prompt": ["q"]}).totals == [3.0]


@pytest.mark.parametrize("recipe", ["evaluate", "grpo", "ppo", "sft"])
def test_spawned_processes_of_a_recipe_import_neither_torch_nor_trl(recipe):
    code = f"import runpy, sys; runpy.run_path('recipes/{recipe}.py', run_name='__mp_main__')"
    code += "; sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_decorator_gives_back_the_function_itself():
    def f(completion):
        return 1

    assert reward(f) is f
    assert reward(range=(0, 1))(f) is f
    with pytest.raises(RewardError, match=r"Did you mean 'group'"):
        reward(scope="groups")
    with pytest.raises(RewardError, match="expected \\(lowest, highest\\)"):
        reward(range=(1, 0))


def offer(folder, package, value="{}:kind", name="kindly"):
    """Install a package that offers a reward, by its metadata alone."""
    source = "from rlseq import reward\n@reward(range=(0, 4), extra='text')\ndef kind(completion):\n"
    folder(f"{package}.py", f'{source}    """How kind it is."""\n    return 4.0\n')
    info = f"{package}-1.0.dist-info"
    folder(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    folder(f"{info}/entry_points.txt", f"[rlseq.rewards]\n{name} = {value.format(package)}\n")


def test_two_packages_with_one_name_are_an_error_naming_both(folder, monkeypatch, capsys):
    offer(folder, "first_package")
    offer(folder, "second_package")
    monkeypatch.syspath_prepend(str(folder.root))
    with pytest.raises(RewardError) as caught:
        load_rewards(["kindly"])
    assert "first_package:kind of the package first_package" in str(caught.value)
    assert "second_package:kind of the package second_package" in str(caught.value)
    assert main(["reward", "list"]) == 0
    assert capsys.readouterr().out.count("\nkindly ") == 2


def test_a_package_and_a_file_with_one_name_are_an_error_naming_both(folder, monkeypatch):
    offer(folder, "first_package", name="exact_match")
    monkeypatch.syspath_prepend(str(folder.root))
    with pytest.raises(RewardError, match=r"exact_match\.py and entry point first_package:kind"):
        load_rewards(["exact_match"])


def test_list_describes_what_packages_offer_without_running_it(folder, monkeypatch, capsys):
    offer(folder, "listed_package")
    offer(folder, "broken_package", value="{}.missing:f", name="broken")
    monkeypatch.syspath_prepend(str(folder.root))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    said = "kindly 0 to 4 text How kind it is. [listed_package:kind of the package listed_package]"
    assert lines["kindly"].split() == said.split()
    assert "broken_package.missing:f" in lines["broken"]
    assert "listed_package" not in sys.modules
    with pytest.raises(RewardError, match=r"cannot import 'broken_package\.missing'"):
        load_rewards(["broken"])


def test_an_entry_point_without_a_function_says_so(folder, monkeypatch):
    offer(folder, "kind_package", value="{}")
    monkeypatch.syspath_prepend(str(folder.root))
    with pytest.raises(RewardError, match=r"names no function; expected module:function"):
        load_rewards(["kindly"])


def test_a_copy_of_the_bundled_rewards_as_working_directory_is_no_second_place(folder):
    shutil.copytree(find.bundled_folder(), folder.root / "rewards")
    assert load_rewards(["exact_match"], search_root=folder.root).names == ["exact_match"]
    path = folder("rewards/exact_match.py", "def exact_match(completion): return 1.0\n")  # changed: which is meant?
    with pytest.raises(RewardError, match="found in two places") as caught:
        load_rewards(["exact_match"], search_root=folder.root)
    assert str(path) in str(caught.value)


def test_a_model_folder_with_the_name_of_a_reward_is_an_error_naming_both(folder):
    folder("exact_match/config.json", "{}")
    with pytest.raises(RewardError, match=r"found in two places: .*exact_match\.py and model .*exact_match"):
        load_rewards(["exact_match"], search_root=folder.root)


@pytest.mark.parametrize("spec", ["/nowhere/model", "./model", "../model", "~/no-such-model", "a/b/c"])
def test_a_model_folder_that_does_not_exist_is_not_asked_for_at_the_hub(folder, spec):
    with pytest.raises(RewardError, match=r"is not a model: .* does not exist"):
        load_rewards([spec], search_root=folder.root)


def test_a_folder_that_is_no_model_says_so(folder):
    folder("runs/model/notes.txt", "")
    with pytest.raises(RewardError, match=r"is not a model: .*runs/model has no config\.json"):
        load_rewards(["runs/model"], search_root=folder.root)


def test_a_model_id_or_path_is_a_reward_model_named_after_it(folder, monkeypatch):
    folder("home/scorer/config.json", "{}")
    monkeypatch.setenv("HOME", str(folder.root / "home"))
    path = str(folder.root / "home" / "scorer")
    for spec, name, model in [
        ("some-org/some-model", "some-model", "some-org/some-model"),
        ("~/scorer", "scorer", path),
    ]:
        found = find.find(spec, folder.root)
        assert (found.name, found.kwargs) == (name, {"model": model})
        assert found.function.__name__ == "reward_model"
