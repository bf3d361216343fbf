"""Rewards written for another library, recognised by what they do with their arguments."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator

THROUGH = ("reversed", "list", "tuple", "enumerate", "filter", "sorted")


def reads_messages(function: Callable, argument: str = "completion") -> bool:
    """Whether a reward reads `completion` as a list of messages, as verifiers' rewards do, and not as text.

    That is certain from its source where it takes the items of `completion` by name (`completion[-1]["content"]`, `for
    message in completion: message.get("role")`) or asks whether `completion` is a list: text has no such items.
    """
    tree = _source_tree(function)
    if tree is None:
        return False
    names = {argument}
    for node in ast.walk(tree):  # what is made of it by slices and filters, too: replies = completion[1:]
        if isinstance(node, ast.Assign) and _is_turns(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    turns = {name for iterated, target in _loops(tree) if _is_turns(iterated, names) for name in _names(target)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) == "isinstance" and len(node.args) == 2:
            kinds = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            if _is_name(node.args[0], names) and "list" in kinds and "str" not in kinds:
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
    return False


def _source_tree(function: Callable) -> ast.AST | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = type(function).__call__
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
