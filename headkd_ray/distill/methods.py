"""Building the training model of a job: its student, its assistants, and the list of terms that its method stands for."""

from __future__ import annotations

from typing import Any

from headkd_ray.detectors import PyramidDetector, RoIHead, build_detector, head_class
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.detectors.two_stage import ROI_LEVELS
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.assistant_loss import AssistantLoss
from headkd_ray.distill.assistants import Assistant, assistant_of
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.copying import copy_weights
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.distill.model import TrainingModel
from headkd_ray.distill.pkd import PKD
from headkd_ray.distill.start import Start
from headkd_ray.distill.terms import AssistantPlan, Parts, Term
from headkd_ray.errors import JobError
from headkd_ray.job import METHODS, Job, PyramidDetectorSpec, RoIHeadSpec
from headkd_ray.job.method_terms import terms_of
from headkd_ray.teacher.source import AnyTeacher

TERMS: dict[str, type[Term]] = {"assistant": AssistantLoss, "akd": AKD, "ckd": CKD, "fitnet": FitNet, "pkd": PKD}
"""The classes of terms by their names in ``headkd_ray.job.method_terms``."""

ASSIST = "assist"
"""Name of the single assistant of all methods but tf_head, as in ``loss_assist_cls``."""


def build_training_model(
    job: Job, num_classes: int, teacher: AnyTeacher | None, steps_per_epoch: int, start: Start | None = None
) -> TrainingModel:
    """Build the student of ``job`` with its assistants and terms, freshly initialised from torch's default generator.

    ``teacher`` must be given exactly when ``job.method`` has one; ``steps_per_epoch`` counts optimizer steps. ``start`` is the
    detector that the student starts from, if there is one. Raises JobError if student, teacher and method do not fit together.
    """
    kinds = [TERMS[name] for name in terms_of(job)]
    problems = _problems(job, num_classes, teacher, kinds)
    if problems:
        raise JobError(problems)
    student = build_detector(job.student, num_classes)
    if job.optim.backbone_lr_factor != 1.0 and not student.backbone_parameters():
        raise JobError("optim.backbone_lr_factor: the student has no backbone of its own; remove the key")
    if start is not None:
        start.load_into(student)
    if not isinstance(student, PyramidDetector):
        return TrainingModel(student)
    plans = assistant_plans(job, teacher) if "assistant" in METHODS[job.method].terms else {}
    assistants: dict[str, Assistant] = {}
    parts = Parts(job, student, teacher, assistants, plans, steps_per_epoch)
    terms: list[Term] = []
    for name, plan in plans.items():  # an assistant before its adapters: seeded runs draw initial weights in this order
        assistants[name] = _assistant(plan, student, teacher, copy=job.distill.copy_head)
        terms += [term for kind in kinds if kind.per_assistant for term in kind.build_all(parts, name)]
    terms += [term for kind in kinds if not kind.per_assistant for term in kind.build_all(parts, "")]
    if not _in_the_step(job, terms):
        return TrainingModel(student, assistants, terms)
    assert isinstance(teacher, PyramidDetector)  # a source has answered before the step
    return TrainingModel(student, assistants, terms, teacher)


def assistant_plans(job: Job, teacher: AnyTeacher | None) -> dict[str, AssistantPlan]:
    """Plan the assistants of a job, by name: those that tf_head lists, else a single one.

    The single one has a head of the teacher's kind and widths or, without a teacher, an R-CNN head.
    """
    distill = job.distill
    if job.method == "tf_head":
        listed = {name: getattr(distill.assistants, name) for name in type(distill.assistants).model_fields}
        return {
            name: AssistantPlan(
                spec.head, spec.gt_weight, spec.ckd_weight, warm=True, decouple=getattr(spec, "decouple", False)
            )
            for name, spec in listed.items()
            if spec is not None
        }
    head = distill.assistant or (teacher.detection_head.spec if teacher is not None else RoIHeadSpec())
    return {ASSIST: AssistantPlan(head, distill.assistant_weight, distill.ckd_weight, warm=distill.warm_assistant)}


def _assistant(plan: AssistantPlan, student: PyramidDetector, teacher: AnyTeacher | None, copy: bool) -> Assistant:
    """Build the planned assistant on the student's pyramid, with the teacher's weights if there is a teacher and ``copy``."""
    make: Any = head_class(plan.head)
    # A dense head takes P3 to P7 of any student; a RoI head pools from the finest levels that the student has.
    strides = student.strides[:ROI_LEVELS] if issubclass(make, RoIHead) else STRIDES
    head = make(plan.head, student.spec.neck.channels, student.num_classes, strides)
    if teacher is not None and copy:
        copy_weights(teacher.detection_head, head, "distill.assistant")
    return assistant_of(head)


def _in_the_step(job: Job, terms: list[Term]) -> bool:
    """Return whether the teacher runs in the step; if not, its outputs come with the batches, or no term reads them."""
    reads = {term.reads_teacher for term in terms}
    here = job.distill.rois == "student" and (job.teacher is None or job.teacher.placement == "inline")
    return "pyramid" in reads or ("head" in reads and here)


def _problems(job: Job, num_classes: int, teacher: AnyTeacher | None, kinds: list[type[Term]]) -> list[str]:
    """List everything in the job or its teacher that does not fit the method, each with the key to mend."""
    if kinds and not isinstance(job.student, PyramidDetectorSpec):
        return [f"student.kind: {job.student.kind} has no feature pyramid for method {job.method}; use method supervised"]
    if not METHODS[job.method].teacher:
        return [f"teacher: method {job.method} uses none"] if teacher is not None else []
    if teacher is None:
        return [f"teacher: method {job.method} needs one"]
    problems = [problem for kind in kinds for problem in kind.problems(job, teacher)]
    if teacher.num_classes != num_classes:
        problems.append(f"teacher.checkpoint: the teacher has {teacher.num_classes} classes, but the data has {num_classes}")
    if job.method == "copy_only" and not job.distill.copy_head:
        problems.append("distill.copy_head: all that method copy_only does is copy the head; set true, or use method assist")
    return problems
