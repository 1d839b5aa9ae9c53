"""Recognise and convert Cascade R-CNN in mmdet's files."""

from __future__ import annotations

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import TwoStageFromMMDet
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.job import CascadeHeadSpec, CascadeRPNSpec


def _roi(state: State, in_channels: int) -> tuple[CascadeHeadSpec, int]:
    """Infer the stages; what no shape tells (IoUs, delta scales, weights) is mmdet's."""
    stages, usual = shapes.count(state, r"roi\.stages\.(\d+)\."), len(CascadeHeadSpec().stages)
    if stages != usual:
        raise ShapeError(f"a cascade of {stages} stages; only {usual} are supported")
    first, num_classes = shapes.roi_head(state, "roi.stages.0.", in_channels)
    shape = {name: getattr(first, name) for name in ("convs", "conv_channels", "conv_norm", "fcs", "fc_channels", "pool")}
    agnostic = state["roi.stages.0.box_out.weight"].shape[0] == 4
    return CascadeHeadSpec(**shape, class_agnostic=agnostic), num_classes


MMDET = TwoStageFromMMDet(has=r"roi_head\.bbox_head\.\d", roi=_roi, rpn=CascadeRPNSpec)
