"""The search space: when a key is varied, which values it may take, and the job that results from a trial's values."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.job.keys import dotted
from headkd_ray.job.load import check
from headkd_ray.tuning.search_spec import ParameterSpec, SearchSpec

Values = dict[str, Any]
"""Values by dotted job key, for the keys that are varied in a trial."""
MISSING = object()


@dataclass(frozen=True)
class Search:
    """A validated search file with its base job."""

    spec: SearchSpec
    written: dict[str, Any]
    """The base job's plain values as written, including the search file's overrides but no defaults, since a section's defaults
    depend on its ``kind``, which may be searched."""

    @cached_property
    def base(self) -> Job:
        """The base job, whose values trial 0 has."""
        return job_of(self.written, {})

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds with which each trial is trained."""
        return self.spec.seeds or (self.base.run.seed,)

    def job(self, values: Values, name: str, storage: str, seed: int) -> Job:
        """Return the job of one training run of a trial. Raises JobError if the values are incompatible."""
        return job_of(self.written, {**values, "run.name": name, "run.storage": storage, "run.seed": seed})


def job_of(written: Mapping[str, Any], values: Mapping[str, Any]) -> Job:
    """Return the job with some keys replaced. Raises JobError."""
    problems, job = check(with_values(written, values))
    if job is None:
        raise JobError([f"{dotted(problem.path)}: {problem.message}" for problem in problems])
    return job


def with_values(written: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a job's plain values with dotted keys replaced; sections that are null or missing are created."""
    changed = copy.deepcopy(dict(written))
    for key, value in values.items():
        *parents, last = key.split(".")
        section = changed
        for name in parents:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = copy.deepcopy(value)
    return changed


def value_at(job: Job, key: str) -> Any:
    """Return the plain value of a dotted key, or MISSING if a section above it is null."""
    value: Any = job.model_dump(mode="json")
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def ordered(space: Mapping[str, ParameterSpec]) -> list[str]:
    """Return the keys, each after those that its ``when`` names. Raises ValueError, naming the keys, if they form a cycle."""
    order: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [key for key in waiting if not any(other in waiting for other in space[key].when)]
        if not ready:
            raise ValueError(", ".join(waiting))
        order += ready
        waiting = [key for key in waiting if key not in ready]
    return order


def varied(key: str, search: Search, base: Job, values: Values) -> bool:
    """Return whether the key is varied in a trial, given the values of the keys before it."""
    for other, wanted in search.spec.space[key].when.items():
        value = values[other] if other in values else value_at(base, other)
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def base_values(search: Search) -> Values:
    """Return the values of trial 0: the base job's values of the keys that are varied in it."""
    values: Values = {}
    base = search.base
    for key in ordered(search.spec.space):
        value = value_at(base, key)
        if value is not MISSING and varied(key, search, base, values):
            values[key] = value
    return values


def contains(parameter: ParameterSpec, value: Any) -> bool:
    """Return whether the parameter may take this value."""
    if parameter.choice is not None:
        return value in parameter.choice
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = parameter.ends
    whole = "int" not in parameter.kind or float(value).is_integer()
    steps = 0.0 if parameter.step is None else (value - low) / parameter.step
    inside = low <= value <= high or math.isclose(value, high, rel_tol=1e-9)  # a sum of steps may exceed it by a rounding error
    return inside and whole and math.isclose(steps, round(steps), abs_tol=1e-6)


def count(parameter: ParameterSpec) -> int | None:
    """Return the number of values if they can be listed, else None."""
    if parameter.choice is not None:
        return len(parameter.choice)
    low, high = parameter.ends
    if parameter.kind == "randint":
        return int((high - low) // int(parameter.step or 1)) + 1
    return None if parameter.step is None else math.floor((high - low) / parameter.step + 1e-9) + 1


def listed(parameter: ParameterSpec) -> list[Any] | None:
    """Return all values if they can be listed (choices, whole numbers, steps), else None."""
    if parameter.choice is not None:
        return list(parameter.choice)
    number = count(parameter)
    return None if number is None else [_step(parameter, index) for index in range(number)]


def _step(parameter: ParameterSpec, index: int) -> Any:
    low, step = parameter.ends[0], parameter.step or 1
    return low + index * int(step) if parameter.kind == "randint" else rounded(low + index * step)


def nearest(parameter: ParameterSpec, value: Any) -> Any:
    """Return the value closest to ``value`` that the parameter may take."""
    if contains(parameter, value) or parameter.choice is not None:
        return value
    low, high = parameter.ends
    number = count(parameter)
    if number is not None:
        index = math.ceil((value - low) / (parameter.step or 1) - 0.5)  # of two that are equally close, the lower
        return _step(parameter, min(max(index, 0), number - 1))
    return min(max(round(value) if "int" in parameter.kind else value, low), high)


def rounded(value: float) -> float:
    """Remove the rounding error of a sum of steps: 1.7000000000000002 becomes 1.7."""
    return float(f"{value:.12g}")


def grid(search: Search) -> Iterator[Values]:
    """Yield each combination of listed values once, without the keys that are not varied and without the base job's own."""
    base = search.base
    known = [base_values(search)]
    keys = ordered(search.spec.space)
    for combination in itertools.product(*(listed(search.spec.space[key]) or [] for key in keys)):
        values: Values = {}
        for key, value in zip(keys, combination, strict=True):
            if varied(key, search, base, values):
                values[key] = value
        if values not in known:
            known.append(values)
            yield values
