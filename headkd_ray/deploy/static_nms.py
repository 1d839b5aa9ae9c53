"""Non-maximum suppression with outputs of fixed shapes: a mask of survivors instead of a list of unknown length.

:func:`survivors` becomes ONNX's operator; :func:`survivors_by_torchvision` is torchvision's, so that a graph with it needs
nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import nms

Suppress = Callable[[Tensor, Tensor, float], Tensor]
"""A function with the arguments and the result of :func:`survivors`."""

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


def survivors_by_torchvision(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Compute :func:`survivors` of ``boxes`` with finite coordinates of at least 0, in one call of torchvision's NMS.

    Each group and class gets a place of its own in the plane, in float64, so that boxes keep their overlaps to the last bit.
    """
    rows = scores.shape[2]
    own = boxes.unsqueeze(1).expand(-1, scores.shape[1], -1, -1).reshape(-1, 4).double()
    members = (scores.flatten() >= 0).nonzero().squeeze(1)
    place = (members // rows).unsqueeze(1) * (own.amax() + 1)
    kept = nms(own[members] + place, scores.flatten()[members].double(), iou)
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    return mask.index_fill(0, members[kept], True).reshape(scores.shape)
