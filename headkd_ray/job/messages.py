"""Turn pydantic's errors about a job, or another file of ``Spec`` sections, into messages that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from headkd_ray.job.checks import Problem
from headkd_ray.job.job import NUMBER, RANGE, Job
from headkd_ray.job.keys import (
    Path,
    dotted,
    field_at,
    kind_of,
    known_paths,
    nearest,
    nearest_keys,
    sections,
)
from headkd_ray.job.losses_spec import MAP, RULE
from headkd_ray.job.module_specs import Spec

Sentence = Callable[[str, Any, Mapping[str, Any]], str]
"""Makes the message from (the given value as YAML, the value itself, pydantic's context)."""


def problem_of(
    error: Mapping[str, Any],
    values: Mapping[str, Any],
    top: type[Spec] = Job,
    spelled: Mapping[Path, str] | None = None,
    with_hint: bool = True,
) -> Problem:
    """Describe one of pydantic's errors on a job (or ``top``), whose plain ``values`` help to guess what was meant.

    ``spelled``: how the file spells numbers, booleans and nulls; ``with_hint``: suggest a replacement for an unknown key.
    """
    path = plain_path(error["loc"], top)
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, unknown_key(path, values, top) if with_hint else "unknown key")
    if kind == "missing":
        return Problem(path, missing(path, values, top))
    if kind == "literal_error":
        options = str(context["expected"]).replace(" or ", ", ").split(", ")  # pydantic writes 'a', 'b' or 'c'
        return Problem(path, none_of(given, [option.strip("'") for option in options]))
    shown = short((spelled or {}).get(path, show(given)))
    if kind == "tuple_type":
        return Problem(path, not_a_list(shown, given, field_at(path, values, top)))
    sentence = SENTENCES.get(kind)
    return Problem(path, sentence(shown, given, context) if sentence else f"{shown}: {error['msg']}")


def plain_path(loc: Iterable[int | str], top: type[Spec] = Job) -> Path:
    """Return pydantic's location as a path in the file, without the tags that it adds for unions of sections or types."""
    path: list[int | str] = []
    options: tuple[Any, ...] = (top,)
    for part in loc:
        if part in (NUMBER, RANGE, RULE, MAP):
            continue
        chosen = tuple(option for option in options if len(options) > 1 and kind_of(option) == part)
        if chosen:
            options = chosen
            continue
        path.append(part)
        fields = [option.model_fields[part] for option in options if part in option.model_fields]
        options = sections(fields[0]) if fields else ()
    return tuple(path)


def show(value: Any) -> str:
    """Return a value as short YAML."""
    return short(f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def short(text: str) -> str:
    """Return the text, truncated if it is too long for a message."""
    return text if len(text) <= 60 else text[:56] + " ..."


def not_a_list(shown: str, given: Any, field: FieldInfo | None) -> str:
    """Say that a list is needed, and how to write the given value as a list of the right length."""
    if given is None or isinstance(given, dict):
        return f"{shown} is not a list"
    types = get_args(field.annotation) if field is not None else ()
    count = len(types) if types and ... not in types else 1
    items = [shown] * count
    if isinstance(given, str):  # "640, 800", (640, 800) and 640-800 are text to YAML
        items = re.findall(r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?", given) or items
    return f"{shown} is not a list; write [{short(', '.join(items))}]"


def unknown_key(path: Path, values: Mapping[str, Any], top: type[Spec] = Job) -> str:
    """Suggest what to write instead of a key that does not exist."""
    known = list(known_paths(top, values))
    sections = {key[:-1] for key in known}
    given: Any = values
    for part in path:
        given = given[part]
    # A section was probably meant to be a section, a value to be a value.
    likely = nearest_keys(path, [key for key in known if isinstance(given, Mapping) == (key in sections)])
    if likely:
        return f"unknown key; did you mean {' or '.join(likely)}?"
    siblings = ", ".join(str(key[-1]) for key in known if key[:-1] == path[:-1])
    return f"unknown key; {dotted(path[:-1]) or ('a job' if top is Job else 'the file')} has {siblings}"


def missing(path: Path, values: Mapping[str, Any], top: type[Spec] = Job) -> str:
    """Say that a required key is missing, and what it means."""
    if isinstance(path[-1], int):
        return "missing; the list needs one more value"
    field = field_at(path, values, top)
    meaning = " ".join((field.description or "").split()) if field is not None else ""
    return "missing" + (f" ({meaning.split('. ')[0].rstrip('.')})" if meaning else "")


def none_of(given: Any, options: list[str]) -> str:
    """Say that a value is not one of the allowed ones, and which of them it resembles most."""
    likely = nearest(given, options)
    return f"{show(given)} is not one of {', '.join(options)}" + (f"; did you mean {likely}?" if likely else "")


def _whole_number(shown: str, given: Any, _: Mapping[str, Any]) -> str:
    if isinstance(given, float) and given.is_integer() and abs(given) < 2**53:
        return f"{shown} must be a whole number; write {int(given)}"
    return f"{shown} is not a whole number"


def _text(shown: str, given: Any, _: Mapping[str, Any]) -> str:
    if given is None:
        return "is empty (null); text is expected"
    if isinstance(given, dict | list):
        return f"{shown} is not text"
    return f'{shown} is not text; write it in double quotes: "{shown}"'


def _section(shown: str, given: Any, _: Mapping[str, Any]) -> str:
    return "is empty; give its keys or remove it" if given is None else f"{shown} is not a section (a mapping of keys)"


def _bound(words: str, bound: str) -> Sentence:
    return lambda shown, given, context: f"{shown} must be {words} {context[bound]:.15g}"


def _pattern(shown: str, given: Any, context: Mapping[str, Any]) -> str:  # run.name is the only key with a pattern
    return f"{shown} may contain only letters, digits, dots, dashes and underscores, and must start with a letter or digit"


SENTENCES: dict[str, Sentence] = {
    "int_type": _whole_number,
    "float_type": lambda shown, given, context: f"{shown} is not a number",
    "bool_type": lambda shown, given, context: f"{shown} is not true or false",
    "string_type": _text,
    "string_pattern_mismatch": _pattern,
    "string_too_long": lambda shown, given, context: (
        f"{shown} has {len(given)} characters; at most {context['max_length']} are allowed"
    ),
    "string_too_short": lambda shown, given, context: "is empty",
    "finite_number": lambda shown, given, context: f"{shown} is not a finite number",
    "greater_than": _bound("above", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("below", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "too_short": lambda shown, given, context: "the list is empty",
    "too_long": lambda shown, given, context: (
        f"{shown} has {context['actual_length']} values; {context['max_length']} are expected"
    ),
    "model_type": _section,
    "dict_type": _section,
    "value_error": lambda shown, given, context: str(context["error"]),  # from our own validators
}
"""The message for each type of error that the Job's types can raise."""
