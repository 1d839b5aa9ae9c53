"""YAML text as plain values that remember the line of every key.

Job files are YAML 1.2 (core schema), which differs from PyYAML's YAML 1.1 where people get hurt: ``1e-3`` is a number,
``yes``, ``no``, ``on`` and ``off`` are text, ``010`` is ten, and a key written twice is an error.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, NamedTuple

import yaml

from headkd_ray.job.keys import Path

TAG = "tag:yaml.org,2002:"
SYNTAX = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,18}|0o[0-7]{1,18}|0x[0-9a-fA-F]{1,15}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""The core schema's plain scalars, tried in this order; everything else is text."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {}


for _name, _pattern in SYNTAX.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


class YamlError(Exception):
    """The text is not YAML; ``line`` and ``column`` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        """Say what is wrong and where."""
        super().__init__(message)
        self.line, self.column = line, column


class Tree(NamedTuple):
    """YAML text read."""

    value: Any
    """dict, list, text, number, bool or None."""
    lines: dict[Path, int]
    """Line, from 1, of every key and list item; the top is ``()``."""
    problems: list[tuple[Path, int, str]]
    """Repeated keys, unknown tags and the like: path, line, message."""
    unread: set[Path]
    """Where a value could not be read; ``value`` has None there."""


def parse(text: str) -> Tree:
    """Read one YAML document.

    Raises:
        YamlError: the text is not one well-formed YAML document.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line, column = position(text, error.position)
        raise YamlError(f"the character U+{ord(text[error.position]):04X} is not text", line, column) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        hint = "; indent with spaces, not tabs" if r"'\t'" in str(error.problem) else ""
        where = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlError(f"not valid YAML: {error.problem}{context}{hint}", *where) from None
    except (RecursionError, ValueError) as error:  # ValueError: a \U escape beyond Unicode
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise YamlError(f"not valid YAML: {reason}", 1, 1) from None
    tree = Tree(None, {(): 1}, [], set())
    return tree if root is None else tree._replace(value=_value(root, (), tree, ()))


def position(text: str, index: int) -> tuple[int, int]:
    """Line and column, from 1, of a character."""
    before = text[:index]
    return before.count("\n") + 1, index - before.rfind("\n")


def scalar(text: str, tag: str) -> Any:
    """The value of a plain scalar.

    Raises:
        ValueError: the text does not fit the tag (``!!int two``).
    """
    if tag == TAG + "null":
        return None
    if tag == TAG + "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if tag == TAG + "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if tag == TAG + "float":
        return float(re.sub(r"\.(?=inf|nan)", "", text, flags=re.IGNORECASE))
    return text


def kind_of_text(text: str) -> str:
    """What an unquoted ``text`` would be read as: null, bool, int, float or str."""
    return next((name for name, pattern in SYNTAX.items() if re.fullmatch(pattern, text)), "str")


def _value(node: yaml.Node, path: Path, tree: Tree, above: tuple[yaml.Node, ...]) -> Any:
    line = node.start_mark.line + 1
    if any(node is parent for parent in above):
        return _unread(path, line, "an alias that contains itself", tree)
    above = (*above, node)
    if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
        return _mapping(node, path, tree, above)
    if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
        items = []
        for index, item in enumerate(node.value):
            place = (*path, index)
            tree.lines[place] = item.start_mark.line + 1
            items.append(_value(item, place, tree, above))
        return items
    if isinstance(node, yaml.ScalarNode) and node.tag in (TAG + name for name in (*SYNTAX, "str")):
        try:
            return scalar(node.value, node.tag)
        except ValueError:
            pass
    return _unread(path, line, f"tag {node.tag.replace(TAG, '!!')} does not fit here; remove it", tree)


def _unread(path: Path, line: int, message: str, tree: Tree) -> None:
    tree.problems.append((path, line, message))
    tree.unread.add(path)


def _mapping(node: yaml.MappingNode, path: Path, tree: Tree, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            tree.problems.append((path, line, "a key must be a word, not a list or a mapping"))
            continue
        child = (*path, key_node.value)
        if key_node.value in values:
            tree.problems.append((child, line, f"written twice (first on line {tree.lines[child]}); keep one"))
            continue
        tree.lines[child] = line
        values[key_node.value] = _value(value_node, child, tree, above)
    return values
