"""The student's own forward pass, as far as assistants and distillation need to know it; the same for every kind of student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import DenseDetector, Detector, GroundTruth, Proposals, RoIHead, RoIs, TwoStageDetector
from headkd_ray.detectors.base import DenseOutputs, Losses
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.job import RoIHeadSpec

Sampler = Callable[[Proposals, GroundTruth, RoIHeadSpec, int, "torch.Generator | None"], RoIs]
"""What makes RoIs of proposals: :func:`headkd_ray.detectors.ops.rois.sample_rois` in training."""


@dataclass(frozen=True)
class StudentForward:
    """What a student makes of a batch."""

    student: Detector
    truth: GroundTruth
    losses: Losses
    """The student's own ground-truth losses."""
    pyramid: list[Tensor]
    """(B, channels, H, W): P3 to P7 of a dense student, P2 to P6 of a two-stage one."""
    levels: list[Tensor]
    """P3 to P7, which dense heads take."""
    lead: Tap
    """What CKD trains: the last classification conv of a dense student, the (first stage's) last fc of a two-stage one."""
    outputs: DenseOutputs | None
    """Of a dense student's head; None for a two-stage one."""
    rois: RoIs | None
    """Of a two-stage student's first stage, row for row with ``lead``; None for a dense one."""

    @classmethod
    def run(cls, student: Detector, x: Tensor, truth: GroundTruth, generator: torch.Generator | None) -> StudentForward:
        """The forward pass on normalised images ``x`` (B, 3, H, W); ``generator`` draws a two-stage student's samples."""
        pyramid = student.features(x)
        if isinstance(student, TwoStageDetector):
            losses, stages = student.losses_and_stages(pyramid, truth, generator)
            # P7 is a pool of P6, which is one of P5: a student without convs of its own there is given none for an assistant.
            levels = [*pyramid[1:], F.max_pool2d(pyramid[-1], 1, stride=2)]
            return cls(student, truth, losses, pyramid, levels, stages[0].outputs.taps[-1], None, stages[0].rois)
        assert isinstance(student, DenseDetector)
        outputs = student.head(pyramid)
        losses = student.head.losses(outputs, truth)
        return cls(student, truth, losses, pyramid, pyramid, outputs.taps[0], outputs, None)

    def rois_for(self, head: RoIHead, sample: Sampler = sample_rois, generator: torch.Generator | None = None) -> RoIs:
        """The RoIs that ``head`` learns at: a dense student's proposals, sampled; a two-stage student's are its own."""
        if self.rois is not None:
            return self.rois
        assert isinstance(self.student, DenseDetector)
        proposals = self.student.head.proposals(self.outputs, self.truth.sizes)
        return sample(proposals, self.truth, head.stages[0].spec, self.student.num_classes, generator)
