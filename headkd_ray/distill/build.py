"""A trainee from a job."""

from __future__ import annotations

from torch import nn

from headkd_ray.detectors import FCOS, Detector, FasterRCNN, FCOSHead, RetinaHead, RetinaNet, RoIHead, build_detector
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistants import DenseAssistant, RoIAssistant
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.dense_head import DenseHEAD
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.distill.head import ASSISTANT_STRIDES, HEAD
from headkd_ray.distill.tf_head import TFHEAD, Weights
from headkd_ray.distill.trainee import Trainee
from headkd_ray.errors import JobError
from headkd_ray.job import DistillSpec, Job, RoIHeadSpec


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
            _copy(teacher.head, student.head, "student.head")
        return FitNet(student, teacher, job.distill)

    assert isinstance(student, (RetinaNet, FCOS))
    ckd_stop = None if job.distill.ckd_epochs is None else job.distill.ckd_epochs * steps_per_epoch
    if job.method == "tf_head":
        return _tf_head(student, job.distill, ckd_stop)

    if isinstance(teacher, (RetinaNet, FCOS)):
        return _dense_head(student, teacher, job, ckd_stop)

    spec = job.distill.assistant or (teacher.spec.roi if isinstance(teacher, FasterRCNN) else RoIHeadSpec())
    assistant = RoIHead(spec, job.student.neck.channels, num_classes, ASSISTANT_STRIDES)
    if not isinstance(teacher, FasterRCNN):
        return HEAD(student, assistant, job.distill)
    if job.distill.copy_head:
        _copy(teacher.roi, assistant, "distill.assistant")
    width = teacher.spec.roi.fc_channels
    akd = AKD(nn.Linear(spec.fc_channels, width) for _ in range(spec.fcs)) if job.method in ("akd", "head") else None
    ckd = CKD(nn.Linear(student.spec.head.channels, width)) if job.method == "head" else None
    return HEAD(student, assistant, job.distill, teacher if akd else None, akd, ckd, ckd_stop)


def _dense_head(student: RetinaNet | FCOS, teacher: RetinaNet | FCOS, job: Job, ckd_stop: int | None) -> DenseHEAD:
    """The assistant is a head of the teacher's kind and widths."""
    channels, width, theirs = student.spec.neck.channels, student.spec.head.channels, teacher.spec.head.channels
    assistant: FCOSHead | RetinaHead
    if isinstance(teacher, FCOS):
        assistant = FCOSHead(teacher.spec.head, channels, student.num_classes)
    else:
        assistant = RetinaHead(teacher.spec.head, channels, student.num_classes)
    if job.distill.copy_head:
        _copy(teacher.head, assistant, "the assistant of a dense teacher")
    if job.method == "copy_only":
        return DenseHEAD(student, assistant, job.distill)
    akd = nn.ModuleList(nn.Conv2d(theirs, theirs, 1) for _ in ("classification", "box"))
    ckd = nn.Conv2d(width, theirs, 1) if job.method == "head" else None
    return DenseHEAD(student, assistant, job.distill, teacher, akd, ckd, ckd_stop)


def _tf_head(student: RetinaNet | FCOS, spec: DistillSpec, ckd_stop: int | None) -> TFHEAD:
    """All assistants are fresh. A dense one has as many features as the student's pyramid feeds it."""
    channels, width, classes = student.spec.neck.channels, student.spec.head.channels, student.num_classes
    assistants: dict[str, DenseAssistant | RoIAssistant] = {}
    weights = {}
    if (fcos := spec.assistants.fcos) is not None:
        assistants["fcos"] = DenseAssistant(FCOSHead(fcos.head, channels, classes), width)
        weights["fcos"] = Weights(fcos.gt_weight, fcos.ckd_weight)
    if (rcnn := spec.assistants.rcnn) is not None:
        head = RoIHead(rcnn.head, channels, classes, ASSISTANT_STRIDES)
        anchors = student.head.anchors.per_cell if rcnn.decouple else 1
        assistants["rcnn"] = RoIAssistant(head, CKD(nn.Linear(width, anchors * rcnn.head.fc_channels), anchors))
        weights["rcnn"] = Weights(rcnn.gt_weight, rcnn.ckd_weight)
    if (retinanet := spec.assistants.retinanet) is not None:
        assistants["retinanet"] = DenseAssistant(RetinaHead(retinanet.head, channels, classes), width)
        weights["retinanet"] = Weights(retinanet.gt_weight, retinanet.ckd_weight)
    return TFHEAD(student, assistants, weights, spec.warmup_steps, ckd_stop)


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
        raise JobError(
            [*problems, "distill.copy_head: make the shapes equal (student.neck.channels, head widths) or set it to false"]
        )
    target.load_state_dict(theirs)


def _shape(tensor: object) -> str:
    shape = getattr(tensor, "shape", None)
    return "missing" if shape is None else "x".join(map(str, shape)) or "scalar"
