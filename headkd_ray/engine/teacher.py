"""The teacher of a job, loaded and brought to the data's classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headkd_ray.data.classes import difference, listed
from headkd_ray.detectors import Detector
from headkd_ray.detectors.weights import with_classes
from headkd_ray.engine.fetch import fetch_detector
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.job import Job


@dataclass(frozen=True)
class Teacher:
    """A detector with an output for each class of the data, on the CPU."""

    detector: Detector
    note: str | None
    """For the log: how its classes differ from the data's, and that it is of the student's kind; None if neither."""


def teacher_of(job: Job, classes: tuple[str, ...]) -> Detector:
    """The detector of a job that has a teacher; outputs for classes that it does not know are drawn by the run's seed, so that
    they are the same wherever it is loaded. Raises as :func:`load_teacher` does."""
    torch.manual_seed(job.run.seed)
    teacher = load_teacher(job, classes)
    assert teacher is not None
    return teacher.detector


def load_teacher(job: Job, classes: tuple[str, ...] | None) -> Teacher | None:
    """The teacher; None for methods without one.

    What distillation reads of a teacher, its features, knows no classes. Only a head that is copied does: its outputs follow
    the class names, and classes that the teacher does not know start fresh.

    Args:
        classes: the data's; None = take the teacher's.

    Raises:
        CheckpointError: unreadable, or without class names. (Whether it is of the kind that the method needs, ``build_trainee``
            knows.)
        DataError: it knows none of the data's classes.
    """
    if job.teacher is None:
        return None
    # teacher.classes names all outputs, unused ones too.
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
    notes += [f"warning: the teacher is a {job.student.kind} like the student; HEAD lives on other kinds"] if own_kind else []
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
        *([f"fresh, for the teacher does not know them: {listed(fresh)}"] if fresh else []),
        *([f"warning: different in letter case alone, and so not matched: {', '.join(alike)}"] if alike else []),
        *([f"left out, for the data does not have them: {listed(unused)}"] if unused else []),
    ]
    return Teacher(with_classes(replace(loaded, classes=names), classes).detector, "; ".join(notes))
