"""Cascade R-CNN (Cai & Vasconcelos 2018): RPN on P2 to P6, box heads in a row on P2 to P5."""

from __future__ import annotations

from headkd_ray.detectors.cascade_head import CascadeHead
from headkd_ray.detectors.two_stage import ROI_STRIDES, TwoStageDetector
from headkd_ray.job import CascadeRCNNSpec


class CascadeRCNN(TwoStageDetector):
    """Backbone, FPN on C2 to C5, RPN, a cascade of RoI heads."""

    spec: CascadeRCNNSpec
    roi: CascadeHead

    def __init__(self, spec: CascadeRCNNSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes)
        self.roi = CascadeHead(spec.roi, spec.neck.channels, num_classes, ROI_STRIDES)
