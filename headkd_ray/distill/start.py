"""Starting a student from a whole trained detector, ``student.checkpoint``."""

from __future__ import annotations

from dataclasses import dataclass

from headkd_ray.data.class_lists import check_common, listed, outputs_by_name
from headkd_ray.detectors.base import Detector
from headkd_ray.detectors.state_dict import fingerprint
from headkd_ray.detectors.weights import LoadedDetector, load_by_name
from headkd_ray.detectors.weights.fetch import fetch_named
from headkd_ray.detectors.weights.misfits import check_architecture
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.job import Job, PyramidDetectorSpec, WholeDetectorSpec


@dataclass(frozen=True)
class Start:
    """A trained detector, on the CPU, from whose weights a student starts."""

    loaded: LoadedDetector
    classes: tuple[str, ...]
    """The data's classes: those of the student's outputs, in their order."""
    note: str
    """What the log says about it: where it comes from, which outputs were taken and which start fresh."""
    fingerprint: str
    """SHA-256 of the weights, in hexadecimal."""

    def load_into(self, student: Detector) -> None:
        """Load the weights into ``student``, of the same architecture; outputs for classes that they lack stay as they are."""
        load_by_name(student, self.classes, self.loaded)


def takes_architecture(job: Job) -> bool:
    """Return whether the job's student has the architecture of ``student.checkpoint``, and names none itself."""
    student = job.student
    return not isinstance(student, PyramidDetectorSpec) and student.model is None and student.checkpoint is not None


def with_architecture(job: Job, theirs: WholeDetectorSpec | None = None) -> Job:
    """Return the job with the architecture that its student takes from ``student.checkpoint``; the job itself if it takes none.

    Args:
        theirs: the spec that the checkpoint has, if it is known; it is then not read.

    Raises:
        CheckpointError: the checkpoint is unreadable, or not a detector whose architecture can be taken over.
    """
    student, place = job.student, job.student.checkpoint
    if isinstance(student, PyramidDetectorSpec) or student.model is not None or place is None:
        return job
    if theirs is None:
        theirs = fetch_named("student", place, student.classes).detector.spec
    if not isinstance(theirs, type(student)):
        raise CheckpointError(
            f"student.kind: {student.kind} in the job, {theirs.kind} in the checkpoint; a detector starts only from one of its "
            "own kind"
        )
    return job.replace(
        {
            "student.model": theirs.model,
            "student.config": {**theirs.config, **student.config},
            "student.pixels": theirs.pixels,
            "student.input_size": student.input_size or theirs.input_size,
        }
    )


def load_start(job: Job, classes: tuple[str, ...] | None) -> Start | None:
    """Load ``student.checkpoint`` and check that the job's student can start from it; return None if the job names none.

    Args:
        classes: class names of the data; None = take the checkpoint's.

    Raises:
        CheckpointError: it is unreadable, does not name its classes, or knows none of the data's; or the student has another
            architecture (all keys that differ are named).
        JobError: the student cannot be built.
    """
    place = job.student.checkpoint
    if place is None:
        return None
    loaded = fetch_named("student", place, job.student.classes)
    known = loaded.classes
    assert known is not None
    classes = known if classes is None else classes
    problems: list[str] = []
    for check in (
        lambda: check_architecture(job.student, loaded.detector),
        lambda: check_common("the checkpoint", known, f"data.train ({job.data.train})", classes, "student.classes"),
    ):
        try:
            check()
        except (CheckpointError, DataError) as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems, headline=f"student.checkpoint: the student cannot start from {place}:")
    taken = [name for name in classes if name in known]
    notes = [
        f"the student starts from {place} ({loaded.source})",
        f"its outputs for {len(taken)} of {len(classes)} classes are taken: {listed(taken, 100)}",
        *outputs_by_name("the checkpoint", known, classes),
        *loaded.notes,
    ]
    return Start(loaded, classes, "; ".join(notes), fingerprint(loaded.detector.state_dict()))
