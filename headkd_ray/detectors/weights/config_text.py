"""Read the values in a config that is Python source without running it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any


def read_config(text: str) -> dict[str, Any]:
    """Return the module-level variables of ``text``.

    Their values are numbers, strings, lists and dicts, also ``dict(...)`` with ``**`` and variables from further up; whatever
    else would have to be run reads as None. Raises ValueError if ``text`` is not Python.
    """
    tree = _parse(text)
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    values[target.id] = _value(statement.value, values)
    return values


def section(values: object, *path: str) -> dict[str, Any]:
    """Return the dict under the keys ``path`` of ``values``; empty where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return dict(values) if isinstance(values, Mapping) else {}


def _parse(text: str) -> ast.Module:
    # mmcv puts strings between quotes as they are: a Windows path then holds escapes, sometimes ones that Python refuses.
    problem: Exception | None = None
    for spelled in (text, text.replace("\\", "\\\\")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(spelled)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested without end
            problem = problem or error
    raise ValueError(str(problem) or type(problem).__name__) from problem


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name):
            return names.get(name)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=items):
            return _pairs(zip(keys, items, strict=True), names)
        case ast.Call(func=ast.Name(id="dict"), args=args, keywords=keywords):
            merged: dict[str, Any] = {}
            for part in args:
                merged |= section(_value(part, names))
            return merged | _pairs(((word.arg, word.value) for word in keywords), names)
    return None


def _pairs(pairs: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict of ``pairs``; a key is a str, a node, or None before what ``**`` spreads. Keys that are no strings are
    left out."""
    found: dict[str, Any] = {}
    for key, node in pairs:
        value = _value(node, names)
        if key is None:
            found |= section(value)
            continue
        name = _value(key, names) if isinstance(key, ast.expr) else key
        if isinstance(name, str):
            found[name] = value
    return found
