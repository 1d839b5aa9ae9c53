"""Loading the teacher of a job and adapting its outputs to the classes of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headkd_ray.data.class_lists import difference, listed
from headkd_ray.detectors import Detector
from headkd_ray.detectors.weights import with_classes
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.job import Job


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher with an output for each class of the data, on the CPU."""

    detector: Detector
    note: str | None
    """A note for the log on how its classes differ from the data's and if it is of the student's kind; None if neither."""


def teacher_of(job: Job, classes: tuple[str, ...]) -> Detector:
    """Load the detector of a job that has a teacher; raise as :func:`load_teacher` does.

    Outputs for classes that it does not know are drawn with the run's seed, so that they are the same wherever it is loaded.
    """
    torch.manual_seed(job.run.seed)
    teacher = load_teacher(job, classes)
    assert teacher is not None
    return teacher.detector


def load_teacher(job: Job, classes: tuple[str, ...] | None) -> Teacher | None:
    """Load the teacher, or return None for methods without one.

    Distillation reads features, which do not depend on classes. Only a copied head does: its outputs are matched by class
    name, and classes that the teacher does not know start with fresh weights.

    Args:
        classes: class names of the data; None = take the teacher's.

    Raises:
        CheckpointError: the teacher is unreadable or does not name its classes. (``build_training_model`` checks whether it
            is of the kind that the method needs.)
        DataError: the teacher knows none of the data's classes.
    """
    if job.teacher is None:
        return None
    # teacher.classes names all outputs, including unused ones.
    loaded = fetch_detector(job.teacher.checkpoint, all_outputs=job.teacher.classes is not None)
    names = job.teacher.classes or loaded.classes
    if names is None:
        raise CheckpointError(f"{job.teacher.checkpoint}: does not name its classes; list them in order in teacher.classes")
    if len(names) != loaded.detector.num_classes:
        raise CheckpointError(
            f"{job.teacher.checkpoint}: has {loaded.detector.num_classes} classes, but teacher.classes names {len(names)}"
        )
    own_kind = job.method != "fitnet" and loaded.detector.spec.kind == job.student.kind
    notes = list(loaded.notes)
    notes += [f"warning: the teacher is a {job.student.kind} like the student; HEAD expects another kind"] if own_kind else []
    if classes is None or classes == names:
        return Teacher(loaded.detector, "; ".join(notes) or None)
    if not set(names) & set(classes):
        who, data = f"teacher ({job.teacher.checkpoint})", f"data.train ({job.data.train})"
        raise DataError(
            f"{who} has {len(names)} classes, {data} has {len(classes)}; {difference(data, classes, who, names)}; a teacher "
            "must know at least one class of the data (teacher.classes can name its outputs otherwise)"
        )
    fresh, unused = [n for n in classes if n not in names], [n for n in names if n not in classes]
    spelled = {name.casefold(): name for name in unused}
    alike = [f"{name!r} (the teacher's {spelled[name.casefold()]!r})" for name in fresh if name.casefold() in spelled]
    notes += [
        f"teacher: its head's outputs follow the data's class names ({len(classes) - len(fresh)} of {len(classes)} matched)",
        *([f"new weights for classes that the teacher does not know: {listed(fresh)}"] if fresh else []),
        *([f"warning: not matched because the letter case differs: {', '.join(alike)}"] if alike else []),
        *([f"left out because the data does not have them: {listed(unused)}"] if unused else []),
    ]
    return Teacher(with_classes(replace(loaded, classes=names), classes).detector, "; ".join(notes))
