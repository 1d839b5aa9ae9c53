"""Finished runs, grouped into rows: the runs of one job with different seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from headkd_ray.engine.checkpoint import STUDENT_FOLDER
from headkd_ray.engine.log import flattened, records_in
from headkd_ray.engine.run import FREE_KEYS, FREE_SECTIONS, JOB_FILE, finished
from headkd_ray.errors import JobError, UserError
from headkd_ray.job import Job
from headkd_ray.storage import Folder

OWN_KEYS = ("run.", *(f"{section}." for section in FREE_SECTIONS), *FREE_KEYS, "eval.placement")
"""Keys in which the runs of one row may differ: they do not decide what a run learns, except for the seed."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended."""

    folder: Folder
    job: Job
    result: Mapping[str, Any]
    """Its result.json."""
    curve: tuple[tuple[float, float], ...]
    """(epoch, AP on data.val in percent) of each evaluation."""
    hours: float | None
    """Hours of training steps, times the number of workers; None if the log does not say."""

    @property
    def student(self) -> str:
        """Address of the student's checkpoint."""
        return (self.folder / STUDENT_FOLDER).address

    @property
    def learned(self) -> dict[str, Any]:
        """The keys that decide what is learned, without the seed."""
        keys = dict(flattened(self.job.model_dump(mode="json"), "."))
        keys = {key: value for key, value in keys.items() if not key.startswith(OWN_KEYS)}
        data = {key: value[:12] for key, value in self.result.get("data", {}).items()}  # which data, wherever it is
        return {**keys, "cluster.workers": max(1, self.job.cluster.most_workers), **data}


@dataclass(frozen=True)
class Row:
    """The runs of one job with different seeds."""

    name: str
    runs: Mapping[int, FinishedRun]
    """By seed."""

    @property
    def learned(self) -> dict[str, Any]:
        """The keys that decide what is learned, without the seed."""
        return next(iter(self.runs.values())).learned


def read_run(address: str) -> FinishedRun:
    """Read a run's folder (path or URI). Raises UserError if it is not that of a run that has ended."""
    folder = Folder.open(address)
    if not folder.has(JOB_FILE):
        raise UserError(f"{folder.uri}: is not the folder of a run (it has no {JOB_FILE}); name <run.storage>/<run.name>")
    try:
        job = Job.model_validate(json.loads(folder.read(JOB_FILE)))
    except (ValueError, ValidationError) as error:
        raise UserError(f"{folder.named(JOB_FILE)}: is damaged, or another version's job ({_first(error)})") from error
    result = finished(folder)
    if result is None:
        raise UserError(f"{folder.uri}: the run has not ended; finish it first (the same headkd train command resumes it)")
    records = list(records_in(folder))
    curve = tuple(
        (record["epoch"], record["val"]["AP"]) for record in records if "val" in record and record["val"]["AP"] is not None
    )
    return FinishedRun(folder, job, result, curve, _hours(job, records))


def rows_of(runs: Sequence[FinishedRun]) -> list[Row]:
    """Group runs into rows, named after the method and, where rows share a method, the keys in which they differ.

    Raises UserError if a seed comes twice in a row.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.learned, sort_keys=True), []).append(run)
    rows, problems = [], []
    names = _names([members[0] for members in groups.values()])
    for name, members in zip(names, groups.values(), strict=True):
        by_seed: dict[int, FinishedRun] = {}
        for run in members:
            twin = by_seed.setdefault(run.job.run.seed, run)
            if twin is not run:
                problems.append(f"{twin.folder.uri} and {run.folder.uri} have the same job and seed; leave one out")
        rows.append(Row(name, dict(sorted(by_seed.items()))))
    if problems:
        raise UserError(problems)
    return rows


def reference_of(rows: Sequence[Row], name: str | None) -> Row:
    """Return the row that others are compared with: the one of that name, else the first without a teacher or assistants."""
    if name is None:
        return next((row for row in rows if row.learned["method"] == "supervised"), rows[0])
    for row in rows:
        if row.name == name:
            return row
    raise JobError(f"--against {name}: there is no such row; one of {', '.join(row.name for row in rows)}")


def differences(row: Row, reference: Row) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two rows differ, besides those of the method, with both values (the reference's first)."""
    one, other = reference.learned, row.learned
    keys = sorted(one.keys() | other.keys())
    return {
        key: (one.get(key), other.get(key))
        for key in keys
        if one.get(key) != other.get(key) and not key.startswith(("method", "teacher", "distill."))
    }


def _names(firsts: Sequence[FinishedRun]) -> list[str]:
    """Return a name for each row, given its first run."""
    names = []
    for run in firsts:
        alike = [other.learned for other in firsts if other.job.method == run.job.method]
        keys = sorted({key for learned in alike for key in learned})
        varied = [key for key in keys if len({json.dumps(learned.get(key)) for learned in alike}) > 1]
        told = ", ".join(f"{key.removeprefix('distill.')}={run.learned.get(key)}" for key in varied)
        names.append(f"{run.job.method} ({told})" if varied else run.job.method)
    return names


def _hours(job: Job, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time of the windows of steps, from their rate, times the workers."""
    images = job.data.batch_size * job.optim.accumulate * max(1, job.cluster.most_workers)
    seconds, before = 0.0, 0
    for record in records:
        if record.get("images_per_second"):
            seconds += (record["step"] - before) * images / record["images_per_second"] * record.get("workers", 1)
            before = record["step"]
    return seconds / 3600 if seconds else None


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
