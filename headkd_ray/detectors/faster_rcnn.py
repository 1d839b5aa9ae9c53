"""Faster R-CNN: RPN on P2 to P6, box head on P2 to P5."""

from __future__ import annotations

import torch
from torch import Tensor

from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.proposals import Detections
from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.rois import flatten, sample_rois
from headkd_ray.detectors.rpn import RPN
from headkd_ray.job import FasterRCNNSpec

ROI_STRIDES = (4, 8, 16, 32)
"""Pixels a cell of P2 to P5."""


class FasterRCNN(Detector):
    """Backbone, FPN on C2 to C5, RPN, RoI head."""

    spec: FasterRCNNSpec

    def __init__(self, spec: FasterRCNNSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=0)
        self.rpn = RPN(spec.rpn, spec.neck.channels)
        self.roi = RoIHead(spec.roi, spec.neck.channels, num_classes, ROI_STRIDES)

    def losses(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls``, ``loss_rpn_box``, ``loss_roi_cls``, ``loss_roi_box``; see :meth:`Detector.losses`."""
        outputs = self.rpn(features)
        losses = self.rpn.losses(outputs, sizes, boxes, labels, generator)
        truth = Truth.of(boxes, labels)
        rois = sample_rois(self.rpn.proposals(outputs, sizes), truth, self.roi.spec, self.num_classes, generator)
        roi_losses = self.roi.losses(self.roi(features, rois.boxes, rois.image), rois)
        return losses | {f"loss_roi_{name}": loss for name, loss in roi_losses.items()}

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        features = self.features(x)
        rois, image = flatten(self.rpn.proposals(self.rpn(features), sizes))
        return self.roi.detect(self.roi(features, rois, image), rois, image, sizes)
