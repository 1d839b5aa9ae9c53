"""Look up a Job's keys: their defaults, their paths for error messages, and the keys nearest to a misspelt one.

A *path* is the tuple of keys (and list positions) from the top of the job file to a value: ``("optim", "milestones", 0)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from headkd_ray.job.job import Job
from headkd_ray.job.module_specs import Spec

Path = tuple[str | int, ...]
DEEPEST = 50
"""Limit of nesting levels: far more than any job has, far fewer than Python's recursion limit."""


def dotted(path: Path) -> str:
    """Return the path as a dotted key: ``("data", "short_side", 1)`` becomes ``data.short_side[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def sections(field: FieldInfo) -> tuple[type[Spec], ...]:
    """Return the sections that a key may hold: none for a plain value or a free mapping, several for a ``kind`` union."""
    if get_origin(field.annotation) is dict:
        return ()
    found = [field.annotation, *get_args(field.annotation)]
    return tuple(option for option in found if isinstance(option, type) and issubclass(option, Spec))


def kind_of(section: type[Spec]) -> str:
    """Return the ``kind`` that selects this section, for example ``retinanet``."""
    return str(section.model_fields["kind"].default)


def section_at(field: FieldInfo, value: Any) -> type[Spec] | None:
    """Return the section that ``value`` stands for; for a missing or unknown ``kind``, the one with most keys in common."""
    options = sections(field)
    if len(options) < 2:
        return options[0] if options else None
    if not isinstance(value, Mapping):
        return options[0]
    chosen = [option for option in options if kind_of(option) == value.get("kind")]
    return chosen[0] if chosen else max(options, key=lambda option: len(option.model_fields.keys() & value.keys()))


def with_defaults(model: type[Spec], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` (which may hold mistakes) with defaults for omitted keys; required keys stay omitted."""
    full: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in values:
            section = section_at(field, values[name])
            nested = section is not None and isinstance(values[name], Mapping)
            full[name] = with_defaults(section, values[name]) if section and nested else values[name]
        elif not field.is_required():
            default = field.get_default(call_default_factory=True)
            full[name] = default.model_dump() if isinstance(default, Spec) else default
    return full


def known_paths(model: type[Spec], values: Mapping[str, Any], prefix: Path = ()) -> Iterator[Path]:
    """Yield every key, including sections, that a job like ``values`` may have."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        value = values.get(name)
        section = section_at(field, value)
        if section is not None:
            yield from known_paths(section, value if isinstance(value, Mapping) else {}, (*prefix, name))


def field_at(path: Path, values: Mapping[str, Any], top: type[Spec] = Job) -> FieldInfo | None:
    """Return the field that ``path`` names in a file like ``values``; None for an unknown key and inside a list or dict."""
    model: type[Spec] | None = top
    field = None
    value: Any = values
    for part in path:
        field = model.model_fields.get(str(part)) if model is not None else None
        if field is None:
            return None
        value = value.get(part) if isinstance(value, Mapping) else None
        model = section_at(field, value)
    return field


def takes_text(field: FieldInfo) -> bool:
    """Return whether the key holds free text, such as a path or a name; it may also allow null."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    options = get_args(field.annotation) if is_union else (field.annotation,)
    bare = {get_args(option)[0] if get_origin(option) is Annotated else option for option in options}
    return bare - {NoneType} == {str}


def nearest(word: object, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the option most similar to ``word``, or None if none is similar."""
    found = difflib.get_close_matches(str(word).lower(), list(options), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_keys(path: Path, known: Iterable[Path], most: int = 3) -> list[str]:
    """Return the known keys that an unknown ``path`` probably means; keys of the same section win a near tie."""
    section, name = path[:-1], str(path[-1]).lower()
    scores: dict[str, float] = {}
    for candidate in known:
        matcher = difflib.SequenceMatcher(None, name, str(candidate[-1]))
        bonus = 0.1 * (candidate[:-1] == section)
        if matcher.real_quick_ratio() + bonus < 0.6:  # a cheap upper bound; the ratio itself is slow
            continue
        likeness = matcher.ratio() + bonus
        if likeness >= 0.6:
            scores[dotted(candidate)] = likeness
    best = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if score == best][:most]
