"""RetinaNet: a dense detector on P3 to P7."""

from __future__ import annotations

from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.retina_head import RetinaHead
from headkd_ray.job import RetinaNetSpec


class RetinaNet(DenseDetector):
    """Losses: ``loss_cls``, ``loss_box``."""

    spec: RetinaNetSpec
    head: RetinaHead

    def __init__(self, spec: RetinaNetSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=1)
        self.head = RetinaHead(spec.head, spec.neck.channels, num_classes)
