"""FCOS: a dense detector without anchors on P3 to P7."""

from __future__ import annotations

import torch
from torch import Tensor

from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.fcos_head import FCOSHead
from headkd_ray.detectors.proposals import Detections
from headkd_ray.job import FCOSSpec


class FCOS(Detector):
    """Backbone, FPN on C3 to C5, dense head."""

    spec: FCOSSpec

    def __init__(self, spec: FCOSSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=1)
        self.head = FCOSHead(spec.head, spec.neck.channels, num_classes)

    def losses(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_box``, ``loss_centerness``; see :meth:`Detector.losses`. Nothing is sampled."""
        return self.head.losses(self.head(features), sizes, boxes, labels)

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        return self.head.detect(self.head(self.features(x)), sizes)
