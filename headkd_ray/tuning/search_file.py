"""Read a search file and the command line's ``key.path=value`` overrides; one error lists all mistakes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic.fields import FieldInfo

from headkd_ray.errors import JobError
from headkd_ray.job import Problem, PyramidDetectorSpec
from headkd_ray.job.keys import DEEPEST, Path, dotted, field_at
from headkd_ray.job.load import (
    Draft,
    Origin,
    apply_override,
    as_line,
    check,
    job_error,
    origin,
    put,
    read_file,
    validated,
)
from headkd_ray.job.messages import show
from headkd_ray.tuning.search_spec import KINDS, ParameterSpec, SearchSpec
from headkd_ray.tuning.space import Search, base_values, contains, count, ordered, with_values

FIXED = ("run", "cluster")
"""Sections of a job that a search cannot vary."""
MUTABLE = re.compile(
    r"optim\.(lr|weight_decay|momentum|clip_norm|gamma)|distill\.([\w.]+\.)?(\w+_weight|ckd_epochs|warmup_steps)"
)
"""Keys that can change during training: they affect neither the shape of a model nor the order of images."""
MOST_KEYS = 200
"""Maximum number of keys in a space, since each is tried at both ends of its range before the search starts."""
MOST_STEPS = 1_000_000
"""Maximum number of steps in a range."""
MOST_COMBINATIONS = 10_000
"""Maximum number of combinations in a grid."""


def load_search(path: str | FilePath, overrides: Sequence[str] = ()) -> Search:
    """Read a search file and its base job, and try every searched key at the ends of its range.

    Args:
        overrides: ``key.path=value`` for keys of the search file: ``budget.trials=8``, ``overrides.optim.epochs=2``,
            ``space.optim.lr={loguniform: [1e-3, 1e-2]}``, ``space.optim.lr=null`` (do not search this key).

    Raises:
        JobError: lists all mistakes, first those of the search file in the order of its lines, then the base job's.
    """
    draft = read_file(path, needs="a search has at least run, job and space")
    for number, override in enumerate(overrides, start=1):
        apply_override(draft, override, number, _field_of)
    for section in ("space", "overrides"):
        _join_keys(draft, section)
    found, spec = check_search(draft.values, draft.unread, draft.spelled)
    if spec is not None:
        found += _contradictions(spec)
    lines = draft.mistakes + [(origin(draft, problem.path), as_line(problem)) for problem in found]
    job, job_lines = _read_job(draft)
    search = None
    if job is not None and not job_lines:
        lines += _check_space(draft, job)
        if spec is not None and not found:
            search = Search(spec, job.values)
            lines += [(origin(draft, key), f"{dotted(key)}: {message}") for key, message in _unfit(search)]
    if lines or job_lines or search is None:
        lines = sorted(dict.fromkeys(lines), key=lambda line: line[0][:2])
        raise job_error([f"{where.label}: {message}" for where, message in lines] + job_lines, path)
    return search


def _field_of(path: Path, values: Mapping[str, Any]) -> FieldInfo | None:
    """Return the field that an override of a search file names; below ``overrides`` it is a field of the job."""
    return field_at(path[1:], {}) if path[0] == "overrides" else field_at(path, values, SearchSpec)


def _join_keys(draft: Draft, section: str) -> None:
    """Turn ``space: {optim: {lr: ...}}``, which overrides produce, into ``space: {optim.lr: ...}``; null removes a key."""
    nested = draft.values.get(section)
    if not isinstance(nested, Mapping):
        return
    joined: dict[str, Any] = {}
    for parts, value in list(_leaves(nested, (section,))):
        key = ".".join(parts[1:])
        kept: tuple[dict[Path, Any], ...] = (draft.origins, draft.spelled)
        for places in kept:
            for old in [old for old in places if old[: len(parts)] == parts]:
                place: Path = (section, key, *old[len(parts) :])
                places[place] = places.pop(old)
        joined[key] = value
        if value is None and section == "space" and origin(draft, (section, key)).override:
            del joined[key]
    draft.values[section] = joined


def _leaves(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of everything that has a dotted key, is not a mapping, or is a parameter."""
    for name, value in section.items():
        within = isinstance(value, Mapping) and "." not in name and not value.keys() & ParameterSpec.model_fields.keys()
        if within and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def check_search(
    values: Mapping[str, Any], unread: Collection[Path] = (), spelled: Mapping[Path, str] | None = None
) -> tuple[list[Problem], SearchSpec | None]:
    """Return the problems of a search's plain values, except those of ``unread`` keys, and the search if there are none."""
    found: list[Problem] = []
    space = values.get("space")
    parameters: dict[str, ParameterSpec] = {}
    if isinstance(space, Mapping):
        values = {**values, "space": {}}
        if len(space) > MOST_KEYS:
            found.append(Problem(("space",), f"has {len(space)} keys; at most {MOST_KEYS} can be searched"))
            space = {}
        elif not space:
            found.append(Problem(("space",), "is empty; name at least one job key, for example optim.lr"))
        for key, given in space.items():
            written = {path[2:]: text for path, text in (spelled or {}).items() if path[:2] == ("space", key)}
            mistyped, parameter = _check_parameter(given, written)
            found += [Problem(("space", key, *path), message) for path, message in mistyped]
            if parameter is not None:
                parameters[key] = parameter
    mistyped, spec = validated(SearchSpec, values, spelled)
    found = [problem for problem in mistyped + found if problem.path not in unread]
    if spec is not None:
        spec = spec.replace({"space": parameters})
        try:
            ordered(parameters)
        except ValueError as error:
            found.append(Problem(("space",), f"circular conditions (when): {error}"))
    return found, None if found else spec


def _check_parameter(given: Any, spelled: Mapping[Path, str] | None = None) -> tuple[list[Problem], ParameterSpec | None]:
    if not isinstance(given, Mapping):
        message = f"{show(given)} is not a range; write for example {{uniform: [0, 1]}} or {{choice: [1, 2]}}"
        return [Problem((), message)], None
    found, parameter = validated(ParameterSpec, given, spelled)
    if parameter is None:
        return found, None
    kinds = [name for name in KINDS if getattr(parameter, name) is not None]
    if len(kinds) != 1:
        said = f"has {' and '.join(kinds)}" if kinds else "has no values"
        return [Problem((), f"{said}; give exactly one of {', '.join(KINDS)}")], None
    kind = kinds[0]
    if kind != "choice" and parameter.ends[0] >= parameter.ends[1]:
        found.append(Problem((kind,), f"{show(parameter.ends)} is not [lowest, highest]"))
    if parameter.step is not None and kind not in ("uniform", "randint"):
        found.append(Problem(("step",), f"{kind} takes no step; remove it, or use uniform or randint"))
    elif parameter.step is not None and kind == "randint" and not parameter.step.is_integer():
        found.append(Problem(("step",), f"{show(parameter.step)} is not a whole number"))
    elif parameter.step is not None and not found and (count(parameter) or 0) > MOST_STEPS:
        found.append(Problem(("step",), f"{show(parameter.step)} splits the range into more than {MOST_STEPS} values"))
    return found, None if found else parameter


def _contradictions(spec: SearchSpec) -> Iterator[Problem]:
    """Yield contradictions between keys of the search file."""
    kind = spec.scheduler.kind
    if spec.searcher.kind == "grid":
        counts = {key: count(parameter) for key, parameter in spec.space.items()}
        if (combinations := math.prod(number or 1 for number in counts.values())) > MOST_COMBINATIONS:
            yield Problem(
                ("space",),
                f"a grid of {combinations} values; at most {MOST_COMBINATIONS} can be tried: take larger steps or fewer keys",
            )
        for key, parameter in spec.space.items():
            if counts[key] is None:
                yield Problem(("space", key), f"a grid needs values to list; give {parameter.kind} a step, or use choice")
    elif spec.budget.trials is None and (spec.budget.minutes is None or kind == "pbt"):
        or_time = "" if kind == "pbt" else ", or budget.minutes"
        yield Problem(("budget", "trials"), f"searcher {spec.searcher.kind} never ends by itself; give a number{or_time}")
    if spec.searcher.warm_start is not None and spec.searcher.kind != "tpe":
        yield Problem(("searcher", "warm_start"), f"{spec.searcher.kind} learns from no trials; use tpe, or remove the key")
    if spec.objective.cost is not None and kind != "none":
        yield Problem(("scheduler", "kind"), f"{kind} ranks trials by one objective; use none, or no objective.cost")
    if spec.seeds is not None and len(set(spec.seeds)) < len(spec.seeds):
        yield Problem(("seeds",), f"{list(spec.seeds)} has a seed twice")
    if kind == "pbt":
        if spec.seeds is not None and len(spec.seeds) > 1:
            yield Problem(("seeds",), "pbt trains each trial with one seed: states are copied between trials")
        for key, parameter in spec.space.items():
            if parameter.when:
                yield Problem(("space", key, "when"), "pbt varies every key in every trial; remove the condition")


def _read_job(draft: Draft) -> tuple[Draft | None, list[str]]:
    """Read the base job with the search's overrides, and return it with its problems."""
    path = draft.values.get("job")
    if not isinstance(path, str) or not path:
        return None, []
    try:
        job = read_file(path)
    except JobError as error:
        where = origin(draft, ("job",))
        return None, [f"{where.label}: job: {problem}" for problem in error.problems]
    overrides = draft.values.get("overrides")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            put(job, tuple(key.split(".")), value, origin(draft, ("overrides", key)))
    found, _ = check(job.values, job.unread, job.spelled)
    lines = job.mistakes + [(origin(job, problem.path), as_line(problem)) for problem in found]
    return job, [f"{where.label}: {message}" for where, message in sorted(lines, key=lambda line: line[0].line)]


def _check_space(draft: Draft, job: Draft) -> Iterator[tuple[Origin, str]]:
    """Check the job at both ends of every range, one key at a time, with the values that the key's condition requires."""
    space = draft.values.get("space")
    for key, given in space.items() if isinstance(space, Mapping) and len(space) <= MOST_KEYS else ():
        where = origin(draft, ("space", key))
        if key.count(".") >= DEEPEST:
            yield where, f"space.{key}: no key has more than {DEEPEST} parts"
            continue
        if key.split(".")[0] in FIXED:
            why = "the search sets names and seeds of its runs" if key.startswith("run.") else "it decides where a trial runs"
            yield where, f"space.{key}: cannot be searched: {why}"
            continue
        _, parameter = _check_parameter(given)
        if parameter is None:
            continue
        condition = {other: wanted[0] if isinstance(wanted, list) else wanted for other, wanted in parameter.when.items()}
        wrong = [problem for problem in _problems(job, condition) if dotted(problem.path) in condition]
        for path, message in wrong:
            yield where, f"space.{key}.when: {dotted(path)}: {message}"
        for end in [] if wrong else parameter.ends:
            for path, message in _problems(job, {**condition, key: end}):
                if dotted(path) == key and message.startswith("unknown key"):
                    yield where, f"space.{key}: {message}"  # the same at both ends, so it is reported once
                else:
                    yield where, f"space.{key} at {show(end)}: {dotted(path)}: {message}"


def _problems(job: Draft, values: Mapping[str, Any]) -> list[Problem]:
    found, _ = check(with_values(job.values, values))
    return found


def _unfit(search: Search) -> Iterator[Problem]:
    """Yield the requirements of the search that its base job does not meet."""
    kind, base = search.spec.scheduler.kind, search.base
    if kind != "none" and base.eval.every_epochs >= base.optim.epochs:
        yield Problem(
            ("scheduler", "kind"),
            f"{kind} judges trials while they train, but the job evaluates only at its end (eval.every_epochs "
            f"{base.eval.every_epochs} of {base.optim.epochs} epochs); override eval.every_epochs, or use none",
        )
    if base.data.max_batch_size is not None:
        yield Problem(
            ("job",),
            "data.max_batch_size would give trials different batch sizes, so that they could not be compared; override it with "
            "null, and data.batch_size with the size that one run has found",
        )
    if search.spec.objective.cost == "onnx_latency" and not isinstance(base.student, PyramidDetectorSpec):
        yield Problem(("objective", "cost"), f"a student of kind {base.student.kind} cannot be exported to ONNX; use latency")
    if base.eval.placement == "task":
        yield Problem(
            ("overrides",),
            "several trials could wait for each other's resources with eval.placement task; override it: trainers",
        )
    if kind == "pbt":
        if base.cluster.workers != 0:
            yield Problem(("scheduler", "kind"), "pbt copies states between processes; override cluster.workers: 0")
        values = base_values(search)
        for key, parameter in search.spec.space.items():
            if not MUTABLE.fullmatch(key):
                yield Problem(
                    ("space", key),
                    "pbt changes values during training, which is only possible for lr, weight_decay, momentum, clip_norm and "
                    "gamma of optim, and the weights, ckd_epochs and warmup_steps of distill; remove the key",
                )
            elif not contains(parameter, values.get(key)):
                given = show(values.get(key))
                yield Problem(("space", key), f"pbt starts from the base job's value, and {given} is not in the range")
