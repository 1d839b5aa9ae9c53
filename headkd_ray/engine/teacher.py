"""The teacher of a job, loaded and compared with the data."""

from __future__ import annotations

from headkd_ray.data.classes import check_same_classes
from headkd_ray.detectors import Detector
from headkd_ray.detectors.weights import drop_unused_classes
from headkd_ray.engine.fetch import fetch_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import Job


def load_teacher(job: Job, classes: tuple[str, ...] | None) -> Detector | None:
    """The teacher on the CPU; None for methods without one.

    Args:
        classes: the data's, which must be the teacher's; None = do not compare.

    Raises:
        CheckpointError: unreadable, or without class names. (Whether it is of the kind that the method needs, ``build_trainee``
            knows.)
        DataError: its classes are not the data's.
    """
    if job.teacher is None:
        return None
    loaded = drop_unused_classes(fetch_detector(job.teacher.checkpoint))  # torchvision's COCO models name unused ones
    names = job.teacher.classes or loaded.classes
    if names is None:
        raise CheckpointError(f"{job.teacher.checkpoint}: does not name its classes; list them in order in teacher.classes")
    if len(names) != loaded.detector.num_classes:
        raise CheckpointError(
            f"{job.teacher.checkpoint}: has {loaded.detector.num_classes} classes, but teacher.classes names {len(names)}"
        )
    if classes is not None:
        check_same_classes({f"data.train ({job.data.train})": classes, f"teacher ({job.teacher.checkpoint})": names})
    return loaded.detector
