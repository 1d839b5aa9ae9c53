"""Read YAML text as plain values, with the line of every key.

Job files are YAML 1.2 (core schema), which avoids the pitfalls of PyYAML's YAML 1.1: ``1e-3`` is a number, ``yes``, ``no``,
``on`` and ``off`` are text, ``010`` is ten, and a key written twice is an error. Size, depth and the expansion of aliases are
limited, so that no file, not even a malicious one, keeps the reader busy for long.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, NamedTuple

import yaml

from headkd_ray.job.keys import DEEPEST, Path, dotted

TAG = "tag:yaml.org,2002:"
SYNTAX = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,18}|0o[0-7]{1,18}|0x[0-9a-fA-F]{1,15}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""The core schema's plain scalars, tried in this order; everything else is text."""
MOST_VALUES = 10_000
"""Limit of the keys and list items of a file, including those that aliases repeat."""
LONGEST_TEXT = 4096
"""Limit of the characters of one key or value, which is the length of the longest path."""


class _Loader(yaml.SafeLoader):
    """A loader that stops at the first node that exceeds the limits of depth or number."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = 0
        self.place: list[str | int] = []
        """The keys or positions of the nodes above the next one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build the next node; ``index`` is its key's node in a mapping, its position in a list, None for a key and the top."""
        if parent is not None:
            self.place.append(index if isinstance(index, int) else str(getattr(index, "value", "?")))
        self.nodes += 1
        if len(self.place) > DEEPEST:
            raise self._too_large(f"{dotted(tuple(self.place[:3]))[:60]} is nested more than {DEEPEST} deep")
        if self.nodes > 2 * MOST_VALUES:  # a key is a node, too
            raise self._too_large(f"more than {MOST_VALUES} keys and values")
        node = super().compose_node(parent, index)
        if parent is not None:
            self.place.pop()
        return node

    def _too_large(self, problem: str) -> TooLargeError:
        return TooLargeError(problem=problem, problem_mark=self.peek_event().start_mark)


class TooLargeError(yaml.MarkedYAMLError):
    """The YAML is well-formed, but deeper or longer than any job."""


for _name, _pattern in SYNTAX.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


class YamlError(Exception):
    """The text is not YAML; ``line`` and ``column`` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        """Say what is wrong and where."""
        super().__init__(message)
        self.line, self.column = line, column


class Tree(NamedTuple):
    """The content of a YAML document, with where and how it was written."""

    value: Any
    """The value: a dict, list, text, number, bool or None."""
    lines: dict[Path, int]
    """Line, counted from 1, of every key and list item; the top is ``()``."""
    problems: list[tuple[Path, int, str]]
    """Path, line and message of each problem, such as a repeated key or an unknown tag."""
    unread: set[Path]
    """Paths of values that could not be read; ``value`` has None there."""
    spelled: dict[Path, str]
    """Unquoted numbers, booleans and nulls as they were written: ``1e3``, ``007``."""


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
    except TooLargeError as error:
        raise YamlError(str(error.problem), *_where(error)) from None
    except yaml.MarkedYAMLError as error:
        context = f" ({error.context})" if error.context else ""
        hint = "; indent with spaces, not tabs" if r"'\t'" in str(error.problem) else ""
        raise YamlError(f"not valid YAML: {error.problem}{context}{hint}", *_where(error)) from None
    except ValueError as error:  # a \U escape beyond Unicode
        raise YamlError(f"not valid YAML: {error}", 1, 1) from None
    tree = Tree(None, {(): 1}, [], set(), {})
    return tree if root is None else tree._replace(value=_value(root, (), tree, ()))


def _where(error: yaml.MarkedYAMLError) -> tuple[int, int]:
    mark = error.problem_mark or error.context_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def position(text: str, index: int) -> tuple[int, int]:
    """Return the line and column, counted from 1, of the character at ``index``."""
    before = text[:index]
    return before.count("\n") + 1, index - before.rfind("\n")


def scalar(text: str, tag: str) -> Any:
    """Return the value of a plain scalar.

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
    """Return the type as which an unquoted ``text`` is read: null, bool, int, float or str."""
    return next((name for name, pattern in SYNTAX.items() if re.fullmatch(pattern, text)), "str")


def _value(node: yaml.Node, path: Path, tree: Tree, above: tuple[yaml.Node, ...]) -> Any:
    mark = node.start_mark
    line = mark.line + 1
    if any(node is parent for parent in above):
        return _unread(path, line, "an alias that contains itself", tree)
    if len(tree.lines) > MOST_VALUES or len(path) > DEEPEST:  # the loader has counted the nodes; aliases repeat them
        raise YamlError(
            f"{dotted(path[:3])[:60]}: its aliases expand to more than {MOST_VALUES} values, or more than {DEEPEST} levels",
            line,
            mark.column + 1,
        )
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
        if (fault := _fault(node.value)) is not None:
            return _unread(path, line, fault, tree)
        try:
            value = scalar(node.value, node.tag)
        except ValueError:
            return _unread(path, line, f"{node.value} does not fit the tag {node.tag.replace(TAG, '!!')}; remove it", tree)
        if not isinstance(value, str) and not node.style:
            tree.spelled[path] = node.value
        return value
    return _unread(path, line, f"tag {node.tag.replace(TAG, '!!')} does not fit here; remove it", tree)


def _fault(text: str) -> str | None:
    """Return why a key or a value is not valid text, although its escapes are well-formed; None if it is valid."""
    if len(text) > LONGEST_TEXT:
        return f"has {len(text)} characters; at most {LONGEST_TEXT} are read"
    # YAML allows an escape such as "\\x00" for a character that it does not allow unescaped.
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return None if found is None else f"contains the character U+{ord(found.group()):04X}, which is not text; remove it"


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
        if (fault := _fault(key_node.value)) is not None:
            tree.problems.append((path, line, f"a key {fault}"))
            continue
        child = (*path, key_node.value)
        if key_node.value in values:
            tree.problems.append((child, line, f"written twice (first on line {tree.lines[child]}); keep one"))
            continue
        tree.lines[child] = line
        values[key_node.value] = _value(value_node, child, tree, above)
    return values
