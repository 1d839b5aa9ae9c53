"""Load a job file and the command line's ``key.path=value`` overrides as a checked Job, or list every mistake in one error."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from headkd_ray.errors import JobError
from headkd_ray.job.checks import Problem, problems_in
from headkd_ray.job.job import Job
from headkd_ray.job.keys import (
    DEEPEST,
    Path,
    dotted,
    field_at,
    kind_of,
    section_at,
    sections,
    takes_text,
    with_defaults,
)
from headkd_ray.job.messages import none_of, problem_of, show
from headkd_ray.job.module_specs import Spec
from headkd_ray.job.provided import job_name, provided_jobs
from headkd_ray.job.yaml_tree import YamlError, parse, position

SomeSpec = TypeVar("SomeSpec", bound=Spec)

QUOTED = re.compile(r"""\s*('([^']|'')*'|"(\\.|[^"\\])*")\s*""", re.DOTALL)
"""A value that is quoted as a whole, as YAML does."""
NULL = ("", "~", "null", "Null", "NULL")
"""The spellings of null in YAML."""
MOST_BYTES = 2**20
"""Largest size of a job file in bytes; the committed ones have a few thousand."""
MOST_HINTS = 50
"""Mistakes of a file for which a suggestion is looked up: each takes milliseconds."""
MOST_LINES = 100
"""Mistakes of a file that are listed one by one."""


class Origin(NamedTuple):
    """Where a key was written. Origins sort by line of the file, with overrides last."""

    override: int
    line: int
    label: str


class Draft(NamedTuple):
    """A job as it was written, including its mistakes."""

    values: dict[str, Any]
    origins: dict[Path, Origin]
    mistakes: list[tuple[Origin, str]]
    unread: set[Path]
    """Keys whose value could not be read; one of the mistakes says why."""
    spelled: dict[Path, str]
    """Unquoted numbers, booleans and nulls as they were written."""


def load_job(path: str | FilePath, overrides: Sequence[str] = ()) -> Job:
    """Read a job file.

    Relative paths inside a job (``data.train``, ``data.val``, ``data.unlabelled``, ``teacher.checkpoint``,
    ``teacher.predictions``, ``run.storage``, ``student.checkpoint``, ``student.backbone.weights``) stay as written: they are
    relative to the command's current folder,
    not to the job file.

    Args:
        path: the YAML file (YAML 1.2: ``1e-3`` is a number, ``yes`` is text).
        overrides: ``key.path=value`` each, applied in order; the value is YAML (``null``, ``[8, 11]``, ``1e-3``), except for
            keys that hold text, such as ``run.name`` and ``data.train``, where it is the text itself (``2024``, ``photos #2``).

    Raises:
        JobError: all mistakes of the file and the overrides at once, in the order of the lines.
    """
    draft = read_file(path)
    for number, override in enumerate(overrides, start=1):
        apply_override(draft, override, number)
    found, job = check(draft.values, draft.unread, draft.spelled)
    lines = draft.mistakes + [(origin(draft, problem.path), as_line(problem)) for problem in found]
    if lines or job is None:
        raise job_error([f"{where.label}: {message}" for where, message in sorted(lines, key=lambda line: line[0][:2])], path)
    return job


def read_file(path: str | FilePath, needs: str = "a job has at least run, method and data") -> Draft:
    """Read the file's values with the line of every key; ``needs`` says in the message for an empty file what it must have.

    Raises:
        JobError: the file is missing, or is not text, not YAML or not a mapping of keys.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{path}: no such file{_similar_file(FilePath(path))}") from None
    except IsADirectoryError:
        jobs = sorted(job.name for job in FilePath(path).glob("*.yaml"))
        raise JobError(f"{path}: is a folder; name a job file" + (f" in it ({', '.join(jobs)})" if jobs else "")) from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MOST_BYTES:
        raise JobError(f"{path}: has more than {MOST_BYTES / 2**20:.0f} MiB, so it is not a job file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        line, column = position(before, len(before))
        raise JobError(f"{path}:{line}:{column}: not a text file (byte 0x{content[error.start]:02x} is not UTF-8)") from None
    try:
        tree = parse(text)
    except YamlError as error:
        raise JobError(f"{path}:{error.line}:{error.column}: {error}") from None
    if tree.value is None:
        raise JobError(f"{path}:1:1: is empty; {needs}")
    if not isinstance(tree.value, dict):
        raise JobError(f"{path}:1:1: is not a mapping of keys; {needs}")
    origins = {key: Origin(0, line, f"{path}:{line}") for key, line in tree.lines.items()}
    mistakes = [(Origin(0, at, f"{path}:{at}"), as_line(Problem(key, message))) for key, at, message in tree.problems]
    return Draft(tree.value, origins, mistakes, tree.unread, tree.spelled)


def as_line(problem: Problem) -> str:
    """Return the problem on one line, after its key if it has one."""
    return f"{dotted(problem.path)}: {problem.message}" if problem.path else problem.message


def _similar_file(path: FilePath) -> str:
    if (name := job_name(path.as_posix())) in provided_jobs():
        to = path.as_posix().removesuffix(".yaml").removesuffix(name).rstrip("/") or "."
        command = f"copy {name}" if to == "jobs" else f"copy {name} --to {shlex.quote(to)}"
        return f"; the package has a job of this name, which this copies: python -m headkd_ray.jobs {command}"
    names = [str(job) for job in path.parent.glob("*.yaml")]
    similar = difflib.get_close_matches(str(path), names, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def apply_override(
    draft: Draft, override: str, number: int, field_of: Callable[[Path, Mapping[str, Any]], FieldInfo | None] = field_at
) -> None:
    """Apply one ``key.path=value`` to the draft; anything wrong with it is added to the draft's mistakes.

    ``field_of`` returns the field that a path names in a file with the draft's values.
    """
    where = Origin(number, 0, f"override {override}")
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        draft.mistakes.append((where, "write it as key.path=value, for example optim.lr=0.02"))
        return
    path = tuple(key.split("."))
    if len(path) > DEEPEST:
        draft.mistakes.append((where, f"no key has more than {DEEPEST} parts"))
        return
    field = field_of(path, draft.values)
    if field is not None and takes_text(field) and text.strip() not in NULL and not QUOTED.fullmatch(text):
        put(draft, path, text, where)  # as YAML, "2024" would be a number, and "photos #2" would end at the space
        return
    try:
        tree = parse(text)
    except YamlError as error:
        draft.mistakes.append((where, f"{error}; quote the value: {key}='\"...\"'"))
        return
    draft.mistakes.extend((where, as_line(Problem((*path, *inner), message))) for inner, _, message in tree.problems)
    put(draft, path, tree.value, where)
    draft.unread.update((*path, *inner) for inner in tree.unread)
    draft.spelled.update({(*path, *inner): text for inner, text in tree.spelled.items()})


def put(draft: Draft, path: tuple[str, ...], value: Any, where: Origin) -> None:
    """Set a key of the draft and create the sections above it; a value in place of a section is a mistake."""
    if len(path) > DEEPEST:
        draft.mistakes.append((where, f"no key has more than {DEEPEST} parts"))
        return
    *parents, last = path
    section = draft.values
    for depth, name in enumerate(parents, start=1):
        if section.get(name) is None:
            section[name] = {}
            draft.origins[path[:depth]] = where
        if not isinstance(section[name], dict):
            draft.mistakes.append((where, f"{dotted(path[:depth])} is {show(section[name])}, not a section of keys"))
            return
        section = section[name]
    section[last] = value
    for kept in (draft.origins, draft.spelled):
        for old in [old for old in kept if old[: len(path)] == path]:
            del kept[old]
    draft.origins[path] = where


def origin(draft: Draft, path: Path) -> Origin:
    """Return where a key was written or, for a missing key, its section."""
    while path not in draft.origins:
        path = path[:-1]
    return draft.origins[path]


def check(
    values: Mapping[str, Any], unread: Collection[Path] = (), spelled: Mapping[Path, str] | None = None
) -> tuple[list[Problem], Job | None]:
    """Return everything wrong with a job's plain values, except the ``unread`` keys, and the Job if nothing is wrong.

    ``spelled``: how the file or the command line spells its numbers, for the messages.
    """
    values, found = _with_known_kinds(values)
    mistyped, job = validated(Job, values, spelled)
    found = [problem for problem in found + mistyped if problem.path not in unread]
    found += problems_in(with_defaults(Job, values), broken=[*unread, *(problem.path for problem in found)])
    return found, None if found else job


def validated(
    top: type[SomeSpec], values: Mapping[str, Any], spelled: Mapping[Path, str] | None = None
) -> tuple[list[Problem], SomeSpec | None]:
    """Return which types and ranges are wrong in the plain values of a ``top``, and the section itself if none are."""
    try:
        # As JSON, because strict JSON accepts a list for a tuple, but neither "2" nor true for a number.
        return [], top.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        hints = [True] * MOST_HINTS + [False] * max(0, len(details) - MOST_HINTS)
        return [problem_of(detail, values, top, spelled, hint) for detail, hint in zip(details, hints, strict=False)], None


def _with_known_kinds(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Guess every missing or unknown ``kind`` in the values, so that the rest of its section can be checked."""
    known = dict(values)
    found: list[Problem] = []
    for name, field in Job.model_fields.items():
        kinds = [kind_of(option) for option in sections(field)] if field.discriminator is not None else []
        section = known.get(name)
        if kinds and isinstance(section, dict) and section.get("kind") not in kinds:
            message = none_of(section["kind"], kinds) if "kind" in section else f"missing; one of {', '.join(kinds)}"
            found.append(Problem((name, "kind"), message))
            guess = section_at(field, section)
            known[name] = section | {"kind": kind_of(guess) if guess is not None else kinds[0]}
    return known, found


def job_error(lines: Iterable[str], path: str | FilePath) -> JobError:
    """Return one error for all the lines, with a headline if there are several."""
    lines = list(lines)
    more = [f"… and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return JobError(lines[:MOST_LINES] + more, headline=f"{path} has {len(lines)} problems:" if len(lines) > 1 else None)
