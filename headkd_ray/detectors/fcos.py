"""FCOS: a dense detector without anchors on P3 to P7."""

from __future__ import annotations

from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.fcos_head import FCOSHead
from headkd_ray.job import FCOSSpec


class FCOS(DenseDetector):
    """Losses: ``loss_cls``, ``loss_box``, ``loss_centerness``."""

    spec: FCOSSpec
    head: FCOSHead

    def __init__(self, spec: FCOSSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=1)
        self.head = FCOSHead(spec.head, spec.neck.channels, num_classes)
