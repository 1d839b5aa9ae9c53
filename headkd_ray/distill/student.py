"""The student's forward pass, with the outputs that assistants and terms read; the same for every kind of student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import (
    DenseDetector,
    GroundTruth,
    Proposals,
    PyramidDetector,
    RoIHead,
    RoIs,
    StageOutput,
    TwoStageDetector,
)
from headkd_ray.detectors.base import DenseOutputs, Losses
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.detectors.towers import first_convs
from headkd_ray.job import RoIHeadSpec

Sampler = Callable[[Proposals, GroundTruth, RoIHeadSpec, int, "torch.Generator | None"], RoIs]
"""A function that draws RoIs from proposals; in training :func:`headkd_ray.detectors.ops.rois.sample_rois`."""


@dataclass(frozen=True)
class StudentForward:
    """The outputs of a student for a batch."""

    student: PyramidDetector
    truth: GroundTruth
    losses: Losses
    """The student's own ground-truth losses."""
    pyramid: list[Tensor]
    """(B, channels, H, W): P3 to P7 of a dense student, P2 to P6 of a two-stage one."""
    levels: list[Tensor]
    """P3 to P7, the input of dense heads."""
    lead: Tap
    """A dense student's last classification conv, which CKD trains if not told otherwise; a two-stage one's last fc (of stage
    one)."""
    outputs: DenseOutputs | None
    """The outputs of a dense student's head; None for a two-stage one."""
    rois: RoIs | None
    """The RoIs of a two-stage student's first stage, row for row with ``lead``; None for a dense one."""

    @classmethod
    def run(cls, student: PyramidDetector, x: Tensor, truth: GroundTruth, generator: torch.Generator | None) -> StudentForward:
        """Run ``student`` on normalised images ``x`` (B, 3, H, W); ``generator`` draws a two-stage student's samples."""
        pyramid = student.features(x)
        if isinstance(student, TwoStageDetector):
            losses, stages = student.losses_and_stages(pyramid, truth, generator)
            return cls.of_stages(student, truth, losses, pyramid, stages)
        assert isinstance(student, DenseDetector)
        outputs = student.head(pyramid)
        losses = student.head.losses(outputs, truth)
        return cls(student, truth, losses, pyramid, pyramid, outputs.taps[0], outputs, None)

    @classmethod
    def of_stages(
        cls, student: PyramidDetector, truth: GroundTruth, losses: Losses, pyramid: list[Tensor], stages: Sequence[StageOutput]
    ) -> StudentForward:
        """Return the outputs of a two-stage ``student`` whose RoI head said ``stages``."""
        # P6 of a two-stage student is pooled from P5 and has no conv of its own, so P7 is pooled from P6 likewise.
        levels = [*pyramid[1:], F.max_pool2d(pyramid[-1], 1, stride=2)]
        return cls(student, truth, losses, pyramid, levels, stages[0].outputs.taps[-1], None, stages[0].rois)

    def ckd_feature(self, tap: int, conv: int | None) -> Tap:
        """Return the feature of a dense student that CKD trains, or a two-stage student's only one.

        It is the output of the tower of that ``tap``, 0 = classes and 1 = boxes, after its last conv or, counted from 1, its
        ``conv``, whose tower is then run once more up to there.
        """
        if self.outputs is None:
            return self.lead
        assert isinstance(self.student, DenseDetector)
        head = self.student.head
        if conv is None or conv == head.spec.convs:
            return self.outputs.taps[tap]
        return [first_convs((head.cls_tower, head.box_tower)[tap], conv)(level) for level in self.pyramid]

    def rois_for(self, head: RoIHead, sample: Sampler = sample_rois, generator: torch.Generator | None = None) -> RoIs:
        """Return the RoIs that ``head`` learns at: sampled proposals of a dense student, or a two-stage student's own RoIs."""
        if self.rois is not None:
            return self.rois
        assert isinstance(self.student, DenseDetector)
        proposals = self.student.head.proposals(self.outputs, self.truth.sizes)
        return sample(proposals, self.truth, head.stages[0].spec, self.student.num_classes, generator)
