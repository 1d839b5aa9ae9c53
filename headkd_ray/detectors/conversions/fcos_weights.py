"""Recognise and convert FCOS in mmdet's and torchvision's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet, number, type_name
from headkd_ray.detectors.conversions.from_torchvision import (
    DENSE_NECK,
    DENSE_RENAMES,
    WB,
    TorchvisionConversion,
    background_dropped,
)
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.job import FCOSHeadSpec, Spec

PLAIN: Mapping[str, Any] = {"center_radius": None, "norm_on_bbox": False, "centerness_on_reg": False, "box_loss": "iou"}
"""The switches of an FCOS without its later improvements, mmdet's defaults."""


def _head(state: State) -> tuple[FCOSHeadSpec, int]:
    """Infer the head; what no shape tells is as in the paper, with 32 groups in the norm.

    Convs without a bias beside the norm are the plain FCOS's: mmdet's configs and the research branch's set ``conv_bias``
    together with the later improvements.
    """
    cls_out, box_out = shapes.need(state, "head.cls_out.weight", "head.box_out.weight")
    if box_out.shape[0] != 4:
        raise ShapeError(f"an FCOS head with {box_out.shape[0] / 4:g} boxes a cell; only 1 is supported")
    towers = shapes.tower(state, "an FCOS head", cls_out.shape[1], FCOSHeadSpec().norm_groups)
    return FCOSHeadSpec(**towers, **({} if towers.get("conv_bias", True) else PLAIN)), cls_out.shape[0]


def _switches(head: FCOSHeadSpec, said: Mapping[str, Any]) -> FCOSHeadSpec:
    """Set the switches of a config's head section ``said`` in ``head``; what it does not say is mmdet's default."""
    radius = number(said.get("center_sample_radius"), 1.5)
    return head.replace(
        {
            "center_radius": radius if said.get("center_sampling") is True else None,
            "norm_on_bbox": said.get("norm_on_bbox") is True,
            "centerness_on_reg": said.get("centerness_on_reg") is True,
            "box_loss": "giou" if type_name(said.get("loss_bbox")) == "GIoULoss" else "iou",
        }
    )


def _arranged(state: State) -> State:
    """Drop class 0, and give each level the scale 1, which torchvision does not have."""
    return {**background_dropped(state), **{f"head.scales.{level}": torch.tensor(1.0) for level in range(len(STRIDES))}}


def _torchvision_sections(state: State, in_channels: int) -> tuple[dict[str, Spec], int]:
    """Infer the head, with torchvision's points, scores and thresholds."""
    head, num_classes = _head(state)
    rules = head.postprocess.replace({"score": 0.2, "nms_iou": 0.6})
    return {"head": head.replace({"points": "corner", "score": "sqrt", "postprocess": rules})}, num_classes


MMDET = DenseFromMMDet(
    has=r"(?:bbox|rpn)_head\.(?:conv|fcos)_centerness\.",
    layers={
        "conv_cls": "cls_out",
        "conv_reg": "box_out",
        "conv_centerness": "centerness_out",
        "fcos_cls": "cls_out",  # before mmdet 2.6
        "fcos_reg": "box_out",
        "fcos_centerness": "centerness_out",
    },
    others={r"scales\.(\d+)\.scale": r"scales.\1"},
    head=_head,
    switches=_switches,
    relu_before_p7=True,
)
TORCHVISION = TorchvisionConversion(
    has=r"head\.regression_head\.bbox_ctrness\.",
    renames=((rf"head\.regression_head\.bbox_ctrness\.{WB}", r"head.centerness_out.\1"), *DENSE_RENAMES),
    arranged=_arranged,
    sections=_torchvision_sections,
    neck=DENSE_NECK,
    overwrites_eps=False,
)
