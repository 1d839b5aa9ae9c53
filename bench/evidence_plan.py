"""Turn a row of the evidence into a job. The command is ``bench/evidence.py``."""

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
from headkd_ray.job import Job, PyramidDetectorSpec, load_job


@dataclass(frozen=True)
class Row:
    """A row: a job file of the tier with some keys changed, and the rows that it is compared with."""

    job: str
    """Name of the job file in jobs/evidence/TIER, without its suffix."""
    keys: str = ""
    """Overrides, ``key.path=value`` each, quoted as in a shell."""
    against: tuple[str, ...] = ()
    """Rows to take paired differences to, the matched baseline first. All have this row's data, student and schedule."""
    teacher: str | None = None
    """The row whose student, trained with seed 0, is this row's teacher."""
    lr_of: str | None = None
    """The row whose learning rate this row takes; None: it has a search of its own."""
    train: str = "train"
    """The split that it trains on."""
    unlabelled: str | None = None
    """The split whose images it trains on without their labels."""
    predicted: str | None = None
    """The split on which its teacher's detections are pseudo labels; None: the teacher itself teaches, if there is one."""


@dataclass(frozen=True)
class Bench:
    """Paths and rows of a tier, and the time limit."""

    tier: str
    rows: Mapping[str, Row]
    jobs: Path
    """Folder of the tier's job files; its ``choices.json`` records what searches found, by row."""
    data: Path
    storage: Path
    results: Path
    deadline: float = math.inf
    """``time.monotonic()`` after which nothing new is started."""

    @property
    def choices(self) -> Path:
        return self.jobs / "choices.json"

    @property
    def teachers(self) -> set[str]:
        """The rows that teach others. They are trained once, with seed 0."""
        return {spec.teacher for spec in self.rows.values() if spec.teacher is not None}

    def fingerprint(self, split: str) -> str:
        """Return the fingerprint of a prepared split. Raises DataError."""
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
    """Digest of everything that decides the figures, except seed and code."""
    matched: str
    """Digest of data, student and schedule without the learning rate. Rows that share it can be compared."""
    search: str
    """Digest of everything that the search for a learning rate depends on."""
    searched: bool
    """Whether the learning rate was chosen by a search."""


def plan(bench: Bench, row: str, seed: int, lr: float | None = None) -> Plan:
    """Return the plan of a row. Without ``lr`` it has the learning rate that a search found, or else its job file's."""
    spec = bench.rows[row]
    places = {"run.storage": bench.storage, "data.train": bench.data / spec.train, "data.val": bench.data / "val"}
    if spec.unlabelled is not None:
        places["data.unlabelled"] = bench.data / spec.unlabelled
    taught_by = None
    if spec.teacher is not None:
        teacher = plan(bench, spec.teacher, 0)
        taught_by = teacher.key
        if spec.predicted is None:
            places["teacher.checkpoint"] = bench.storage / teacher.job.run.name / "student"
        else:
            places["teacher.predictions"] = bench.storage / f"predictions-{taught_by}-{Path(spec.predicted).name}.json"
    keys = [*shlex.split(spec.keys), *(f"{key}={json.dumps(str(place))}" for key, place in places.items())]
    job = load_job(bench.jobs / f"{spec.job}.yaml", [*keys, f"run.seed={seed}"])
    if weights := _weights_file(job):  # it lies with the data
        job = job.replace({"student.backbone.weights": str(bench.data / "weights" / weights)})
    decides = _decides(bench, spec, job)
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
        # The name only has to keep caches apart; the cache's recipe says whether it is the right one.
        name = f"cache-{taught_by}-{job.data.views}-{job.distill.roi_budget}-{job.teacher.cache.dtype}"
        changed["teacher.cache.path"] = str(bench.storage / name)
    alike = {**decides, "splits": {name: found for name, found in decides["splits"].items() if name != "unlabelled"}}
    matched = _digest({name: alike[name] for name in ("splits", "data", "kind", "student", "optim")})
    return Plan(row, job.replace(changed), key, matched, search, searched)


def _decides(bench: Bench, spec: Row, job: Job) -> dict[str, Any]:
    """Return what decides a row's figures, apart from seed, learning rate and teacher.

    Defaults are left out, so that results stay valid when the job file gains a key.
    """
    sections = ("method", "data", "student", "distill", "teacher", "optim")
    found = {name: {} for name in sections} | job.model_dump(mode="json", include=set(sections), exclude_defaults=True)
    places_in = {"data": ("train", "val", "unlabelled"), "teacher": ("checkpoint", "predictions"), "optim": ("lr",)}
    for section, places in places_in.items():
        found[section] = {key: value for key, value in found[section].items() if key not in places}
    if weights := _weights_file(job):
        found["student"]["backbone"]["weights"] = weights
    splits = {name: bench.fingerprint(split) for name, split in {"train": spec.train, "val": "val", "test": "test"}.items()}
    if spec.unlabelled is not None:
        splits["unlabelled"] = bench.fingerprint(spec.unlabelled)
    return {**found, "kind": job.student.kind, "eval": job.eval.every_epochs, "splits": splits}


def _weights_file(job: Job) -> str | None:
    """Return the name of the file with the backbone's initial weights; None if they are in none."""
    if not isinstance(job.student, PyramidDetectorSpec):
        return None
    weights = Path(job.student.backbone.weights)
    return weights.name if weights.suffix else None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def choices(bench: Bench) -> dict[str, Any]:
    """Return what searches have found, by row."""
    return json.loads(bench.choices.read_text(encoding="utf-8")) if bench.choices.exists() else {}
