"""Whether storage and cluster have what the job will ask of them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headkd_ray.checkup.findings import Finding, Level, gravest, skipped
from headkd_ray.checkup.subject import Subject
from headkd_ray.checkup.teacher_findings import ROOM, existing, free_bytes, gigabytes
from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.run import run_folder
from headkd_ray.errors import ClusterError, StorageError, UserError
from headkd_ray.job import Job
from headkd_ray.storage import OBJECT_STORES, Folder
from headkd_ray.text import rounded

LOCAL_PROBE, REMOTE_PROBE = 32 * 2**20, 8 * 2**20
"""Bytes that are written and read to time a storage."""
CHECKPOINTS = 3
"""Checkpoints that a run keeps or writes at a time: the last one, the best one and the next one."""
SLOW = 0.5
"""Share of a step's time from which reading its images is called slow."""


def check_storage(subject: Subject) -> Finding:
    """Write and read a file in run.storage, and see whether its disk has room for the checkpoints."""
    folder = run_folder(subject.job)
    storage, room = Folder.open(subject.job.run.storage), free_bytes(folder)
    try:
        written, read = _rates(storage)
    except (OSError, StorageError) as error:
        mend = "Make room or get access, or choose another run.storage."
        return Finding("storage", "red", f"{storage.uri} cannot be written ({error})", mend)
    figures: dict[str, Any] = {"write_bytes_per_second": written, "read_bytes_per_second": read, "free_bytes": room}
    found = f"{storage.uri} writes {gigabytes(written)} and reads {gigabytes(read)} a second"
    level: Level = "green"
    needed = _checkpoint_bytes(subject)
    if needed is not None:
        figures["checkpoint_bytes"] = needed
        found += f"; a checkpoint has {gigabytes(needed)}"
        if room is not None and room < ROOM * CHECKPOINTS * needed:
            level = "red" if room < CHECKPOINTS * needed else "yellow"
    found += "" if room is None else f"; {gigabytes(room)} are free"
    mend = f"Make room for {CHECKPOINTS} checkpoints (the last, the best and the next one), or choose another run.storage."
    return Finding("storage", level, found, mend if level != "green" else None, figures)


def _checkpoint_bytes(subject: Subject) -> int | None:
    try:
        return subject.trial().state_bytes
    except UserError:  # which the check of the steps tells
        return None


def check_reading(subject: Subject) -> Finding:
    """Read images of both splits, and compare the rate with what the training steps take."""
    told, figures, levels = [], dict[str, Any](), list[Level](["green"])
    for name, shards in subject.splits.items():
        size = sum(shard.bytes for shard in shards.meta.shards) / len(shards.index)
        rate = _read_rate(shards)
        figures[name] = {"bytes_per_second": rate, "bytes_per_image": round(size)}
        told.append(f"{name}: {gigabytes(rate)} a second, {rate / size:,.0f} images of {size / 1e3:,.0f} kB")
    try:
        trial = subject.trial()
    except UserError:
        trial = None
    if trial is not None and "train" in figures:
        seconds = trial.images * figures["train"]["bytes_per_image"] / figures["train"]["bytes_per_second"]
        if seconds > SLOW * trial.seconds:
            levels.append("yellow")
            told.append(f"reading a batch takes {rounded(seconds)} s, and a step {rounded(trial.seconds)} s")
    mend = "Copy the splits to a disk of the machines that train, or to storage that is nearer."
    level = gravest(levels)
    return Finding("reading", level, "; ".join(told), mend if level != "green" else None, figures)


def check_cluster(subject: Subject) -> Finding:
    """Compare what the job requests with the cluster that it names; Ray is imported only then."""
    job = subject.job
    if job.cluster.workers == 0:
        return skipped("cluster", "cluster.workers: 0: the run needs no Ray")
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return skipped(
            "cluster",
            f"neither cluster.address nor RAY_ADDRESS names one; train would use a Ray of this machine, which has "
            f"{os.cpu_count()} CPUs and {_gpus()} GPUs, and the job requests {_request(job)}",
        )
    try:
        from headkd_ray.cluster.connect import connected  # late: the other checks run where Ray is not installed
        from headkd_ray.cluster.resources import check_resources
    except ImportError as error:
        return skipped("cluster", f"Ray cannot be imported ({error})")
    try:
        with connected(job.cluster):
            resources = check_resources(job)
    except ClusterError as error:
        return Finding("cluster", "red", "; ".join(error.problems), "Start the machines, or request less.")
    found = f"the cluster at {address} has room for {_request(job)}"
    return Finding("cluster", "green", found, None, {"gpus_per_worker": resources.gpus_per_worker})


def _request(job: Job) -> str:
    """Say what the smallest number of workers requests."""
    spec, workers = job.cluster, job.cluster.fewest_workers
    cpus = workers * (spec.cpus_per_worker + spec.data_cpus)
    gpus = "" if not spec.gpus_per_worker else f" and {workers * spec.gpus_per_worker:g} GPUs"
    return f"{cpus:g} CPUs{gpus} for {workers} {'worker' if workers == 1 else 'workers'}"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _rates(folder: Folder) -> tuple[int, int]:
    """Return the bytes a second at which a folder is written and read; what is written is deleted again."""
    name, content = f".headkd-probe-{uuid.uuid4().hex[:8]}", os.urandom(REMOTE_PROBE if folder.remote else LOCAL_PROBE)
    folder = existing(folder)
    if folder.remote and folder.fs.type_name not in OBJECT_STORES:
        folder.create()
    try:
        write = (lambda: folder.write(name, content)) if folder.remote else (lambda: _write(Path(folder.at(name)), content))
        written = _timed(write)
        read = _timed(lambda: folder.read(name))
    finally:
        folder.delete(name)
    return round(len(content) / written), round(len(content) / read)


def _read_rate(shards: ShardSet) -> int:
    """Return the bytes a second at which a split's first shards are read, past the system's cache where it lets us."""
    folder, seconds, size = shards.folder, 0.0, 0
    most = REMOTE_PROBE if folder.remote else LOCAL_PROBE
    for shard in shards.meta.shards:
        if not folder.remote:
            _forget(Path(folder.at(shard.name)))
        with folder.open_file(shard.name) as file:
            part = min(shard.bytes, most - size)
            seconds += _timed(lambda file=file, part=part: file.read(part))  # type: ignore[misc]
        size += part
        if size >= most:
            break
    return round(size / seconds)


def _write(path: Path, content: bytes) -> None:
    """Write a file through to the disk, so that reading it again reads the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _forget(path)


def _forget(path: Path) -> None:
    """Ask the operating system to drop a file from its cache."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return max(time.perf_counter() - started, 1e-6)
