"""Faster R-CNN: RPN on P2 to P6, box head on P2 to P5."""

from __future__ import annotations

from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.two_stage import ROI_STRIDES, TwoStageDetector
from headkd_ray.job import FasterRCNNSpec


class FasterRCNN(TwoStageDetector):
    """Backbone, FPN on C2 to C5, RPN, one RoI head."""

    spec: FasterRCNNSpec
    roi: RoIHead

    def __init__(self, spec: FasterRCNNSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes)
        self.roi = RoIHead(spec.roi, spec.neck.channels, num_classes, ROI_STRIDES)
