"""The base class of dense detectors: one head on P3 to P7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from headkd_ray.detectors.base import DenseHead, Losses, PyramidDetector, Rules
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.proposals import Detections
from headkd_ray.job import DenseDetectorSpec

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3 to P7 in pixels."""


class DenseDetector(PyramidDetector):
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

    @property
    def rules(self) -> Rules:
        kept = self.head.spec.postprocess
        return Rules(kept.score, kept.nms_iou, kept.max_detections)

    def class_rows(self) -> Mapping[str, Tensor]:
        rows = torch.arange(self.num_classes).repeat(self.head.anchors.per_cell)  # anchor-major
        return {"head.cls_out.weight": rows, "head.cls_out.bias": rows}

    @staticmethod
    def newer_keys(spec: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if "conv_bias" not in type(spec.head).model_fields or "conv_bias" in spec.head.model_fields_set:
            return {}
        return {"head.conv_bias": "head.cls_tower.0.bias" in tensors}
