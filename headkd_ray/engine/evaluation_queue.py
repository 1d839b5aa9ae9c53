"""Evaluations of a run that are made elsewhere while training goes on (``eval.placement: task``).

An evaluation needs the student alone. Each student that is due waits in the run's folder until its metrics are in the log, so
that a run which resumes makes up what was outstanding:

- ``evaluations/waiting/step_00000042``: a student that has still to be evaluated, written before the checkpoint of its step;
- ``evaluations/done/step_00000042``: the same student with its metrics, for the result. The best two are kept.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights.native import load_detector, save_detector
from headkd_ray.engine.checkpoint import METRICS_FILE, SCORE, STUDENT_FOLDER, UNSCORED, seal
from headkd_ray.engine.coco_metrics import CocoMetrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.files import read_json, writing
from headkd_ray.engine.log import Record, records_in
from headkd_ray.engine.run import run_folder
from headkd_ray.engine.scratch import Scratch
from headkd_ray.engine.stored_detections import store_of
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.engine.validation import validate
from headkd_ray.errors import CheckpointError, DiskError
from headkd_ray.job import Job
from headkd_ray.storage import Folder

WAITING, DONE = "evaluations/waiting", "evaluations/done"
KEPT = 2
"""Evaluated students that are kept, the best by AP; the second is for the case that the best is damaged."""


@dataclass(frozen=True)
class Request:
    """An evaluation to be made."""

    job: Job
    step: int
    """Optimizer step of the student."""
    shares: int
    """Number of processes that train: their batches are evaluated, as the padding depends on how images are divided."""
    best: float
    """Best AP of earlier evaluations, in percent."""


Pending = Callable[[], CocoMetrics | None]
"""Returns the metrics of an evaluation that was started, None while it runs. Raises what the evaluation raised."""


class EvaluationQueue:
    """The evaluations of a run that are made elsewhere, one after the other; rank 0 has it."""

    def __init__(self, job: Job, start: Callable[[Request], Pending]) -> None:
        """``start``: starts an evaluation, which calls ``evaluate_waiting``."""
        self.job, self.run, self.start = job, run_folder(job), start
        self.shares = 1
        self.best = -math.inf
        self.steps: deque[int] = deque()
        self.running: Pending | None = None

    def resume(self, step: int, shares: int) -> Record:
        """Continue at a step, from the run's folder and log, and return the metrics of the last evaluation; empty if none.

        What belongs to later steps, which will be trained again, is deleted.

        Args:
            shares: number of processes that train.
        """
        self.shares = shares
        logged = {record["step"]: record["val"] for record in records_in(self.run) if "val" in record}
        logged = {at: metrics for at, metrics in logged.items() if at <= step}
        self.best = max((_score(metrics) for metrics in logged.values()), default=-math.inf)
        for kind in (WAITING, DONE):
            for at in steps_in(self.run / kind):
                if at > step or (kind == WAITING and at in logged):
                    (self.run / kind / _name(at)).remove()
        self.steps = deque(steps_in(self.run / WAITING))
        self._next()
        return {"step": max(logged), **logged[max(logged)]} if logged else {}

    def add(self, step: int, student: Path) -> None:
        """Put the student of a step, a local folder, into the queue. Raises DiskError if there is no space for it."""
        place = self.run / WAITING / _name(step)
        with writing(place.uri, "run.storage"):
            place.remove()
            (place / STUDENT_FOLDER).copy_from(Folder.open(student))
        self.steps.append(step)
        self._next()

    @property
    def busy(self) -> bool:
        """Whether there are evaluations whose metrics have not been taken."""
        return self.running is not None

    def finished(self) -> Iterator[tuple[int, CocoMetrics]]:
        """Yield step and metrics of evaluations that have ended; each is over only when the next one is asked for.

        Raises what an evaluation raised.
        """
        while self.running is not None and (metrics := self.running()) is not None:
            step = self.steps.popleft()
            yield step, metrics  # into the log
            if not math.isnan(metrics.AP):
                self.best = max(self.best, metrics.AP)
            (self.run / WAITING / _name(step)).remove()
            for place in ranked(self.run)[KEPT:]:
                place.remove()
            self.running = None
            self._next()

    def _next(self) -> None:
        if self.running is None and self.steps:
            self.running = self.start(Request(self.job, self.steps[0], self.shares, self.best))


def evaluate_waiting(request: Request, device: torch.device) -> CocoMetrics:
    """Evaluate a waiting student on ``device``, write it with its metrics as done, and return them.

    The detections are kept as those of an evaluation by the run's own processes.

    Raises:
        DiskError: the student is damaged, or there is no space.
        DataError, DeviceMemoryError: as ``loop.fit``.
    """
    job, run = request.job, run_folder(request.job)
    streams = Streams(job, Distributed(0, 1, device), ShardSet.open(job.data.train), ShardSet.open(job.data.val), decode_here)
    scratch = Scratch()
    try:
        copy, draft = scratch.folder(), scratch.folder()
        waiting = run / WAITING / _name(request.step)
        Folder.open(copy).copy_from(waiting / STUDENT_FOLDER)
        try:
            loaded = load_detector(copy)
        except CheckpointError as error:  # as an error that one process meets, while all ranks meet that of a checkpoint
            raise DiskError(
                f"{waiting.uri}: the student that waits here for its evaluation is damaged ({error}); restore it, or delete "
                "this folder, and the same command leaves this evaluation out"
            ) from error
        assert loaded.classes is not None
        student = loaded.detector.to(device).to(memory_format=torch.channels_last)  # as in training
        store = store_of(job, run, streams.val_set)

        def keep(scored: CocoMetrics, found: list[Record]) -> None:
            if store is not None:
                store(found, request.step, not scored.AP < request.best)

        scored = validate(job, streams.distributed, streams, student, keep, shares=request.shares)
        metrics = scored.as_dict()
        with writing(str(draft), "TMPDIR"):
            save_detector(draft / STUDENT_FOLDER, student.cpu(), loaded.classes, {**loaded.meta, "metrics": metrics})
            (draft / METRICS_FILE).write_text(json.dumps({"step": request.step, **metrics}))
        seal(draft)
        place = run / DONE / _name(request.step)
        with writing(place.uri, "run.storage"):
            place.remove()
            place.copy_from(Folder.open(draft))
        return scored
    finally:
        scratch.close()


def ranked(run: Folder) -> list[Folder]:
    """Return the folders of evaluated students, the best first; of equal ones, the later comes first."""
    places = {step: run / DONE / _name(step) for step in steps_in(run / DONE)}
    scores = {
        step: _score(read_json(place, METRICS_FILE, CheckpointError, "the evaluation is damaged"))
        for step, place in places.items()
        if place.has(METRICS_FILE)
    }
    return [places[step] for step in sorted(scores, key=lambda step: (scores[step], step), reverse=True)]


def steps_in(folder: Folder) -> list[int]:
    """Return the steps that ``folder`` has subfolders of, ascending."""
    if not folder.exists:
        return []
    names = [name for name, is_folder in folder.entries() if is_folder and name.startswith("step_")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _score(metrics: Record) -> float:
    return UNSCORED if metrics[SCORE] is None else float(metrics[SCORE])
