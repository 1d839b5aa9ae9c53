"""A trainee from a job."""

from __future__ import annotations

from typing import Any

from torch import nn

from headkd_ray.detectors import (
    DenseDetector,
    Detector,
    FasterRCNN,
    FCOSHead,
    RetinaHead,
    RetinaNet,
    RoIHead,
    TwoStageDetector,
    build_detector,
)
from headkd_ray.detectors.two_stage import ROI_STRIDES
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistants import Assistant, DenseAssistant, RoIAssistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.copying import copy_weights
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.distill.head import HEAD
from headkd_ray.distill.tf_head import TFHEAD, Member
from headkd_ray.distill.trainee import Trainee
from headkd_ray.errors import JobError
from headkd_ray.job import DistillSpec, Job, RoIHeadSpec

ASSISTANT_STRIDES = (8, 16, 32, 64)
"""A RoI assistant of a dense student pools from P3 to P6, one level coarser than the teacher's P2 to P5."""


def build_trainee(job: Job, num_classes: int, teacher: Detector | None, steps_per_epoch: int) -> Trainee:
    """The student of ``job`` with its helpers, freshly initialised from torch's default generator.

    ``teacher`` must be given exactly when ``job.method`` has one; ``steps_per_epoch`` are optimizer steps. Raises JobError if
    student, teacher and method do not fit.
    """
    problems = _check_teacher(job, num_classes, teacher)
    if problems:
        raise JobError(problems)
    student = build_detector(job.student, num_classes)
    if job.method == "supervised":
        return Trainee(student)
    if job.method == "fitnet":
        assert isinstance(student, RetinaNet) and isinstance(teacher, RetinaNet)  # the job's own checks
        if job.distill.copy_head:
            copy_weights(teacher.head, student.head, "student.head")
        return FitNet(student, teacher, job.distill)
    ckd_stop = None if job.distill.ckd_epochs is None else job.distill.ckd_epochs * steps_per_epoch
    if job.method == "tf_head":
        return _tf_head(student, job.distill, ckd_stop)
    return _head(student, teacher, job, ckd_stop)


def _head(student: Detector, teacher: Detector | None, job: Job, ckd_stop: int | None) -> HEAD:
    """The assistant is a head of the teacher's kind and widths; without a teacher an R-CNN's."""
    channels, classes = student.spec.neck.channels, student.num_classes
    assistant: Assistant
    if teacher is None:
        assistant = RoIAssistant(RoIHead(job.distill.assistant or RoIHeadSpec(), channels, classes, _strides(student)))
        return HEAD(student, assistant, job.distill)
    source: Any
    if isinstance(teacher, TwoStageDetector):
        source, spec = teacher.roi, job.distill.assistant or teacher.roi.spec
        assistant = RoIAssistant(type(source)(spec, channels, classes, _strides(student)))
    else:
        assert isinstance(teacher, DenseDetector)
        source = teacher.head
        assistant = DenseAssistant(type(source)(source.spec, channels, classes))
    if job.distill.copy_head:
        copy_weights(source, assistant.head, "distill.assistant")
    if job.method == "copy_only":
        return HEAD(student, assistant, job.distill)

    widths = zip(assistant.head.tap_channels, source.tap_channels, strict=True)
    akd = AKD([_adapter(own, theirs, maps=isinstance(assistant, DenseAssistant)) for own, theirs in widths])
    ckd = _ckd(student, assistant, source.lead_channels) if job.method == "head" else None
    here = job.distill.rois == "student" and (job.teacher is None or job.teacher.placement == "inline")
    asked = teacher if here else None  # else its answers come with the batches
    return HEAD(student, assistant, job.distill, asked, akd, ckd, ckd_stop)


def _tf_head(student: Detector, spec: DistillSpec, ckd_stop: int | None) -> TFHEAD:
    """All assistants are fresh. A dense one has as many features as the student's pyramid feeds it."""
    channels, classes = student.spec.neck.channels, student.num_classes
    members: dict[str, Member] = {}
    if (fcos := spec.assistants.fcos) is not None:
        dense = DenseAssistant(FCOSHead(fcos.head, channels, classes))
        members["fcos"] = Member(dense, _ckd(student, dense, fcos.head.channels), fcos.gt_weight, fcos.ckd_weight)
    if (rcnn := spec.assistants.rcnn) is not None:
        roi = RoIAssistant(RoIHead(rcnn.head, channels, classes, _strides(student)))
        ckd = _ckd(student, roi, rcnn.head.fc_channels, rcnn.decouple)
        members["rcnn"] = Member(roi, ckd, rcnn.gt_weight, rcnn.ckd_weight)
    if (retina := spec.assistants.retinanet) is not None:
        dense = DenseAssistant(RetinaHead(retina.head, channels, classes))
        members["retinanet"] = Member(dense, _ckd(student, dense, retina.head.channels), retina.gt_weight, retina.ckd_weight)
    return TFHEAD(student, members, spec.warmup_steps, ckd_stop)


def _strides(student: Detector) -> tuple[int, ...]:
    """Pixels a cell of the four levels that a RoI assistant pools from."""
    return ROI_STRIDES if isinstance(student, TwoStageDetector) else ASSISTANT_STRIDES


def _ckd(student: Detector, assistant: Assistant, width: int, decouple: bool = False) -> CKD:
    """From the student's tap to ``width`` channels of a target like the ``assistant``'s; ``decouple``: a Linear an anchor."""
    if isinstance(student, TwoStageDetector):
        return CKD(_adapter(student.roi.lead_channels, width, maps=False))
    assert isinstance(student, DenseDetector)
    own = student.head.lead_channels
    if isinstance(assistant, DenseAssistant):
        return CKD(_adapter(own, width, maps=True))
    anchors = student.head.anchors.per_cell if decouple else 1
    return CKD(_adapter(own, anchors * width, maps=False), anchors)


def _adapter(own: int, theirs: int, maps: bool) -> nn.Module:
    return nn.Conv2d(own, theirs, 1) if maps else nn.Linear(own, theirs)


def _check_teacher(job: Job, num_classes: int, teacher: Detector | None) -> list[str]:
    if job.method in ("supervised", "assist", "tf_head"):
        return [f"teacher: method {job.method} uses none"] if teacher is not None else []
    if teacher is None:
        return [f"teacher: method {job.method} needs one"]
    problems = []
    if job.method == "fitnet" and not isinstance(teacher, RetinaNet):
        problems.append(f"teacher.checkpoint: method fitnet needs a retinanet teacher, this one is a {teacher.spec.kind}")
    if not isinstance(teacher, FasterRCNN) and job.method != "fitnet" and job.distill.assistant is not None:
        problems.append(
            "distill.assistant: describes an R-CNN head, but the assistant of this teacher is a head like its own, a "
            f"{teacher.spec.kind}; use null"
        )
    if job.distill.rois == "teacher" and not isinstance(teacher, FasterRCNN):
        problems.append(
            "distill.rois: teacher needs a faster_rcnn teacher, whose answers belong to RoIs; this one is a "
            f"{teacher.spec.kind}: use student"
        )
    if teacher.num_classes != num_classes:
        problems.append(f"teacher.checkpoint: the teacher knows {teacher.num_classes} classes, the data has {num_classes}")
    if job.method == "copy_only" and not job.distill.copy_head:
        problems.append("distill.copy_head: false leaves method copy_only nothing of the teacher; use method assist")
    if job.method in ("akd", "head") and isinstance(teacher, FasterRCNN):
        layers = (job.distill.assistant or teacher.spec.roi).fcs
        if layers != teacher.spec.roi.fcs:
            problems.append(
                f"distill.assistant.fcs: the assistant has {layers} fully connected layers, the teacher {teacher.spec.roi.fcs};"
                " AKD pairs them one to one"
            )
    return problems
