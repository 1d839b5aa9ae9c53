"""What the dense detectors share: one head on P3 to P7."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.proposals import Detections


class DenseDetector(Detector):
    """Backbone, FPN on C3 to C5, and the dense head that a subclass sets."""

    head: Any

    def losses(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The head's; see :meth:`Detector.losses`. Nothing is sampled."""
        losses: dict[str, Tensor] = self.head.losses(self.head(features), sizes, boxes, labels)
        return losses

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        detections: Detections = self.head.detect(self.head(self.features(x)), sizes)
        return detections
