"""Non-maximum suppression with outputs of fixed shapes: a mask of survivors instead of a list of unknown length."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

REJECTED = -1.0
"""Score of rows that take no part. Those that do have scores of at least 0."""


@torch.library.custom_op("headkd_ray::survivors", mutates_args=())
def survivors(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Return the mask (G, C, N) bool of the rows that survive NMS within their group and class.

    Args:
        boxes: (G, N, 4) float32, xyxy.
        scores: (G, C, N) float32, REJECTED where a row takes no part in the class.
        iou: IoU above which a row of a lower score is dropped.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for group in range(scores.shape[0]):
        for number, row in enumerate(scores[group]):
            (members,) = (row >= 0).nonzero(as_tuple=True)
            mask[group, number, members[nms(boxes[group, members], row[members], iou)]] = True
    return mask


@survivors.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
