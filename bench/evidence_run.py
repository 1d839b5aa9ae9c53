"""Train the rows of the evidence and record them. The command is ``bench/evidence.py``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence_plan import Bench, Plan, plan
from evidence_tables import METRICS, append, read
from revision import revision

from headkd_ray import cache
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.run import finished, run_folder
from headkd_ray.evaluate import detect_split, evaluate_checkpoint
from headkd_ray.job import Job, TeacherSpec
from headkd_ray.report.console import line
from headkd_ray.teacher.verify import open_builder
from headkd_ray.train import train


class OutOfTimeError(Exception):
    """The command's time limit has passed."""


class BusyError(Exception):
    """Another process is working on the row, or on something that the row needs."""


@contextmanager
def locked(bench: Bench, name: str) -> Iterator[None]:
    """Hold a lock that the operating system releases when this process ends. Raises BusyError."""
    bench.storage.mkdir(parents=True, exist_ok=True)
    with (bench.storage / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(name) from None
        yield


def work(bench: Bench, tasks: Sequence[Callable[[], None]]) -> None:
    """Do all tasks, coming back later to those that another process is working on. Raises OutOfTimeError."""
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
    """Train a row with one seed and append its record to the results, unless it is there. Raises OutOfTimeError, BusyError."""
    todo = plan(bench, row, seed)
    if _recorded(bench, todo, seed):
        print(f"{row}, seed {seed}: already recorded")
        return
    have_teacher(bench, row)
    with locked(bench, todo.job.run.name):
        if _recorded(bench, todo, seed):
            return
        result = train_row(bench, todo)
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
            "teacher": None if todo.job.teacher is None else _weights(todo.job.teacher),
            **_environment(todo.job),
        }
        append(bench.results, record)
        print(f"{row}, seed {seed}: test AP {record['AP']}, val AP {record['val_AP']}, {record['seconds']} s", flush=True)


def have_teacher(bench: Bench, row: str) -> None:
    """Train the row's teacher if its weights are missing here, as on another machine: only records are committed.

    If the row learns from its detections, they are made, too.
    """
    teacher = bench.rows[row].teacher
    if teacher is None:
        return
    todo = plan(bench, teacher, 0)
    if not _recorded(bench, todo, 0):
        run(bench, teacher, 0)
    elif finished(run_folder(todo.job)) is None:
        with locked(bench, todo.job.run.name):
            train_row(bench, todo)
    split, learner = bench.rows[row].predicted, plan(bench, row, 0).job.teacher
    if split is None or learner is None or learner.predictions is None or Path(learner.predictions).exists():
        return
    with locked(bench, Path(learner.predictions).name):
        data = str(bench.data / split)
        found = detect_split(str(bench.storage / todo.job.run.name / "student"), ShardSet.open(data), data)
        draft = Path(f"{learner.predictions}.tmp")
        draft.write_text(json.dumps(found.results), encoding="utf-8")
        draft.rename(learner.predictions)


def _weights(teacher: TeacherSpec) -> str:
    """Return a digest of a teacher's weights, or of its predictions, since one that is trained again on another machine is not
    quite the same."""
    _, place = teacher.source
    file = Path(place) / "model.safetensors" if teacher.is_network else Path(place)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:10]


def _recorded(bench: Bench, todo: Plan, seed: int) -> bool:
    wanted = {"tier": bench.tier, "row": todo.row, "seed": seed, "job": todo.key}
    return any(wanted.items() <= record.items() for record in read(bench.results))


def train_row(bench: Bench, todo: Plan) -> dict[str, Any]:
    """Train to the end, resuming if the run was interrupted, and return the run's result."""
    job = todo.job
    Distributed.here(job.cluster)  # sets the number of threads, for building a cache and for evaluation too
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
    builder = open_builder(job, Distributed.here(job.cluster).device)
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
    """Return the images seen and the seconds of the training steps.

    Waiting for data counts, evaluation and checkpoints do not. A step that was repeated after an interruption counts once.
    """
    images = sampling_of(training_set(job), job.data).images * job.optim.epochs
    steps, seconds = 0, 0.0
    for text in run_folder(job).read("log.jsonl").decode().splitlines():
        record = json.loads(text)
        if "losses" in record:
            seconds += (record["step"] - steps) * images / record["steps"] / record["images_per_second"]
            steps = record["step"]
    return {"images": images, "seconds": round(seconds, 1)}


def _environment(job: Job) -> dict[str, Any]:
    """Return the versions, machine and date of a record."""
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(text.partition(":")[2].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def forget(bench: Bench, rows: Sequence[str]) -> None:
    """Delete the records and runs of rows and of the rows that they teach, so that they are made again after a bug."""
    gone = {row for row, spec in bench.rows.items() if row in rows or spec.teacher in rows}
    kept = [record for record in read(bench.results) if record["tier"] != bench.tier or record["row"] not in gone]
    bench.results.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    for folder in bench.storage.glob("*-*"):
        caches = folder.name.startswith("cache-") and any(row in bench.teachers for row in gone)
        if folder.is_dir() and (caches or folder.name.split("-")[0] in gone):
            shutil.rmtree(folder)
