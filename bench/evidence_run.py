"""A row of the evidence: its job, its run, its search for a learning rate. ``bench/evidence.py`` is the command."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence_tables import METRICS, append, read

from headkd_ray import cache
from headkd_ray.data.plan import train_rows
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.engine.caching import open_builder
from headkd_ray.engine.run import finished, run_folder
from headkd_ray.engine.world import World
from headkd_ray.errors import DataError, TrainingError
from headkd_ray.evaluate import evaluate_checkpoint
from headkd_ray.job import Job, load_job
from headkd_ray.report.console import line
from headkd_ray.train import train

ROOT = Path(__file__).resolve().parents[1]

SEARCH_SEED = 100
SEARCH_FACTORS = (0.5, 1.0, 2.0)
"""Learning rates tried for each row, as multiples of its job file's."""


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


# --- a row as a job ---


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
        job = job.model_copy(update={"optim": job.optim.model_copy(update={"lr": lr})})
    key = _digest({**decides, "lr": job.optim.lr, "taught_by": taught_by})
    changed: dict[str, Any] = {"run": job.run.model_copy(update={"name": f"{row}-{key}-{seed}"})}
    if job.teacher is not None and job.teacher.placement == "cache":
        # The name has to keep caches apart; whether a cache is the right one, its recipe says.
        name = f"cache-{taught_by}-{job.data.views}-{job.distill.roi_budget}-{job.teacher.cache.dtype}"
        kept = job.teacher.cache.model_copy(update={"path": str(bench.storage / name)})
        changed["teacher"] = job.teacher.model_copy(update={"cache": kept})
    matched = _digest({name: decides[name] for name in ("splits", "data", "kind", "student", "optim")})
    return Plan(row, job.model_copy(update=changed), key, matched, search, searched)


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


# --- running ---


class OutOfTimeError(Exception):
    """The command's minutes are over."""


class BusyError(Exception):
    """Another process is at it, or at what it needs."""


@contextmanager
def locked(bench: Bench, name: str) -> Iterator[None]:
    """Hold a lock that ends with this process. Raises BusyError."""
    bench.storage.mkdir(parents=True, exist_ok=True)
    with (bench.storage / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(name) from None
        yield


def work(bench: Bench, tasks: Sequence[Callable[[], None]]) -> None:
    """Do all tasks; those that other processes are at come again later. Raises OutOfTimeError."""
    waiting = list(tasks)
    while waiting:
        busy = []
        for task in waiting:
            if time.monotonic() > bench.deadline:
                raise OutOfTimeError
            try:
                task()
            except BusyError:
                busy.append(task)
        if len(busy) == len(waiting):
            time.sleep(min(5.0, max(0.0, bench.deadline - time.monotonic())))
        waiting = busy


def run(bench: Bench, row: str, seed: int) -> None:
    """One row and seed to its line in the results, unless the line is there. Raises OutOfTimeError, BusyError."""
    todo = plan(bench, row, seed)
    if _recorded(bench, todo, seed):
        print(f"{row}, seed {seed}: recorded")
        return
    _have_teacher(bench, row)
    with locked(bench, todo.job.run.name):
        if _recorded(bench, todo, seed):
            return
        result = _train(bench, todo)
        found = evaluate_checkpoint(result["student"], str(bench.data / "test"), todo.job.eval.batch_size).as_dict()
        record = {
            "tier": bench.tier,
            "row": row,
            "seed": seed,
            **{name: None if found[name] is None else round(found[name], 3) for name in METRICS},
            "val_AP": round(result["best"]["AP"], 3),
            **_cost(todo.job),
            "parameters": sum(p.numel() for p in load_checkpoint(result["student"]).detector.parameters()),
            "lr": todo.job.optim.lr,
            "searched": todo.searched,
            "job": todo.key,
            "matched": todo.matched,
            "teacher": None if todo.job.teacher is None else _weights(todo.job.teacher.checkpoint),
            **_environment(todo.job),
        }
        append(bench.results, record)
        print(f"{row}, seed {seed}: test AP {record['AP']}, val AP {record['val_AP']}, {record['seconds']} s", flush=True)


def _have_teacher(bench: Bench, row: str) -> None:
    """Train the row's teacher if its weights are not here: they are not committed, as its line is."""
    teacher = bench.rows[row].teacher
    if teacher is None:
        return
    todo = plan(bench, teacher, 0)
    if not _recorded(bench, todo, 0):
        run(bench, teacher, 0)
    elif finished(run_folder(todo.job)) is None:
        with locked(bench, todo.job.run.name):
            _train(bench, todo)


def _weights(checkpoint: str) -> str:
    """Digest of a checkpoint's weights: a teacher that is trained again on another machine is not quite the same."""
    return hashlib.sha256((Path(checkpoint) / "model.safetensors").read_bytes()).hexdigest()[:10]


def _recorded(bench: Bench, todo: Plan, seed: int) -> bool:
    wanted = {"tier": bench.tier, "row": todo.row, "seed": seed, "job": todo.key}
    return any(wanted.items() <= record.items() for record in read(bench.results))


def _train(bench: Bench, todo: Plan) -> dict[str, Any]:
    """Train to the end, or on from where it was stopped; the run's result."""
    job = todo.job
    World.here(job.cluster)  # its threads, for building a cache and for evaluation too
    if job.teacher is not None and job.teacher.placement == "cache":
        _fill_cache(bench, job)

    def tell(record: dict[str, Any]) -> None:
        if "losses" not in record or record["step"] == record["steps"]:
            return
        if record["epoch"] == int(record["epoch"]):
            print(f"{job.run.name}  {line(record)}", flush=True)
        if time.monotonic() > bench.deadline:
            raise OutOfTimeError

    return train(job, tell)


def _fill_cache(bench: Bench, job: Job) -> None:
    builder = open_builder(job, World.here(job.cluster).device)
    if not builder.cache.missing():
        return
    name = Path(builder.cache.folder.path).name

    def done(unit: tuple[int, int], size: int) -> None:
        if time.monotonic() > bench.deadline:
            raise OutOfTimeError

    with locked(bench, name):
        started = time.monotonic()
        cache.build(job, builder, done)
        print(f"{name}: built in {time.monotonic() - started:.0f} s", flush=True)


def _cost(job: Job) -> dict[str, Any]:
    """Images seen, and seconds of the training steps (waiting for data included, evaluation and checkpoints not); a step that
    an interruption had repeated counts once."""
    images = len(train_rows(ShardSet.open(job.data.train).index, job.data.keep_empty)) * job.optim.epochs
    steps, seconds = 0, 0.0
    for text in run_folder(job).read("log.jsonl").decode().splitlines():
        record = json.loads(text)
        if "losses" in record:
            seconds += (record["step"] - steps) * images / record["steps"] / record["images_per_second"]
            steps = record["step"]
    return {"images": images, "seconds": round(seconds, 1)}


def _environment(job: Job) -> dict[str, Any]:
    """Code, versions, machine, date."""
    on_gpu = job.cluster.gpus_per_worker != 0 and torch.cuda.is_available()
    return {
        "revision": revision(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{_cpu()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def revision() -> str:
    """Short hash of the checkout, with -dirty if code or jobs differ from it (results, tables and choices may)."""
    code = ("headkd_ray", "bench", "jobs", ":!jobs/evidence/*/choices.json")
    try:
        done = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", *code])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0] + ("-dirty" if done[1] else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(text.partition(":")[2].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- choosing the learning rate ---


def searches(bench: Bench, rows: Sequence[str]) -> list[Callable[[], None]]:
    """Tasks that choose the learning rates of rows. A teacher keeps its job file's: all its students share it."""
    wanted = {bench.rows[row].lr_of or row for row in rows} - bench.teachers
    return [partial(try_lr, bench, row, factor) for row in bench.rows if row in wanted for factor in SEARCH_FACTORS]


def try_lr(bench: Bench, row: str, factor: float) -> None:
    """Train a row with one learning rate and keep its AP on val; the last one to come chooses."""
    written = load_job(bench.jobs / f"{bench.rows[row].job}.yaml").optim.lr
    lr = written * factor
    todo = plan(bench, row, SEARCH_SEED, lr)
    if f"{lr:g}" in _tried(bench, todo):
        return
    _have_teacher(bench, row)
    with locked(bench, todo.job.run.name):
        if f"{lr:g}" in _tried(bench, todo):
            return
        try:
            found = round(_train(bench, todo)["best"]["AP"], 3)
        except TrainingError as error:
            print(f"{todo.job.run.name}: {error}")
            found = None
        _choose(bench, todo, f"{lr:g}", found, [f"{written * each:g}" for each in SEARCH_FACTORS])


def _tried(bench: Bench, todo: Plan) -> dict[str, float | None]:
    """Learning rate -> AP on val, of the search for the row as it is now."""
    found = choices(bench).get(todo.row, {})
    return found["val_AP"] if found.get("search") == todo.search else {}


def _choose(bench: Bench, todo: Plan, lr: str, ap: float | None, grid: Sequence[str]) -> None:
    while True:
        try:
            with locked(bench, "choices"):
                tried = {**_tried(bench, todo), lr: ap}
                entry: dict[str, Any] = {"search": todo.search, "val_AP": {each: tried[each] for each in grid if each in tried}}
                known = {each: value for each, value in entry["val_AP"].items() if value is not None}
                if known and len(entry["val_AP"]) == len(grid):
                    entry["lr"] = float(max(known, key=lambda each: known[each]))
                entries = {**choices(bench), todo.row: entry}
                draft = bench.choices.with_suffix(".tmp")
                draft.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")
                draft.replace(bench.choices)
                break
        except BusyError:
            time.sleep(0.1)
    print(f"{todo.row}: val AP by learning rate {entry['val_AP']}" + (f", chose {entry['lr']}" if "lr" in entry else ""))


def forget(bench: Bench, rows: Sequence[str]) -> None:
    """Delete the lines and runs of rows, and of those that they teach, so that they are made anew; after a bug."""
    gone = {row for row, spec in bench.rows.items() if row in rows or spec.teacher in rows}
    kept = [record for record in read(bench.results) if record["tier"] != bench.tier or record["row"] not in gone]
    bench.results.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    for folder in bench.storage.glob("*-*"):
        caches = folder.name.startswith("cache-") and any(row in bench.teachers for row in gone)
        if folder.is_dir() and (caches or folder.name.split("-")[0] in gone):
            shutil.rmtree(folder)
