"""The official code's names for losses and features of each kind of head, in mmdet and in HEAD's configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headkd_ray.detectors import DenseHead, RoIHead
from headkd_ray.detectors.fcos import FCOSHead
from headkd_ray.detectors.gfl import GFLHead
from headkd_ray.detectors.reppoints import RepPointsHead
from headkd_ray.detectors.retinanet import RetinaHead

Head = DenseHead[Any] | RoIHead

_LOSSES: dict[str, str] = {
    "cls": "loss_cls",
    "box": "loss_bbox",
    "centerness": "loss_centerness",
    "dfl": "loss_dfl",
    "init": "loss_pts_init",
    "refine": "loss_pts_refine",
}
"""{our short name: mmdet's} of the losses of all heads."""
_RPN_LOSSES = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_box": "loss_rpn_bbox"}
_DENSE_FEATURES: Mapping[type[DenseHead[Any]], tuple[str, ...]] = {
    RetinaHead: ("retina_cls", "retina_reg"),
    FCOSHead: ("fcos_cls", "fcos_reg"),
    GFLHead: ("gfl_cls", "gfl_reg"),
    RepPointsHead: ("rp_cls", "rp_reg", "rp_pts_init_conv", "rp_cls_conv", "rp_pts_refine_conv"),
}
"""Names of a dense head's features for distillation, in the order of its ``taps``."""


def loss_name(short: str) -> str:
    """Return mmdet's name of a head's loss, of a cascade's stage with the stage in front, as in ``s0.loss_cls``."""
    stage, _, loss = short.rpartition("_")
    return f"{stage}.{_LOSSES[loss]}" if stage else _LOSSES[loss]


def student_losses(ours: Sequence[str], suffix: str) -> dict[str, str]:
    """Return {our name: the official one} of a student's own losses.

    ``suffix`` is that of a dense student's, ``_rpn`` where its head proposes RoIs or has assistants beside it.
    """
    return {
        name: _RPN_LOSSES[name]
        if name in _RPN_LOSSES
        else loss_name(name.removeprefix("loss_roi_"))
        if name.startswith("loss_roi_")
        else loss_name(name.removeprefix("loss_")) + suffix
        for name in ours
    }


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
