"""The teacher is a guest: frozen, in eval mode, and no part of any module tree but its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headkd_ray.detectors import DenseDetector, Detector, RoIs, TwoStageDetector
from headkd_ray.distill.assistants import Insight


class Guest:
    """Holds a detector where ``nn.Module`` cannot see it, so that it never reaches an optimizer, a checkpoint or train mode."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval().requires_grad_(False)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or dtype."""
        self.detector._apply(change)

    def view(self, images: Tensor, sizes: Tensor, x: Tensor, student: Detector) -> Tensor:
        """The teacher's input: the student's tensor ``x`` itself, unless the teacher was trained on other pixel statistics."""
        if self.detector.spec.pixels == student.spec.pixels:
            return x
        return self.detector.normalise(images, sizes)

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """The teacher's pyramid of normalised images ``x`` (B, 3, H, W)."""
        return self.detector.features(x)

    @torch.no_grad()
    def insight(self, x: Tensor, rois: Sequence[RoIs]) -> Insight:
        """What the teacher's head makes of normalised images ``x`` (B, 3, H, W).

        A two-stage teacher is asked about ``rois``, stage by stage, and its RPN never runs; a dense one looks at everything.
        """
        return self.insight_of(self.detector.features(x), rois)

    @torch.no_grad()
    def insight_of(self, features: list[Tensor], rois: Sequence[RoIs]) -> Insight:
        """The same from its pyramid ``features``."""
        if isinstance(self.detector, TwoStageDetector):
            stages = zip(self.detector.roi.stages, rois, strict=True)
            return Insight.of_stages([stage(features, own.boxes, own.image) for stage, own in stages])
        assert isinstance(self.detector, DenseDetector)
        return Insight.of_maps(self.detector.head.taps(features))
