"""What every two-stage detector is: RPN on P2 to P6, a RoI head on P2 to P5."""

from __future__ import annotations

import torch
from torch import Tensor

from headkd_ray.detectors.cascade_head import CascadeHead
from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.proposals import Detections
from headkd_ray.detectors.roi_head import Look, RoIHead
from headkd_ray.detectors.rois import flatten, sample_rois
from headkd_ray.detectors.rpn import RPN
from headkd_ray.job import CascadeRCNNSpec, FasterRCNNSpec

ROI_STRIDES = (4, 8, 16, 32)
"""Pixels a cell of P2 to P5."""


class TwoStageDetector(Detector):
    """Backbone, FPN on C2 to C5, RPN, and the RoI head that a subclass sets."""

    spec: FasterRCNNSpec | CascadeRCNNSpec
    roi: RoIHead | CascadeHead

    def __init__(self, spec: FasterRCNNSpec | CascadeRCNNSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=0)
        self.rpn = RPN(spec.rpn, spec.neck.channels)

    def losses(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls``, ``loss_rpn_box`` and the RoI head's as ``loss_roi_*``; see :meth:`Detector.losses`."""
        return self.look(features, sizes, boxes, labels, generator)[0]

    def look(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], list[Look]]:
        """The losses, and what the RoI head looked at for them, stage by stage. Arguments as in :meth:`losses`."""
        outputs = self.rpn(features)
        losses = self.rpn.losses(outputs, sizes, boxes, labels, generator)
        truth = Truth.of(boxes, labels)
        proposals = self.rpn.proposals(outputs, sizes)
        rois = sample_rois(proposals, truth, self.roi.stages[0].spec, self.num_classes, generator)
        looks = self.roi.looks(features, rois, truth, sizes, generator)
        return losses | {f"loss_roi_{name}": loss for name, loss in self.roi.losses(looks).items()}, looks

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        features = self.features(x)
        rois, image = flatten(self.rpn.proposals(self.rpn(features), sizes))
        return self.roi.detect(features, rois, image, sizes)
