"""The FitNet baseline ("homogeneous" in the official README): the student's pyramid imitates a teacher of its own kind."""

from __future__ import annotations

import torch
from torch import nn

from headkd_ray.detectors import PyramidDetector
from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.ops.losses import mean_squared_error
from headkd_ray.distill.copying import copy_weights
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job
from headkd_ray.teacher.source import AnyTeacher


class FitNet(Term):
    """The loss ``loss_fitnet``: the sum of MSE(1x1 conv(P_student), P_teacher) over the finest levels, without warm-up."""

    reads_teacher = "pyramid"

    def __init__(self, own: int, theirs: int, levels: int, weight: float = 1.0) -> None:
        """``own`` and ``theirs`` are the widths of the pyramids; ``levels`` is how many are imitated, finest first."""
        super().__init__(weight)
        self.adapters = nn.ModuleList(nn.Conv2d(own, theirs, kernel_size=1) for _ in range(levels))

    @classmethod
    def build(cls, parts: Parts, assistant: str = "") -> FitNet:
        student, teacher, spec = parts.student, parts.teacher, parts.job.distill
        assert isinstance(teacher, PyramidDetector)  # the job's own checks
        if spec.copy_head:
            copy_weights(teacher.detection_head, student.detection_head, "student.head")
        return cls(student.spec.neck.channels, teacher.spec.neck.channels, spec.fitnet_levels, spec.fitnet_weight)

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        assert isinstance(teacher, PyramidDetector)  # the job's own checks
        if teacher.spec.kind == job.student.kind:
            return []
        wanted = f"method fitnet needs a {job.student.kind} teacher"
        return [f"teacher.checkpoint: {wanted}, but this one is a {teacher.spec.kind}"]

    def distances(self, forward: StepForward) -> Losses:
        assert forward.teacher is not None
        levels = zip(self.adapters, forward.student.pyramid, forward.teacher.pyramid, strict=False)  # a level per adapter
        return {"loss_fitnet": torch.stack([mean_squared_error(adapt(own), target) for adapt, own, target in levels]).sum()}
