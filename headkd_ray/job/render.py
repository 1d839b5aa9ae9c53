"""Write a resolved job as a complete YAML file: every key with its value and its meaning (``--print-config``)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from headkd_ray.job.job import Job
from headkd_ray.job.module_specs import Spec
from headkd_ray.job.yaml_tree import kind_of_text

WIDTH = 120
PLAIN = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./@%+~-]*")
"""Text that means the same with and without quotes, unless it reads as a number or the like."""
OLD_WORDS = {"y", "n", "yes", "no", "on", "off"}
"""Booleans in YAML 1.1, which are quoted for its readers."""


def render_job(job: Job) -> str:
    """Return YAML that loads back to an equal Job, with its relative paths as they were written."""
    return "\n".join(_section(job, "")) + "\n"


def _section(section: Spec, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not indent and name != "run":
            yield ""
        comment = f"{indent}# "
        yield from textwrap.wrap(
            " ".join((field.description or "").split()), WIDTH, initial_indent=comment, subsequent_indent=comment
        )
        if isinstance(value, Spec):
            yield f"{indent}{name}:"
            yield from _section(value, indent + "  ")
        else:
            yield f"{indent}{name}: {inline(value)}"


def inline(value: Any) -> str:
    """Return a plain value, list or dict on one line of YAML that YAML 1.1 and 1.2 read alike."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(key))}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    return str(value)


def _float(value: float) -> str:
    text = repr(value)
    if text.lstrip("-") in ("inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    mantissa, exponent, power = text.partition("e")
    return text if not exponent or "." in mantissa else f"{mantissa}.0e{power}"  # YAML 1.1 requires the dot


def _text(value: str) -> str:
    if PLAIN.fullmatch(value) and kind_of_text(value) == "str" and value.lower() not in OLD_WORDS:
        return value
    return yaml.dump(value, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
