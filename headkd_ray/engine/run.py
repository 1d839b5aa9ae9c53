"""A run's folder, ``<run.storage>/<run.name>``: what was asked, the logs, the exported student, the result."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from headkd_ray.engine.checkpoint import METRICS_FILE, STUDENT_FOLDER
from headkd_ray.engine.log import JsonLines, Record, Sink, TensorBoard
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.storage import Folder

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
# Sections that may change when a run is resumed: they decide where and how loudly it trains, not what it learns.
# cluster.workers is free too, as far as the loop is concerned: see loop.restore for the one case that is refused.
FREE_SECTIONS = ("cluster", "log", "checkpoint")


def run_folder(job: Job) -> Folder:
    return Folder.at(job.run.storage) / job.run.name


def open_run(job: Job) -> Folder:
    """Create or reopen the run's folder.

    Raises:
        StorageError: not writable.
        JobError: a run of this name exists and was started with other keys (all differing keys are named).
    """
    folder = run_folder(job)
    folder.check_writable()
    record = folder / JOB_FILE
    asked = job.model_dump(mode="json")
    if record.exists():
        before, after = (_flatten(d) for d in (json.loads(record.read()), asked))
        differing = [
            f"{key}: the run {folder} was started with {before.get(key)!r}, now {after.get(key)!r}; "
            "keep the old value to resume it, or choose another run.name"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and key.split(".")[0] not in FREE_SECTIONS and key != "run.storage"
        ]
        if differing:
            raise JobError(differing)
    else:
        record.write(json.dumps(asked, indent=1).encode())
    return folder


def finished(folder: Folder) -> Record | None:
    """The result of a run that ended, else None."""
    result = folder / RESULT_FILE
    return json.loads(result.read()) if result.exists() else None


def finish(folder: Folder, best: Folder, last: Record) -> Record:
    """Promote the best checkpoint's student to ``<run>/student`` and write ``result.json``, last: its presence says 'ended'."""
    student = folder / STUDENT_FOLDER
    student.copy_from(best / STUDENT_FOLDER)
    result = {
        "best": json.loads((best / METRICS_FILE).read()),
        "last": last,
        "student": student.path if student.is_local else str(student),
    }
    (folder / RESULT_FILE).write(json.dumps(result, indent=1).encode())
    return result


class RunLog:
    """``log.jsonl`` and ``tensorboard/`` of a run, written by rank 0; on remote storage, uploaded at each ``sync``."""

    def __init__(self, run: Folder, resumed_step: int, tensorboard: bool) -> None:
        self.run = run
        self.scratch = None if run.is_local else tempfile.TemporaryDirectory()
        local = Path(run.path if self.scratch is None else self.scratch.name)
        if self.scratch is not None and resumed_step and (run / "log.jsonl").exists():
            (local / "log.jsonl").write_bytes((run / "log.jsonl").read())
        self.sinks: list[Sink] = [JsonLines(local / "log.jsonl", resumed_step)]
        if tensorboard:
            self.sinks.append(TensorBoard(local / "tensorboard", resumed_step))

    def __call__(self, record: Record) -> None:
        for sink in self.sinks:
            sink(record)

    def sync(self) -> None:
        if self.scratch is not None:
            self.run.copy_from(Folder.at(self.scratch.name))


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat

