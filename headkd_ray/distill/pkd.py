"""PKD (Cao et al. 2022): the student's pyramid imitates a teacher's up to a scale and a shift of each channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import Detector
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job


class PKD(Term):
    """``loss_pkd``: the sum over the levels whose strides both pyramids have of 1 - Pearson's correlation, averaged over the
    channels. There is no warm-up and no adapter, so both pyramids must be equally wide."""

    reads_teacher = "pyramid"

    def __init__(self, levels: list[tuple[int, int]], weight: float = 1.0) -> None:
        """``levels``: places in the student's and in the teacher's pyramid of levels that are compared."""
        super().__init__(weight)
        self.levels = levels

    @classmethod
    def build(cls, parts: Parts, assistant: str = "") -> PKD:
        assert parts.teacher is not None
        own, theirs = parts.student.strides, parts.teacher.strides
        levels = [(own.index(stride), theirs.index(stride)) for stride in own if stride in theirs]
        return cls(levels, parts.job.distill.pkd_weight)

    @classmethod
    def problems(cls, job: Job, teacher: Detector | None) -> list[str]:
        assert teacher is not None
        own, theirs = job.student.neck.channels, teacher.spec.neck.channels
        if own == theirs:
            return []
        wanted = f"compares pyramids channel by channel; the student's has {own} channels, the teacher's {theirs}"
        return [f"distill.pkd_weight: {wanted}: set student.neck.channels to {theirs}, or remove the key"]

    def distances(self, forward: StepForward) -> Losses:
        assert forward.teacher is not None
        own, theirs = forward.student.pyramid, forward.teacher.pyramid
        return {"loss_pkd": torch.stack([pearson_distance(own[i], theirs[j]) for i, j in self.levels]).sum()}


def pearson_distance(own: Tensor, theirs: Tensor) -> Tensor:
    """Half the mean squared difference of maps (B, C, H, W) of which each channel is standardised over batch and space: with n
    values a channel (n - 1) / n times 1 - r, averaged over channels. ``theirs`` gets no gradient."""
    return F.mse_loss(standardised(own.float()), standardised(theirs.detach().float())) / 2


def standardised(maps: Tensor) -> Tensor:
    """Rows (C, B * H * W) of ``maps`` (B, C, H, W) with mean 0 and standard deviation 1, or all 0 where there is one value."""
    rows = maps.transpose(0, 1).flatten(1)
    deviation = rows.std(1, correction=min(1, rows.shape[1] - 1), keepdim=True)
    return (rows - rows.mean(1, keepdim=True)) / (deviation + 1e-6)
