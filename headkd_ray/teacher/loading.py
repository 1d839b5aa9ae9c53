"""Loading the teacher of a job and adapting its outputs to the classes of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headkd_ray.data.class_lists import check_common, outputs_by_name
from headkd_ray.detectors import Detector
from headkd_ray.detectors.state_dict import fingerprint
from headkd_ray.detectors.weights import with_classes
from headkd_ray.detectors.weights.fetch import fetch_named
from headkd_ray.job import Job


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher with an output for each class of the data, on the CPU."""

    detector: Detector
    note: str | None
    """A note for the log on how its classes differ from the data's and if it is of the student's kind; None if neither."""
    fingerprint: str
    """SHA-256 of the weights in the checkpoint, in hexadecimal."""


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
    loaded = fetch_named("teacher", job.teacher.checkpoint, job.teacher.classes)
    names = loaded.classes
    assert names is not None
    own_kind = job.method != "fitnet" and loaded.detector.spec.kind == job.student.kind
    weights = fingerprint(loaded.detector.state_dict())
    notes = list(loaded.notes)
    notes += [f"warning: the teacher is a {job.student.kind} like the student; HEAD expects another kind"] if own_kind else []
    if classes is None or classes == names:
        return Teacher(loaded.detector, "; ".join(notes) or None, weights)
    who, data = f"teacher ({job.teacher.checkpoint})", f"data.train ({job.data.train})"
    check_common(who, names, data, classes, "teacher.classes")
    matched = len(set(classes) & set(names))
    notes += [
        f"teacher: its head's outputs follow the data's class names ({matched} of {len(classes)} matched)",
        *outputs_by_name("the teacher", names, classes),
    ]
    return Teacher(with_classes(loaded, classes).detector, "; ".join(notes), weights)
