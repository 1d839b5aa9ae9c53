"""Recognise and convert RepPoints in mmdet's files."""

from __future__ import annotations

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.detectors.reppoints import POINTS
from headkd_ray.job import RepPointsHeadSpec


def _head(state: State) -> tuple[RepPointsHeadSpec, int]:
    """Infer the head; what no shape tells is as in mmdet, with 32 groups in the norm."""
    cls_out, cls_conv, points = shapes.need(state, "head.cls_out.weight", "head.cls_conv.weight", "head.refine_out.weight")
    if points.shape[0] != 2 * POINTS or "head.moment_transfer" not in state:
        raise ShapeError(f"a RepPoints head of another kind than moment with {POINTS} points a cell; only that is supported")
    towers = shapes.tower(state, "a RepPoints head", cls_conv.shape[1], RepPointsHeadSpec().norm_groups)
    return RepPointsHeadSpec(**towers, point_channels=cls_out.shape[1]), cls_out.shape[0]


MMDET = DenseFromMMDet(
    has=r"(?:bbox|rpn)_head\.reppoints_",
    layers={
        "reppoints_pts_init_conv": "init_conv",
        "reppoints_pts_init_out": "init_out",
        "reppoints_cls_conv": "cls_conv",
        "reppoints_cls_out": "cls_out",
        "reppoints_pts_refine_conv": "refine_conv",
        "reppoints_pts_refine_out": "refine_out",
    },
    others={r"moment_transfer": r"moment_transfer"},
    head=_head,
)
