"""Rewards written for another library, recognised by what they do with their arguments."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

# What a name, or an expression, may hold: a list of messages, or one message.
MESSAGES, MESSAGE = "messages", "message"
THROUGH = ("reversed", "list", "tuple", "enumerate", "filter", "sorted")  # what these make of messages are messages


def reads_messages(function: Callable, argument: str = "completion") -> bool:
    """Whether a reward reads `completion` as a list of messages, as verifiers' rewards do, and not as text.

    That is certain from its source where it takes the items of `completion` by name (`completion[-1]["content"]`, `for
    message in completion: message.get("role")`) or asks whether `completion` is a list: text has no such items. The
    functions and methods to which it passes `completion`, or a message of it, are followed. One of these that asks
    whether it was given text takes both.
    """
    return _reads(function, {argument: MESSAGES}, set())


def _reads(function: Callable, held: dict[str, str], seen: set[Callable]) -> bool:
    """Whether a function reads the messages that its names hold."""
    function = _routine(function)
    tree = _source_tree(function)
    if tree is None or function in seen:
        return False
    is_helper = bool(seen)
    seen.add(function)
    nodes = list(ast.walk(tree))
    for node in nodes * 2:  # twice: ast.walk visits a loop before an assignment in a deeper block
        match node:
            case ast.Assign(targets, value):
                _bind(targets, _holds(value, held), held)
            case ast.For(target, whole) | ast.comprehension(target, whole) if _holds(whole, held) == MESSAGES:
                _bind(ast.walk(target), MESSAGE, held)
    reads = False
    for node in nodes:
        match node:
            case ast.Call(ast.Name("isinstance"), [part, kinds]) if _holds(part, held):
                asked = {kind.id for kind in ast.walk(kinds) if isinstance(kind, ast.Name)}
                if "str" in asked and is_helper:
                    return False
                reads |= "list" in asked and "str" not in asked and _holds(part, held) == MESSAGES
            case (
                ast.Subscript(part, ast.Constant(str()))
                | ast.Attribute(part, "get")
                | ast.Call(ast.Name("getattr"), [part, ast.Constant("get"), *_])
            ) if _holds(part, held) == MESSAGE:
                reads = True
            case ast.Call():
                reads = reads or _passes_on(function, node, held, seen)
    return reads


def _bind(targets: Any, what: str | None, held: dict[str, str]) -> None:
    for target in targets:
        if what and isinstance(target, ast.Name):
            held.setdefault(target.id, what)


def _holds(node: ast.expr, held: dict[str, str]) -> str | None:
    """What an expression holds: a name; a slice, a filter or `reversed(...)` of messages; or one of them by number."""
    match node:
        case ast.Name(name):
            return held.get(name)
        case ast.Subscript(whole, index) if _holds(whole, held) == MESSAGES:
            by_name = isinstance(index, ast.Constant) and isinstance(index.value, str)
            return MESSAGES if isinstance(index, ast.Slice) else None if by_name else MESSAGE
        case ast.Call(ast.Name(through), arguments) if through in THROUGH:
            return MESSAGES if MESSAGES in [_holds(argument, held) for argument in arguments] else None
        case ast.ListComp(ast.Name(one), [ast.comprehension(ast.Name(each), whole)]) if one == each:
            return MESSAGES if _holds(whole, held) == MESSAGES else None
    return None


def _passes_on(function: Callable, call: ast.Call, held: dict[str, str], seen: set[Callable]) -> bool:
    """Whether a call passes messages to a function that reads them."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not any(_holds(argument, held) for argument in arguments):
        return False
    helper = _resolve(function, call.func)
    try:
        named = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        given = inspect.signature(helper).bind_partial(*call.args, **named).arguments
    except (TypeError, ValueError):  # it has no signature, or another one
        return False
    passed = {name: what for name, argument in given.items() if (what := _holds(argument, held))}
    return _reads(helper, passed, seen)


def _resolve(function: Any, node: ast.expr) -> Any:
    """What a name, or a chain of attributes, in a function's source means; no property is computed for it."""
    match node:
        case ast.Name("self") if inspect.ismethod(function):
            return function.__self__
        case ast.Name(name):
            with contextlib.suppress(ValueError):  # it is not in the closure, or nothing has been put there yet
                return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
            return function.__globals__.get(name)
        case ast.Attribute(value, name):
            owner = _resolve(function, value)
            found = inspect.getattr_static(owner, name, None)
            bound = isinstance(found, (types.FunctionType, staticmethod, classmethod))
            return getattr(owner, name) if bound else found
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
