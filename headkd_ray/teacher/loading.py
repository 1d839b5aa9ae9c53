"""Loading the teacher of a job and adapting its outputs to the classes of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headkd_ray.data.class_lists import check_common, outputs_by_name
from headkd_ray.data.predictions import sha256_of
from headkd_ray.detectors import PyramidDetector
from headkd_ray.detectors.hf_models import HFModel, read_hf_model
from headkd_ray.detectors.state_dict import fingerprint
from headkd_ray.detectors.weights import with_classes
from headkd_ray.detectors.weights.fetch import check_names, fetch_named, prefixed
from headkd_ray.detectors.weights.loaded import UNUSED
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import Job, RoIHeadSpec
from headkd_ray.teacher.source import AnyTeacher
from headkd_ray.teacher.transformers_source import TransformersSource


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher, on the CPU."""

    detector: AnyTeacher | None
    """A detector of ours with an output for each class of the data, or a source; None if it has left predictions, which the
    data has."""
    note: str | None
    """A note for the log on how its classes differ from the data's and if it is of the student's kind; None if neither."""
    fingerprint: str
    """SHA-256 of the weights in the checkpoint, or of the file of predictions, in hexadecimal."""


def teacher_of(job: Job, classes: tuple[str, ...]) -> AnyTeacher:
    """Load the teacher of a job whose teacher is a network; raise as :func:`load_teacher` does.

    Outputs for classes that it does not know are drawn with the run's seed, so that they are the same wherever it is loaded.
    """
    torch.manual_seed(job.run.seed)
    teacher = load_teacher(job, classes)
    assert teacher is not None and teacher.detector is not None
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
        DataError: the teacher knows none of the data's classes, or its predictions cannot be read.
        JobError: the teacher does not have the layers that the job compares.
    """
    if job.teacher is None:
        return None
    return LOADERS[job.teacher.kind](job, classes)


def _of_ours(job: Job, classes: tuple[str, ...] | None) -> Teacher:
    assert job.teacher is not None
    _, place = job.teacher.source
    loaded = fetch_named("teacher", place, job.teacher.classes)
    names = loaded.classes
    assert names is not None
    if not isinstance(loaded.detector, PyramidDetector):
        raise CheckpointError(
            f"teacher.checkpoint: {place} is a {loaded.detector.spec.kind} detector, which has no feature "
            "pyramid and no head to distill from; its hidden states teach with teacher.kind: transformers"
        )
    own_kind = job.method != "fitnet" and loaded.detector.spec.kind == job.student.kind
    weights = fingerprint(loaded.detector.state_dict())
    notes = list(loaded.notes)
    notes += [f"warning: the teacher is a {job.student.kind} like the student; HEAD expects another kind"] if own_kind else []
    if classes is None or classes == names:
        return Teacher(loaded.detector, "; ".join(notes) or None, weights)
    _check_common(job, names, classes)
    matched = len(set(classes) & set(names))
    notes += [
        f"teacher: its head's outputs follow the data's class names ({matched} of {len(classes)} matched)",
        *outputs_by_name("the teacher", names, classes),
    ]
    adapted = with_classes(loaded, classes).detector
    assert isinstance(adapted, PyramidDetector)
    return Teacher(adapted, "; ".join(notes), weights)


def _of_transformers(job: Job, classes: tuple[str, ...] | None) -> Teacher:
    assert job.teacher is not None
    _, place = job.teacher.source
    with prefixed("teacher"):
        model = read_hf_model(place)
    names = check_names("teacher", place, job.teacher.classes, model.classes, model.num_classes)
    known = tuple(name for name in names if name != UNUSED)
    classes = known if classes is None else classes
    _check_common(job, known, classes)
    layers = _layers(job, model)
    source = TransformersSource(
        model, names, classes, job.distill.roi_budget, layers, job.teacher.truth_iou, job.teacher.precision
    )
    notes = [
        f"teacher: a {model.kind} of transformers with {model.queries} queries; hidden states of decoder layers "
        f"{', '.join(map(str, layers))} of {model.layers} are compared",
        *([] if set(classes) == set(known) else [f"it knows {len(set(classes) & set(known))} of {len(classes)} classes"]),
    ]
    return Teacher(source, "; ".join(notes), model.fingerprint)


def _of_predictions(job: Job, classes: tuple[str, ...] | None) -> Teacher:
    assert job.teacher is not None
    _, place = job.teacher.source
    return Teacher(None, None, sha256_of(place))


LOADERS = {"ours": _of_ours, "transformers": _of_transformers, "predictions": _of_predictions}
"""By ``teacher.kind``: the function that loads the teacher of a job."""


def _layers(job: Job, model: HFModel) -> tuple[int, ...]:
    """Return the decoder layers that are compared, 1 = the first. Raises JobError if the model has fewer."""
    assert job.teacher is not None
    if job.teacher.layers is None:
        count = (job.distill.assistant or RoIHeadSpec()).fcs
        if count > model.layers:
            raise JobError(
                f"distill.assistant.fcs: {count} fully connected layers would be compared with as many decoder layers, but the "
                f"teacher has {model.layers}; lower it"
            )
        return tuple(range(model.layers - count + 1, model.layers + 1))
    if job.teacher.layers[-1] > model.layers:
        raise JobError(f"teacher.layers: {list(job.teacher.layers)}, but the teacher has {model.layers} decoder layers")
    return job.teacher.layers


def _check_common(job: Job, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    assert job.teacher is not None
    check_common(f"teacher ({job.teacher.source[1]})", names, f"data.train ({job.data.train})", classes, "teacher.classes")
