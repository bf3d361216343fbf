"""Rewards written for another library, recognised by what they do with their arguments."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

THROUGH = ("reversed", "list", "tuple", "enumerate", "filter", "sorted")


def reads_messages(function: Callable, argument: str = "completion") -> bool:
    """Whether a reward reads `completion` as a list of messages, as verifiers' rewards do, and not as text.

    That is certain from its source where it takes the items of `completion` by name (`completion[-1]["content"]`, `for
    message in completion: message.get("role")`) or asks whether `completion` is a list: text has no such items. The
    functions and methods to which it passes `completion`, or a message of it, are followed. One of these that asks
    whether it was given text takes both.
    """
    return _reads(function, {argument}, set(), set())


def _reads(function: Callable, names: set[str], turns: set[str], seen: set[int]) -> bool:
    """Whether a function reads the messages that `names` hold (lists) and `turns` hold (one of them)."""
    function = _routine(function)
    tree = _source_tree(function)
    if tree is None:
        return False
    for node in ast.walk(tree):  # what is made of it by slices and filters, too: replies = completion[1:]
        if isinstance(node, ast.Assign) and _is_turns(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    loops = list(_loops(tree))
    turns |= {name for iterated, target in loops if _is_turns(iterated, names) for name in _names(target)}
    if seen and any(_asked_kinds(node, names | turns) & {"str"} for node in ast.walk(tree)):
        return False
    seen.add(id(function))
    for node in ast.walk(tree):
        kinds = _asked_kinds(node, names)
        if "list" in kinds and "str" not in kinds:
            return True
        if isinstance(node, ast.Subscript) and _is_turn(node.value, names, turns) and _is_text(node.slice):
            return True
        if isinstance(node, ast.Call) and node.args and _is_text(node.args[0]):
            looked_up = node.func  # m.get("role"), getattr(m, "get", ...)("role")
            if isinstance(looked_up, ast.Attribute) and looked_up.attr == "get":
                looked_up = looked_up.value
            elif isinstance(looked_up, ast.Call) and _called(looked_up) == "getattr" and looked_up.args:
                looked_up = looked_up.args[0]
            if looked_up is not node.func and _is_turn(looked_up, names, turns):
                return True
        if isinstance(node, ast.Call) and _passed_on(function, node, names, turns, seen):
            return True
    return False


def _asked_kinds(node: ast.AST, names: set[str]) -> set[str]:
    """The types that an isinstance() of one of these names asks for."""
    if not (isinstance(node, ast.Call) and _called(node) == "isinstance" and len(node.args) == 2):
        return set()
    return {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} if _is_name(node.args[0], names) else set()


def _passed_on(function: Callable, call: ast.Call, names: set[str], turns: set[str], seen: set[int]) -> bool:
    """Whether a call passes the messages, or one of them, to a function that reads them."""
    given: list[tuple[int | str, ast.expr]] = [*enumerate(call.args), *((k.arg or "", k.value) for k in call.keywords)]
    lists = [place for place, node in given if _is_turns(node, names)]
    single = [place for place, node in given if _is_turn(node, names, turns)]
    helper = _resolve(function, call.func) if lists or single else None
    if helper is None or id(_routine(helper)) in seen:
        return False
    try:
        parameters = list(inspect.signature(helper).parameters)
    except (TypeError, ValueError):
        return False
    messages, message = (
        {str(parameters[place]) if isinstance(place, int) else place for place in places if _has(parameters, place)}
        for places in (lists, single)
    )
    return bool(messages or message) and _reads(helper, messages, message, seen)


def _has(parameters: list[str], place: int | str) -> bool:
    return place < len(parameters) if isinstance(place, int) else place in parameters


def _resolve(function: Any, node: ast.expr) -> Any:
    """What a name, or a chain of attributes, in a function's source means; no code runs for it."""
    if isinstance(node, ast.Name):
        code = getattr(function, "__code__", None)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False) if code else ()
        known = {**getattr(function, "__globals__", {}), **{name: cell for name, cell in cells}}
        found = known.get(node.id)
        if isinstance(found, types.CellType):
            found = _content(found)
        if node.id == "self" and inspect.ismethod(function):
            found = function.__self__
        return found
    if isinstance(node, ast.Attribute):
        owner = _resolve(function, node.value)
        if owner is None:
            return None
        found = inspect.getattr_static(owner, node.attr, None)
        if isinstance(found, (staticmethod, classmethod)) or (
            inspect.isfunction(found)
            and not inspect.ismodule(owner)
            and node.attr not in getattr(owner, "__dict__", {})
        ):
            found = found.__get__(owner, type(owner))
        return found
    return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been put there yet
        return None


def _routine(function: Any) -> Any:
    """The function or method that a call of it runs."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) else function.__call__


def _source_tree(function: Callable) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or a lambda in the middle of a line
        return None


def _loops(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            yield node.iter, node.target


def _is_turns(node: ast.expr, names: set[str]) -> bool:
    """`completion`, a slice of it, or `reversed(completion)` and the like."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        return _is_turns(node.value, names)
    if isinstance(node, ast.Call) and _called(node) in THROUGH:
        return any(_is_turns(argument, names) for argument in node.args)
    if isinstance(node, ast.ListComp):
        return any(_is_turns(loop.iter, names) and _same(node.elt, loop.target) for loop in node.generators)
    return _is_name(node, names)


def _is_turn(node: ast.expr, names: set[str], turns: set[str]) -> bool:
    """A name that a loop over the messages binds, or one of them by number."""
    if isinstance(node, ast.Subscript):
        return _is_turns(node.value, names) and not isinstance(node.slice, ast.Slice) and not _is_text(node.slice)
    return isinstance(node, ast.Name) and node.id in turns


def _same(one: ast.expr, other: ast.expr) -> bool:
    return isinstance(one, ast.Name) and isinstance(other, ast.Name) and one.id == other.id


def _names(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _is_name(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _called(node: ast.Call) -> str | None:
    return node.func.id if isinstance(node.func, ast.Name) else None
