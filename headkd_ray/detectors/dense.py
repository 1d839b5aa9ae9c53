"""The base class of dense detectors: one head on P3 to P7."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from headkd_ray.detectors.base import DenseHead, Detector, Losses
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.proposals import Detections
from headkd_ray.job import DenseDetectorSpec

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3 to P7 in pixels."""


class DenseDetector(Detector):
    """A backbone, an FPN on C3 to C5 and a dense head on P3 to P7; a subclass names the head's class."""

    spec: DenseDetectorSpec
    strides = STRIDES
    head_class: ClassVar[type[DenseHead[Any]]]

    def __init__(self, spec: DenseDetectorSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes)
        self.head = self.head_class(spec.head, spec.neck.channels, num_classes, self.strides)

    @property
    def detection_head(self) -> DenseHead[Any]:
        return self.head

    def losses(self, features: list[Tensor], truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Compute the head's losses. Nothing is sampled, so ``generator`` is not used."""
        return self.head.losses(self.head(features), truth)

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        return self.head.detect(self.head(self.features(x)), sizes)
