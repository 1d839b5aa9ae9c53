"""Boxes: (x1, y1, x2, y2) float32 in pixels of the network input, x2 and y2 exclusive; their deltas (dx, dy, dw, dh); and
their distances (left, top, right, bottom) from a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headkd_ray.job import Stds

MAX_LOG_RATIO = math.log(1000 / 16)
"""Largest |log| by which a decoded side may differ from its reference's (Detectron's constant, also mmdet's)."""

UNIT_STDS = (1.0, 1.0, 1.0, 1.0)
"""Delta scale of dense heads."""


def area(boxes: Tensor) -> Tensor:
    """Areas (...) of ``boxes`` (..., 4), in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (..., N, M) of every box in ``a`` (..., N, 4) with every box in ``b`` (..., M, 4); leading dimensions broadcast.

    Coordinate by coordinate, so that the largest temporary is (..., N, M) and not (..., N, M, 2).
    """
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    overlap = width.mul_(height)
    union = (area(a) + area(b)).sub_(overlap).clamp_(min=1e-6)
    return overlap.div_(union)


def encode(boxes: Tensor, reference: Tensor, stds: Stds = UNIT_STDS) -> Tensor:
    """Deltas (..., 4) that turn ``reference`` (..., 4) into ``boxes`` (..., 4); both must have positive sides."""
    size, reference_size = boxes[..., 2:] - boxes[..., :2], reference[..., 2:] - reference[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:]) * 0.5 - (reference[..., :2] + reference[..., 2:]) * 0.5
    deltas = torch.cat([shift / reference_size, (size / reference_size).log()], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode(deltas: Tensor, reference: Tensor, stds: Stds = UNIT_STDS, clamp_shrink: bool = True) -> Tensor:
    """Boxes (..., 4) from ``deltas`` (..., 4) on ``reference`` (..., 4, broadcast); the inverse of :func:`encode`.

    Growth of a side is limited to 1000/16; with ``clamp_shrink`` (mmdet, not torchvision) shrinking to 16/1000 as well.
    """
    deltas = deltas * deltas.new_tensor(stds)
    size = reference[..., 2:] - reference[..., :2]
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5 + deltas[..., :2] * size
    log_ratio = deltas[..., 2:].clamp(min=-MAX_LOG_RATIO if clamp_shrink else None, max=MAX_LOG_RATIO)
    half = size * log_ratio.exp() * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def encode_distances(boxes: Tensor, reference: Tensor) -> Tensor:
    """Distances (..., 4) from the centre of the square ``reference`` (..., 4) to the left, top, right and bottom side of
    ``boxes`` (..., 4), in units of the square's side; negative where the centre lies outside."""
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5
    side = reference[..., 2:3] - reference[..., :1]
    return torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], dim=-1) / side


def decode_distances(distances: Tensor, reference: Tensor) -> Tensor:
    """Boxes (..., 4) from ``distances`` (..., 4) at the squares ``reference`` (..., 4, broadcast); the inverse of
    :func:`encode_distances`."""
    centre = (reference[..., :2] + reference[..., 2:]) * 0.5
    distances = distances * (reference[..., 2:3] - reference[..., :1])
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1)


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union, (...) each, of every box in ``a`` (..., 4) with its partner in ``b`` (..., 4); differentiable."""
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)
    overlap = width * height
    union = (area(a) + area(b) - overlap).clamp(min=1e-7)
    return overlap / union, union


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (...) of each box in ``a`` (..., 4) with its partner in ``b`` (..., 4): -1 to 1, and differentiable.

    Not torchvision's ``generalized_box_iou_loss``: it assigns through a mask, for which a GPU has to wait.
    """
    iou, union = paired_iou(a, b)
    hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1)
    hull_area = area(hull).clamp(min=1e-7)
    return iou - (hull_area - union) / hull_area


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """``boxes`` (B, N, 4) cut to their images; ``sizes`` (B, 2) holds (h, w)."""
    limit = sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes)
    return torch.minimum(boxes.clamp(min=0), limit)


def exceeds(boxes: Tensor, min_size: float | None) -> Tensor:
    """Mask (...) of the ``boxes`` (..., 4) whose width and height are both above ``min_size`` pixels; None = all."""
    if min_size is None:
        return boxes.new_ones(boxes.shape[:-1], dtype=torch.bool)
    return ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)
