"""Operations on boxes, their deltas (dx, dy, dw, dh), and their distances (left, top, right, bottom) from a point.

A box is (x1, y1, x2, y2) float32 in pixels of the network input, x2 and y2 exclusive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headkd_ray.detectors.ops.fixed_size import constant
from headkd_ray.job import Stds

MAX_LOG_RATIO = math.log(1000 / 16)
"""Largest |log| of the ratio between a decoded side and its reference's (the constant of Detectron and mmdet)."""

UNIT_STDS = (1.0, 1.0, 1.0, 1.0)
"""Standard deviations of deltas in dense heads, which do not scale them."""


def area(boxes: Tensor) -> Tensor:
    """Return the areas (...) of ``boxes`` (..., 4) in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (..., N, M) of every box in ``a`` (..., N, 4) with every box in ``b`` (..., M, 4).

    Leading dimensions broadcast. Coordinates are handled one by one, so that no temporary is larger than (..., N, M).
    """
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    overlap = width.mul_(height)
    union = (area(a) + area(b)).sub_(overlap).clamp_(min=1e-6)
    return overlap.div_(union)


def encode(boxes: Tensor, reference: Tensor, stds: Stds = UNIT_STDS) -> Tensor:
    """Return the deltas (..., 4) that turn ``reference`` (..., 4) into ``boxes`` (..., 4); all sides must be positive."""
    size, reference_size = boxes[..., 2:] - boxes[..., :2], reference[..., 2:] - reference[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:]) * 0.5 - (reference[..., :2] + reference[..., 2:]) * 0.5
    deltas = torch.cat([shift / reference_size, (size / reference_size).log()], dim=-1)
    return deltas if tuple(stds) == UNIT_STDS else deltas / constant(stds, deltas)


def decode(deltas: Tensor, reference: Tensor, stds: Stds = UNIT_STDS, clamp_shrink: bool = True) -> Tensor:
    """Apply ``deltas`` (..., 4) to ``reference`` (..., 4, broadcast), the inverse of :func:`encode`; return boxes (..., 4).

    A side grows at most by a factor of 1000/16; with ``clamp_shrink`` (mmdet, not torchvision) it also shrinks at most by it.
    """
    if tuple(stds) != UNIT_STDS:
        deltas = deltas * constant(stds, deltas)
    size = reference[..., 2:] - reference[..., :2]
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5 + deltas[..., :2] * size
    log_ratio = deltas[..., 2:].clamp(min=-MAX_LOG_RATIO if clamp_shrink else None, max=MAX_LOG_RATIO)
    half = size * log_ratio.exp() * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def encode_distances(boxes: Tensor, reference: Tensor) -> Tensor:
    """Return the distances (..., 4) from the centres of squares ``reference`` (..., 4) to the sides of ``boxes`` (..., 4).

    The order is left, top, right, bottom; the unit is the square's side. Distances are negative where the centre lies outside.
    """
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5
    side = reference[..., 2:3] - reference[..., :1]
    return torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], dim=-1) / side


def decode_distances(distances: Tensor, reference: Tensor) -> Tensor:
    """Turn ``distances`` (..., 4) at the squares ``reference`` (..., 4, broadcast) into boxes (..., 4).

    This is the inverse of :func:`encode_distances`.
    """
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5
    distances = distances * (reference[..., 2:3] - reference[..., :1])
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1)


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and union, (...) each, of each box in ``a`` (..., 4) with its partner in ``b`` (..., 4); differentiable."""
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)
    overlap = width * height
    union = (area(a) + area(b) - overlap).clamp(min=1e-7)
    return overlap / union, union


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU (...) of each box in ``a`` (..., 4) with its partner in ``b`` (..., 4).

    It lies between -1 and 1 and is differentiable. torchvision's ``generalized_box_iou_loss`` is not used because it assigns
    through a mask, for which a GPU has to synchronise.
    """
    iou, union = paired_iou(a, b)
    hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1)
    hull_area = area(hull).clamp(min=1e-7)
    return iou - (hull_area - union) / hull_area


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip ``boxes`` (B, N, 4) to their images, whose (h, w) are ``sizes`` (B, 2)."""
    limit = sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes)
    return torch.minimum(boxes.clamp(min=0), limit)


def exceeds(boxes: Tensor, min_size: float | None) -> Tensor:
    """Return the mask (...) of the ``boxes`` (..., 4) whose width and height exceed ``min_size`` pixels; None = all."""
    if min_size is None:
        return boxes.new_ones(boxes.shape[:-1], dtype=torch.bool)
    return ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)
