"""A trainee from a job."""

from __future__ import annotations

from torch import nn

from headkd_ray.detectors import Detector, FasterRCNN, RetinaNet, RoIHead, build_detector
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.distill.head import ASSISTANT_STRIDES, HEAD
from headkd_ray.distill.trainee import Trainee
from headkd_ray.errors import JobError
from headkd_ray.job import Job, RoIHeadSpec


def build_trainee(job: Job, num_classes: int, teacher: Detector | None = None) -> Trainee:
    """The student of ``job`` with its helpers, freshly initialised from torch's default generator.

    ``teacher`` must be given exactly when ``job.method`` has one. Raises JobError if student, teacher and method do not fit.
    """
    problems = _check_teacher(job, num_classes, teacher)
    if problems:
        raise JobError(problems)
    student = build_detector(job.student, num_classes)
    if job.method == "supervised":
        return Trainee(student)
    assert isinstance(student, RetinaNet)  # the job's own validation
    if job.method == "fitnet":
        assert isinstance(teacher, RetinaNet)
        if job.distill.copy_head:
            _copy(teacher.head, student.head, "student.head")
        return FitNet(student, teacher, job.distill)

    spec = job.distill.assistant or (teacher.spec.roi if isinstance(teacher, FasterRCNN) else RoIHeadSpec())
    assistant = RoIHead(spec, job.student.neck.channels, num_classes, ASSISTANT_STRIDES)
    if not isinstance(teacher, FasterRCNN):
        return HEAD(student, assistant, job.distill)
    if job.distill.copy_head:
        _copy(teacher.roi, assistant, "distill.assistant")
    width = teacher.spec.roi.fc_channels
    akd = AKD(nn.Linear(spec.fc_channels, width) for _ in range(spec.fcs)) if job.method in ("akd", "head") else None
    ckd = CKD(nn.Linear(student.spec.head.channels, width)) if job.method == "head" else None
    return HEAD(student, assistant, job.distill, teacher if akd else None, akd, ckd)


def _check_teacher(job: Job, num_classes: int, teacher: Detector | None) -> list[str]:
    if job.method in ("supervised", "assist"):
        return [f"teacher: method {job.method} uses none"] if teacher is not None else []
    if teacher is None:
        return [f"teacher: method {job.method} needs one"]
    problems = []
    wanted, name = (RetinaNet, "retinanet") if job.method == "fitnet" else (FasterRCNN, "faster_rcnn")
    if not isinstance(teacher, wanted):
        problems.append(f"teacher.checkpoint: method {job.method} needs a {name} teacher, this one is a {teacher.spec.kind}")
    if teacher.num_classes != num_classes:
        problems.append(f"teacher.checkpoint: the teacher knows {teacher.num_classes} classes, the data has {num_classes}")
    if job.method == "copy_only" and not job.distill.copy_head:
        problems.append("distill.copy_head: false leaves method copy_only nothing of the teacher; use method assist")
    if job.method in ("akd", "head") and isinstance(teacher, FasterRCNN):
        layers = (job.distill.assistant or teacher.spec.roi).fcs
        if layers != teacher.spec.roi.fcs or layers == 0:
            problems.append(
                f"distill.assistant.fcs: the assistant has {layers} fully connected layers, the teacher {teacher.spec.roi.fcs};"
                " AKD pairs them one to one"
            )
    return problems


def _copy(source: nn.Module, target: nn.Module, key: str) -> None:
    """Copy all weights; JobError naming every tensor that does not fit."""
    theirs, ours = source.state_dict(), target.state_dict()
    problems = [
        f"{key}: {name} is {_shape(ours.get(name))} here and {_shape(theirs.get(name))} in the teacher"
        for name in sorted(theirs.keys() | ours.keys())
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    if problems:
        raise JobError([*problems, "distill.copy_head: make the shapes equal (neck.channels, head widths) or set it to false"])
    target.load_state_dict(theirs)


def _shape(tensor: object) -> str:
    shape = getattr(tensor, "shape", None)
    return "missing" if shape is None else "x".join(map(str, shape)) or "scalar"
