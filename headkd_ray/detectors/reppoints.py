"""RepPoints: a dense detector on P3 to P7 whose boxes are sets of points."""

from __future__ import annotations

from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.reppoints_head import RepPointsHead
from headkd_ray.job import RepPointsSpec


class RepPoints(DenseDetector):
    """Losses: ``loss_cls``, ``loss_init``, ``loss_refine``."""

    spec: RepPointsSpec
    head: RepPointsHead

    def __init__(self, spec: RepPointsSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes, finest=1)
        self.head = RepPointsHead(spec.head, spec.neck.channels, num_classes)
