"""The teacher of a job, loaded and checked against the data and the method before anything is started."""

from __future__ import annotations

from headkd_ray.data.classes import check_same_classes
from headkd_ray.detectors import Detector
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.errors import CheckpointError
from headkd_ray.job import Job

KINDS = {"copy_only": "faster_rcnn", "akd": "faster_rcnn", "head": "faster_rcnn", "fitnet": "retinanet"}
"""What kind of teacher a method learns from."""


def load_teacher(job: Job, classes: tuple[str, ...]) -> Detector | None:
    """The frozen teacher on the CPU; None for methods without one.

    Raises:
        CheckpointError: unreadable, or not the kind of detector that the method needs.
        DataError: its classes are not the data's.
    """
    if job.teacher is None:
        return None
    loaded = load_checkpoint(job.teacher.checkpoint)
    if loaded.detector.spec.kind != KINDS[job.method]:
        raise CheckpointError(
            f"{job.teacher.checkpoint}: a {loaded.detector.spec.kind}, but method {job.method} learns from a {KINDS[job.method]}"
        )
    names = job.teacher.classes or loaded.classes
    if names is None:
        raise CheckpointError(f"{job.teacher.checkpoint}: does not name its classes; list them in teacher.classes, in its order")
    if len(names) != loaded.detector.num_classes:
        raise CheckpointError(
            f"{job.teacher.checkpoint}: has {loaded.detector.num_classes} classes, but teacher.classes names {len(names)}"
        )
    check_same_classes({f"data.train ({job.data.train})": classes, f"teacher ({job.teacher.checkpoint})": names})
    return loaded.detector
