"""The official code's names for losses and features of each kind of head, in mmdet and in HEAD's configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headkd_ray.detectors import DenseHead, RoIHead
from headkd_ray.detectors.fcos import FCOSHead
from headkd_ray.detectors.gfl import GFLHead
from headkd_ray.detectors.reppoints import RepPointsHead
from headkd_ray.detectors.retinanet import RetinaHead

Head = DenseHead[Any] | RoIHead

_LOSSES = {"box": "bbox", "init": "pts_init", "refine": "pts_refine"}
"""{our short name: mmdet's} of the losses of all heads, where they differ."""
_DENSE_FEATURES: Mapping[type[DenseHead[Any]], tuple[str, ...]] = {
    RetinaHead: ("retina_cls", "retina_reg"),
    FCOSHead: ("fcos_cls", "fcos_reg"),
    GFLHead: ("gfl_cls", "gfl_reg"),
    RepPointsHead: ("rp_cls", "rp_reg", "rp_pts_init_conv", "rp_cls_conv", "rp_pts_refine_conv"),
}
"""Names of a dense head's features for distillation, in the order of its ``taps``."""


def loss_name(short: str) -> str:
    """Return mmdet's name of a loss of ours: loss_bbox of box, loss_rpn_bbox of rpn_box, s0.loss_bbox of s0_box."""
    part, _, loss = short.rpartition("_")
    name = _LOSSES.get(loss, loss)
    if re.fullmatch(r"s\d+", part):
        return f"{part}.loss_{name}"
    return f"loss_{part}_{name}" if part else f"loss_{name}"


def assistant_suffix(assistant: str) -> str:
    """Return what the official names of an assistant's losses end with; ``assistant`` is its official name."""
    return {"rcnn": "", "cascade": "_roi"}.get(assistant, f"_{assistant}")


def feature_names(head: Head) -> list[str]:
    """Return the official names of a head's features for distillation, in the order of its ``tap_channels``."""
    if isinstance(head, DenseHead):
        return list(_DENSE_FEATURES[type(head)])
    cascade = len(head.stages) > 1
    return [
        f"rcnn_bbox{'' if last else '_aux'}{stage if cascade else ''}"
        for stage, each in enumerate(head.stages)
        for last in [False] * (len(each.fc_widths) - 1) + [True]
    ]


def akd_losses(head: Head) -> list[str]:
    """Return the official names of the AKD losses of an assistant ``head``, in the order of its ``tap_channels``."""
    if isinstance(head, DenseHead):
        return [f"loss_{name}" for name in feature_names(head)]
    return [f"loss_mimic_{name.replace('_bbox', '')}" for name in feature_names(head)]


def ckd_loss(assistant: str | None, towers: int, tap: int) -> str:
    """Return the official name of a CKD loss: of the ``tap``-th of ``towers`` towers; ``assistant`` None = the teacher's."""
    if assistant is not None:
        return f"loss_self_{assistant}"
    return "loss_cross" if towers == 1 else ("loss_cross_cls", "loss_cross_reg")[tap]
