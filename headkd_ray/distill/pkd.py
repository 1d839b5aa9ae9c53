"""PKD (Cao et al. 2022): the student's pyramid imitates a teacher's up to the scale and offset of each channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import PyramidDetector
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job, PyramidDetectorSpec
from headkd_ray.teacher.source import AnyTeacher


class PKD(Term):
    """The loss ``loss_pkd``: 1 - Pearson's correlation, averaged over channels and summed over levels of equal stride.

    There is no warm-up and no adapter, so both pyramids must have the same number of channels.
    """

    reads_teacher = "pyramid"

    def __init__(self, levels: list[tuple[int, int]], weight: float = 1.0) -> None:
        """``levels`` lists the compared levels by their indices in the student's and the teacher's pyramid."""
        super().__init__(weight)
        self.levels = levels

    @classmethod
    def build(cls, parts: Parts, assistant: str = "") -> PKD:
        assert isinstance(parts.teacher, PyramidDetector)  # the job's own checks
        own, theirs = parts.student.strides, parts.teacher.strides
        levels = [(own.index(stride), theirs.index(stride)) for stride in own if stride in theirs]
        return cls(levels, parts.job.distill.pkd_weight)

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        assert isinstance(teacher, PyramidDetector) and isinstance(job.student, PyramidDetectorSpec)  # the job's own checks
        own, theirs = job.student.neck.channels, teacher.spec.neck.channels
        if own == theirs:
            return []
        wanted = f"compares pyramids channel by channel, but the student's has {own} channels, the teacher's {theirs}"
        return [f"distill.pkd_weight: {wanted}; set student.neck.channels to {theirs}, or remove the key"]

    def distances(self, forward: StepForward) -> Losses:
        assert forward.teacher is not None
        own, theirs = forward.student.pyramid, forward.teacher.pyramid
        return {"loss_pkd": torch.stack([pearson_distance(own[i], theirs[j]) for i, j in self.levels]).sum()}


def pearson_distance(own: Tensor, theirs: Tensor) -> Tensor:
    """Return half the mean squared difference of maps (B, C, H, W), each channel standardised over batch and space.

    With n values per channel this is (n - 1) / n times 1 - r, averaged over channels. ``theirs`` gets no gradient.
    """
    return F.mse_loss(standardised(own.float()), standardised(theirs.detach().float())) / 2


def standardised(maps: Tensor) -> Tensor:
    """Standardise ``maps`` (B, C, H, W) to rows (C, B * H * W) of mean 0 and standard deviation 1; a single value becomes 0."""
    rows = maps.transpose(0, 1).flatten(1)
    deviation = rows.std(1, correction=min(1, rows.shape[1] - 1), keepdim=True)
    return (rows - rows.mean(1, keepdim=True)) / (deviation + 1e-6)
