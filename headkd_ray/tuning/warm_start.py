"""The trials of an earlier search, from which a new one learns (``searcher.warm_start``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from headkd_ray.errors import JobError
from headkd_ray.tuning.space import MISSING, Search, Values, contains, ordered, value_at, varied
from headkd_ray.tuning.trial_records import SearchFolder, Trial

ENDED = ("finished", "stopped")


def earlier_trials(search: Search, warn: Callable[[str], None]) -> list[Trial]:
    """Return the ended trials of ``searcher.warm_start`` whose values lie in the space, with the values of its keys.

    A key that the earlier search did not vary has the value of its base job.

    Args:
        warn: called for each trial that cannot be read, and with how many are outside the space.

    Raises:
        JobError: there is no search, it had another objective, or none of its trials can be used.
    """
    place = search.spec.searcher.warm_start
    if place is None:
        return []
    key = f"searcher.warm_start: {place}"
    folder = SearchFolder.open(place)
    try:
        other = folder.search()
    except JobError as error:
        raise JobError([f"searcher.warm_start: {problem}" for problem in error.problems]) from error
    if other.spec.objective != search.spec.objective:
        had, has = (
            " and ".join(filter(None, (each.spec.objective.metric, each.spec.objective.cost))) for each in (other, search)
        )
        raise JobError(f"{key} is a search for {had}, this one for {has}; trials of another objective teach nothing about it")
    ended = [trial for trial in folder.trials(other, warn) if trial.state in ENDED]
    found = [replace(trial, values=values) for trial in ended if (values := _values(trial, other, search)) is not None]
    if not found:
        raise JobError(f"{key}: none of its {len(ended)} ended trials has values in this space; widen it, or remove the key")
    if len(found) < len(ended):
        warn(f"{key}: {len(ended) - len(found)} of {len(ended)} ended trials have values outside this space and are left out")
    return found


def _values(trial: Trial, other: Search, search: Search) -> Values | None:
    """Return the values that the trial's job has of the space's keys; None if one of them is outside."""
    base = other.base
    job = other.job(trial.values, "trial", base.run.storage, base.run.seed)
    values: Values = {}
    for key in ordered(search.spec.space):
        if varied(key, search, search.base, values):
            value = value_at(job, key)
            if value is MISSING or not contains(search.spec.space[key], value):
                return None
            values[key] = value
    return values
