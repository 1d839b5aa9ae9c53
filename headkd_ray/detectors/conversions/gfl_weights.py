"""Recognise and convert GFL in mmdet's files."""

from __future__ import annotations

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.job import GFLHeadSpec


def _head(state: State) -> tuple[GFLHeadSpec, int]:
    """Infer the head; what no shape tells is as in mmdet, with 32 groups in the norm."""
    cls_out, box_out = shapes.need(state, "head.cls_out.weight", "head.box_out.weight")
    if box_out.shape[0] % 4 or box_out.shape[0] < 8:
        raise ShapeError(f"a GFL head with {box_out.shape[0]} box outputs a cell; 4 x (reg_max + 1) are needed")
    towers = shapes.tower(state, "a GFL head", cls_out.shape[1], GFLHeadSpec().norm_groups)
    return GFLHeadSpec(**towers, reg_max=box_out.shape[0] // 4 - 1), cls_out.shape[0]


MMDET = DenseFromMMDet(
    has=r"(?:bbox|rpn)_head\.gfl_cls\.",
    layers={"gfl_cls": "cls_out", "gfl_reg": "box_out"},
    others={r"scales\.(\d+)\.scale": r"scales.\1"},
    head=_head,
)
