"""A row of the evidence as a job. ``bench/evidence.py`` is the command."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError
from headkd_ray.job import Job, load_job


@dataclass(frozen=True)
class Row:
    """A job file of the tier with some keys changed, and what it is compared with."""

    job: str
    """Name of the file in jobs/evidence/TIER."""
    keys: str = ""
    """``key.path=value`` each, quoted as in a shell."""
    against: tuple[str, ...] = ()
    """Rows of the same data, student and schedule that paired differences are taken to, the matched baseline first."""
    teacher: str | None = None
    """The row whose student, of seed 0, teaches this one."""
    lr_of: str | None = None
    """The row whose learning rate this one takes; None = search for it."""


@dataclass(frozen=True)
class Bench:
    """Where everything is, and until when there is time."""

    tier: str
    rows: Mapping[str, Row]
    jobs: Path
    """The tier's job files; ``choices.json`` beside them holds what searches found, by row."""
    data: Path
    storage: Path
    results: Path
    deadline: float = math.inf
    """``time.monotonic()`` from which nothing new is begun."""

    @property
    def choices(self) -> Path:
        return self.jobs / "choices.json"

    @property
    def teachers(self) -> set[str]:
        """Rows that teach others: they are trained once, with seed 0."""
        return {spec.teacher for spec in self.rows.values() if spec.teacher is not None}

    def fingerprint(self, split: str) -> str:
        """Of a prepared split. Raises DataError."""
        try:
            return ShardSet.open(str(self.data / split)).meta.fingerprint
        except DataError as error:
            raise DataError([*error.problems, "run first: python bench/evidence.py prepare"]) from error


@dataclass(frozen=True)
class Plan:
    """A row with one seed, ready to run."""

    row: str
    job: Job
    key: str
    """Digest of what decides the figures, but for the seed and the code."""
    matched: str
    """Digest of data, student and schedule (not its learning rate): where it is equal, rows can be compared."""
    search: str
    """Digest of what a search for the learning rate depends on."""
    searched: bool
    """Was the learning rate chosen by a search?"""


def plan(bench: Bench, row: str, seed: int, lr: float | None = None) -> Plan:
    """The job of a row; ``lr`` None = the one that was searched for, or the job file's if none was."""
    spec = bench.rows[row]
    places = {"run.storage": bench.storage, "data.train": bench.data / "train", "data.val": bench.data / "val"}
    taught_by = None
    if spec.teacher is not None:
        teacher = plan(bench, spec.teacher, 0)
        taught_by, places["teacher.checkpoint"] = teacher.key, bench.storage / teacher.job.run.name / "student"
    keys = [*shlex.split(spec.keys), *(f"{key}={json.dumps(str(place))}" for key, place in places.items())]
    job = load_job(bench.jobs / f"{spec.job}.yaml", [*keys, f"run.seed={seed}"])
    decides = _decides(bench, job)
    search = _digest(decides)
    if lr is None and spec.lr_of is not None:
        other = plan(bench, spec.lr_of, seed)
        lr = other.job.optim.lr if other.searched else None
    elif lr is None:
        found = choices(bench).get(row, {})
        lr = found.get("lr") if found.get("search") == search else None
    searched = lr is not None
    if lr is not None:
        job = job.replace({"optim.lr": lr})
    key = _digest({**decides, "lr": job.optim.lr, "taught_by": taught_by})
    changed: dict[str, Any] = {"run.name": f"{row}-{key}-{seed}"}
    if job.teacher is not None and job.teacher.placement == "cache":
        # The name has to keep caches apart; whether a cache is the right one, its recipe says.
        name = f"cache-{taught_by}-{job.data.views}-{job.distill.roi_budget}-{job.teacher.cache.dtype}"
        changed["teacher.cache.path"] = str(bench.storage / name)
    matched = _digest({name: decides[name] for name in ("splits", "data", "kind", "student", "optim")})
    return Plan(row, job.replace(changed), key, matched, search, searched)


def _decides(bench: Bench, job: Job) -> dict[str, Any]:
    """What decides a row's figures but for seed, learning rate and teacher. Defaults are left out, so that a new key of the
    job file does not make old results strangers."""
    sections = ("method", "data", "student", "distill", "teacher", "optim")
    found = {name: {} for name in sections} | job.model_dump(mode="json", include=set(sections), exclude_defaults=True)
    for section, places in {"data": ("train", "val"), "teacher": ("checkpoint",), "optim": ("lr",)}.items():
        found[section] = {key: value for key, value in found[section].items() if key not in places}
    splits = {split: bench.fingerprint(split) for split in ("train", "val", "test")}
    return {**found, "kind": job.student.kind, "eval": job.eval.every_epochs, "splits": splits}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def choices(bench: Bench) -> dict[str, Any]:
    """What searches found, by row."""
    return json.loads(bench.choices.read_text(encoding="utf-8")) if bench.choices.exists() else {}
