"""A run's folder, ``<run.storage>/<run.name>``: the job, the logs, the exported student and the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from headkd_ray.detectors.weights.native import CARD
from headkd_ray.distill.start import takes_architecture, with_architecture
from headkd_ray.engine.checkpoint import METRICS_FILE, STUDENT_FOLDER, first_intact
from headkd_ray.engine.files import read_json, writing
from headkd_ray.engine.log import JsonLines, Record, Sink, TensorBoard, flattened
from headkd_ray.engine.scratch import Scratch
from headkd_ray.errors import CheckpointError, JobError, StorageError
from headkd_ray.job import LENGTH_KEYS, Job
from headkd_ray.storage import LOCK_FILE, Folder, locked
from headkd_ray.text import masked

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
# Sections that may change when a run is resumed: they decide where it trains and what it logs, not what it learns.
# (Some changes of cluster.workers are still refused: below, and in loop.restore.)
FREE_SECTIONS = ("cluster", "log", "checkpoint")
# Other keys that may change likewise: they decide where or how fast something is computed, not what it is.
FREE_KEYS = (
    "teacher.pool.",
    "teacher.batch_size",
    "teacher.placement",
    "teacher.cache.path",
    "optim.compile",
    "eval.task.",
    "data.max_batch_size",  # data.batch_size is what it led to
)
_MEND = "restore it, or choose another run.name"
UPLOAD_SECONDS = 60
"""Seconds between uploads of the log while no checkpoint is due."""


def run_folder(job: Job) -> Folder:
    return Folder.open(job.run.storage) / job.run.name


def is_started(job: Job) -> bool:
    """Return whether a run of the job's name exists; False if run.storage cannot be used, which ``check_run`` reports."""
    try:
        return run_folder(job).has(JOB_FILE)
    except StorageError:
        return False


def whole_job(job: Job) -> Job:
    """Return the job with what it leaves open, as far as that is known before training.

    This is the architecture of a student that takes it from ``student.checkpoint`` and, with ``data.max_batch_size``, the batch
    size that was found when the run started. A run that was started before has recorded both.

    Raises:
        CheckpointError: the checkpoint is unreadable, or not a detector whose architecture can be taken over.
        StorageError: the run's own files are damaged.
    """
    if job.data.max_batch_size is not None and is_started(job):
        with suppress(ValidationError):  # it was started by another version
            job = job.replace({"data.batch_size": Job.model_validate(_recorded(run_folder(job))).data.batch_size})
    if not takes_architecture(job) or not is_started(job):
        return with_architecture(job)
    with suppress(ValidationError):  # it was started by another version
        before = Job.model_validate(_recorded(run_folder(job))).student
        if masked(str(before.checkpoint)) == masked(str(job.student.checkpoint)) and before.kind == job.student.kind:
            return with_architecture(job, before)
    return with_architecture(job)


def check_run(job: Job, data: dict[str, str] | None = None, longer: bool = False) -> None:
    """Check that the job can start its run or resume it, leaving nothing behind.

    Args:
        data: fingerprint of each split, of student.checkpoint and of the teacher that could be read, by its job key.
        longer: whether the run is to be trained longer than it was started for, with other ``LENGTH_KEYS``.

    Raises:
        StorageError: run.storage is not writable, no filesystem serves it, or the run's own files are damaged.
        JobError: a run of this name exists and was started with other keys (all differing keys are named), or it has ended and
            was trained with other data or weights.
    """
    try:
        folder = run_folder(job)
        folder.check_writable()
    except StorageError as error:
        raise StorageError(f"run.storage: {error}") from error
    if not folder.has(JOB_FILE):
        if longer:
            raise JobError(f"run.name: there is no run {folder.uri} to extend; leave out --extend to start it")
        return
    before, after = (dict(flattened(keys, ".")) for keys in (_recorded(folder), json.loads(_as_recorded(job))))
    differing = _lengthening(before, after, folder) if longer else []
    differing += [
        f"{key}: the run {folder.uri} was started with {before.get(key)!r}, now {after.get(key)!r}; "
        "keep the old value to resume it, or choose another run.name"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key.split(".")[0] not in FREE_SECTIONS
        and not key.startswith(("run.storage", *FREE_KEYS, *(LENGTH_KEYS if longer else ())))
    ]
    result = finished(folder)
    if result is not None:
        trained = result.get("data", {})  # missing in results of earlier versions
        differing += [
            f"{key}: the run {folder.uri} has ended, and {_differs(key)} (fingerprint {str(trained[key])[:12]}, "
            f"now {now[:12]}); choose another run.name"
            for key, now in (data or {}).items()
            if trained.get(key, now) != now
        ]
    workers = before.get("cluster.workers"), job.cluster.workers
    if bool(workers[0]) != bool(workers[1]) and result is None:
        differing.append(
            f"cluster.workers: the run {folder.uri} was started with {workers[0]}, now {workers[1]}; a run without Ray (0) "
            "cannot be resumed with it, nor the reverse: keep the old value to resume it, or choose another run.name"
        )
    if differing:
        raise JobError(differing)


def _lengthening(before: dict[str, Any], after: dict[str, Any], folder: Folder) -> list[str]:
    """Return why a run cannot go on as if it had been started with the other ``LENGTH_KEYS``; none if it can."""
    epochs, schedule = before.get("optim.epochs"), before.get("optim.schedule")
    if epochs is None or schedule is None:  # another version's job, whose differing keys the caller names
        return []
    if schedule != "milestones" and epochs != after["optim.epochs"]:
        return [
            f"optim.epochs: the run {folder.uri} cannot be extended, because its learning rate follows the schedule {schedule} "
            f"to the end of {epochs} epochs; choose another run.name, which can start from its student (student.checkpoint)"
        ]
    problems = []
    if after["optim.epochs"] < epochs:
        problems.append(
            f"optim.epochs: {after['optim.epochs']} is less than the {epochs} that the run {folder.uri} was started with"
        )
    kept = [milestone for milestone in after["optim.milestones"] if milestone < epochs]
    if kept != before["optim.milestones"]:
        problems.append(
            f"optim.milestones: {after['optim.milestones']} changes the learning rate of epochs that the run {folder.uri} was "
            f"started with; keep {before['optim.milestones']}, and add only epochs from {epochs} on"
        )
    return problems


def extend_run(job: Job) -> None:
    """Make the run one that was started with the job's ``LENGTH_KEYS``, which ``check_run`` must have allowed.

    If that changes any, a run that has ended has not any more. Its student stays in place until the longer run has ended.
    """
    folder = run_folder(job)
    before, after = (dict(flattened(keys, ".")) for keys in (_recorded(folder), json.loads(_as_recorded(job))))
    if all(before.get(key) == after.get(key) for key in LENGTH_KEYS):
        return
    with writing(folder.named(JOB_FILE), "run.storage"):
        folder.delete(RESULT_FILE)  # first: between the two, the run is a shorter one that has still to write its result
        folder.write(JOB_FILE, _as_recorded(job).encode())


def _differs(key: str) -> str:
    weights = {
        "student.checkpoint": "started from different weights",
        "teacher.checkpoint": "had a different teacher",
        "teacher.predictions": "learned from different predictions",
    }
    return weights.get(key, "was trained on different data")


def _recorded(folder: Folder) -> dict[str, Any]:
    """Return the job that the run was started with; keys newer than the run have their defaults. Raises StorageError."""
    keys = json.loads(masked(json.dumps(read_json(folder, JOB_FILE, StorageError, _MEND))))  # older versions did not mask
    try:
        return Job.model_validate(keys).model_dump(mode="json")
    except ValidationError:  # it has keys that no longer exist, which the caller reports one by one
        return keys


def _as_recorded(job: Job) -> str:
    """Return the job as job.json stores it: without the secrets of signed URIs."""
    return masked(json.dumps(job.model_dump(mode="json"), indent=1))


def open_run(job: Job) -> Folder:
    """Return the run's folder, and create it if it is new; ``check_run`` must have passed."""
    folder = run_folder(job)
    if not folder.has(JOB_FILE):
        with writing(folder.named(JOB_FILE), "run.storage"):
            folder.create()
            folder.write(JOB_FILE, _as_recorded(job).encode())
    return folder


def finished(folder: Folder) -> Record | None:
    """Return the result of a run that has ended, else None. Raises StorageError if it is damaged."""
    if not folder.has(RESULT_FILE):
        return None
    result = read_json(folder, RESULT_FILE, StorageError, f"{_MEND}; if you delete it, the run resumes and writes it again")
    kinds = {"best": dict, "last": dict, "student": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(result.get(key), kind)]
    if wrong or not isinstance(result.get("data", {}), dict):
        raise StorageError(
            f"{folder.named(RESULT_FILE)}: {', '.join(wrong or ['data'])} is missing or damaged; delete the file, and the same "
            "command will write it again"
        )
    return result


def finish(folder: Folder, ranking: list[Folder], last: Record, data: dict[str, str], tell: Sink) -> Record:
    """Copy the best checkpoint's student to ``<run>/student``, then write ``result.json``, which marks the run as ended.

    Args:
        ranking: the run's checkpoints, the best first. Damaged ones are skipped.
        data: fingerprint of each split by its key. Those of ``student.checkpoint`` and the teacher are added, if any.
        tell: receives a note about each checkpoint that is skipped.

    Raises:
        CheckpointError: no checkpoint is intact.
        DiskError: there is no space for the student.
    """
    best, problems = first_intact(ranking)
    for problem in problems:
        tell({"step": last["step"], "steps": last["step"], "note": f"{problem}; its student is skipped"})
    student = folder / STUDENT_FOLDER
    with writing(student.uri, "run.storage"):
        student.copy_from(best / STUDENT_FOLDER)
        result = {
            "best": read_json(best, METRICS_FILE, CheckpointError, "the checkpoint is damaged"),
            "last": last,
            "student": student.address,
            "data": {**data, **_weights_of(best)},
        }
        folder.write(RESULT_FILE, masked(json.dumps(result, indent=1)).encode())
    return result


def _weights_of(checkpoint: Folder) -> dict[str, str]:
    """Return the fingerprints of the weights that a checkpoint's student started from and of its teacher's, by job key."""
    meta = read_json(checkpoint / STUDENT_FOLDER, CARD, CheckpointError, "the checkpoint is damaged").get("meta", {})
    keys = {"start": "student.checkpoint", "teacher": teacher_key(meta.get("teacher", {}))}
    return {key: meta[part]["fingerprint"] for part, key in keys.items() if part in meta}


def teacher_key(teacher: Mapping[str, str]) -> str:
    """Return the job key of a teacher, as a checkpoint records it: that of its predictions, or of its weights."""
    return "teacher.predictions" if "predictions" in teacher else "teacher.checkpoint"


@contextmanager
def only_one(run: Folder) -> Iterator[None]:
    """Keep other processes from training the same run; the lock is released when this process ends, however it ends.

    Object stores and some network file systems have no locks; there, nothing prevents it.

    Raises:
        JobError: another process is training the run.
    """
    if not run.remote:
        with writing(run.uri, "run.storage"):
            run.create()
    busy = JobError(f"run.name: another process is training {run.uri}; wait for it, stop it, or choose another run.name")
    with locked(run, busy):
        try:
            yield
        finally:
            if not run.remote and not run.has(JOB_FILE):  # the run was refused before it began: leave nothing behind
                run.delete(LOCK_FILE)
                with suppress(OSError):  # the folder holds other files
                    Path(run.path).rmdir()


class RunLog:
    """A sink that writes a run's ``log.jsonl`` and ``tensorboard/``, and uploads them periodically to remote storage.

    Only rank 0 has one. It is a context manager: leaving it closes the files.
    """

    def __init__(self, run: Folder, resumed_step: int, tensorboard: bool, checkpoint_every: int | None = None) -> None:
        """Open the files. ``checkpoint_every``: optimizer steps between checkpoints within an epoch; None = there are none."""
        self.run = run
        self.checkpoint_every = checkpoint_every
        self.due = False
        self.uploaded = time.monotonic()
        self.scratch = Scratch() if run.remote else None
        self.local = Path(run.path) if self.scratch is None else self.scratch.folder()
        with self._writing():
            if self.scratch is not None and resumed_step and run.has("log.jsonl"):
                (self.local / "log.jsonl").write_bytes(run.read("log.jsonl"))
            self.sinks: list[JsonLines | TensorBoard] = [JsonLines(self.local / "log.jsonl", resumed_step)]
            if tensorboard:
                self.sinks.append(TensorBoard(self.local / "tensorboard", resumed_step))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(StorageError, OSError) if error is not None else nullcontext():  # do not hide the first error
            with self._writing():
                for sink in self.sinks:
                    sink.close()
            if self.scratch is not None:
                self._upload()
        if self.scratch is not None:
            self.scratch.close()

    def __call__(self, record: Record) -> None:
        """Write a record. Raises DiskError if that fails, because a run without a log is of little use."""
        with self._writing():
            for sink in self.sinks:
                sink(record)
        every = self.checkpoint_every
        self.due = record["epoch"] == int(record["epoch"]) or (every is not None and record["step"] % every == 0)

    def sync(self) -> None:
        """Upload the log if the storage is remote: before each checkpoint, so that a run resumed from it lacks no record, and
        otherwise at most every UPLOAD_SECONDS, because each upload copies everything."""
        if self.scratch is not None and (self.due or time.monotonic() - self.uploaded > UPLOAD_SECONDS):
            self._upload()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(str(self.local / "log.jsonl"), "run.storage" if self.scratch is None else "TMPDIR")

    def _upload(self) -> None:
        self.run.copy_from(Folder.open(self.local))
        self.due, self.uploaded = False, time.monotonic()


@contextmanager
def run_log(run: Folder, job: Job, tell: Sink) -> Iterator[Callable[[int], Sink]]:
    """Yield a function that opens the run's log at the step from which training resumes, and returns where records go.

    Each record is written to the log, and then given to ``tell``. Leaving the context closes the log.
    """
    with ExitStack() as files:

        def open_sink(resumed_step: int) -> Sink:
            log = files.enter_context(RunLog(run, resumed_step, job.log.tensorboard, job.checkpoint.every_steps))

            def sink(record: Record) -> None:
                log(record)
                log.sync()
                tell(record)

            return sink

        yield open_sink
