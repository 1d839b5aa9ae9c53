"""Faster R-CNN (Ren et al. 2015) with an FPN: an RPN on P2 to P6 and one box head on P2 to P5."""

from __future__ import annotations

from headkd_ray.detectors.roi_head import BoxHead
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.job import FasterRCNNSpec


class FasterRCNN(TwoStageDetector):
    """Faster R-CNN, with losses ``loss_rpn_cls``, ``loss_rpn_box``, ``loss_roi_cls`` and ``loss_roi_box``."""

    spec: FasterRCNNSpec
    roi: BoxHead
    head_class = BoxHead
