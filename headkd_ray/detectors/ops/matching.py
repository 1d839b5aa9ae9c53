"""Batched assignment of ground-truth boxes to anchors and RoIs (mmdet's MaxIoUAssigner, ATSS) and points (FCOS, RepPoints)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.boxes import area, pairwise_iou

NEGATIVE = -1
IGNORED = -2


@torch.no_grad()
def match(
    boxes: Tensor,
    truth: GroundTruth,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Assign ground-truth boxes to ``boxes`` (N, 4) or (B, N, 4) by IoU: (B, N) int64 index, NEGATIVE or IGNORED.

    A box is negative if its best IoU is below ``negative_iou``, assigned to its best ground-truth box from ``positive_iou``
    on, else ignored. With ``low_quality_iou`` every ground-truth box also claims all boxes that attain its own best IoU, if
    that is at least this value; where several claim one box the last wins (mmdet). Boxes that are not ``valid`` (B, N) take no
    part and are IGNORED, and so is what :func:`settled` says.
    """
    iou = pairwise_iou(boxes, truth.boxes)
    takes_part = truth.present.unsqueeze(1)
    if valid is not None:
        takes_part = takes_part & valid.unsqueeze(2)
    iou = iou.masked_fill_(~takes_part, -1.0)

    best, index = iou.max(dim=2)
    matched = torch.where(best >= positive_iou, index, IGNORED)
    matched = torch.where(best < negative_iou, NEGATIVE, matched)
    if low_quality_iou is not None:
        claim = iou.amax(dim=1, keepdim=True)
        claims = (iou == claim) & (claim >= low_quality_iou) & takes_part & truth.counted.unsqueeze(1)
        order = torch.arange(1, iou.shape[2] + 1, device=iou.device)
        last = (claims * order).amax(dim=2) - 1
        matched = torch.where(last >= 0, last, matched)
    return settled(matched if valid is None else matched.masked_fill(~valid, IGNORED), truth)


@torch.no_grad()
def match_points(reference: Tensor, truth: GroundTruth, low: Tensor, high: Tensor, radius: float | None) -> Tensor:
    """Assign ground-truth boxes to points as mmdet's FCOS does: (B, N) int64 index, NEGATIVE or IGNORED.

    Points are the centres of the squares ``reference`` (N, 4), whose side is the stride of their level. A point gets the
    smallest of the boxes that contain it, whose farthest side is ``low`` to ``high`` (N,) pixels away, and, with a ``radius``,
    whose centre is less than that many strides away along both axes.
    """
    point = ((reference[:, :2] + reference[:, 2:]) * 0.5).unsqueeze(-1)
    x, y = point[:, 0], point[:, 1]
    x1, y1, x2, y2 = truth.boxes.unsqueeze(1).unbind(-1)
    farthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
    eligible = (farthest >= low.unsqueeze(-1)) & (farthest <= high.unsqueeze(-1)) & truth.present.unsqueeze(1)
    eligible &= (x > x1) & (x < x2) & (y > y1) & (y < y2)
    if radius is not None:
        reach = (reference[:, 2:3] - reference[:, :1]) * radius
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
        eligible &= (x > centre_x - reach) & (x < centre_x + reach) & (y > centre_y - reach) & (y < centre_y + reach)
    smallest, index = torch.where(eligible, area(truth.boxes).unsqueeze(1), torch.inf).min(dim=2)
    return settled(index.masked_fill(smallest.isinf(), NEGATIVE), truth)


@torch.no_grad()
def match_nearest(reference: Tensor, truth: GroundTruth, base_scale: float, valid: Tensor) -> Tensor:
    """Assign each ground-truth box to one point, as mmdet's PointAssigner does: (B, N) int64 index per point, NEGATIVE or
    IGNORED.

    Points are the centres of the squares ``reference`` (N, 4), whose side is the stride of their level, a power of 2. A box
    belongs to the level whose stride is the power of 2 at or below sqrt(w * h) / ``base_scale``, clamped to the given levels.
    It claims the ``valid`` (B, N) point there that is nearest to its centre, in units of its width and height, the first of
    equals; where several claim one point the nearest wins, again the first of equals, and the others get none.
    """
    centre = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
    size = (truth.boxes[..., 2:] - truth.boxes[..., :2]).clamp(min=1e-6)
    x, y = ((reference[:, :2] + reference[:, 2:]) * 0.5).unsqueeze(-1).unbind(1)
    level = (reference[:, 2] - reference[:, 0]).log2().round()
    level_of_truth = (size / base_scale).log2().mean(-1).trunc().clamp(level.min(), level.max())
    eligible = (level.unsqueeze(-1) == level_of_truth.unsqueeze(1)) & truth.present.unsqueeze(1) & valid.unsqueeze(-1)

    (centre_x, centre_y), (width, height) = centre.unsqueeze(1).unbind(-1), size.unsqueeze(1).unbind(-1)
    apart = torch.hypot((x - centre_x) / width, (y - centre_y) / height).masked_fill_(~eligible, torch.inf)
    claimed = apart.argmin(dim=1)
    claims = (claimed.unsqueeze(1) == torch.arange(len(reference), device=apart.device).unsqueeze(-1)) & eligible
    nearest, index = apart.masked_fill_(~claims, torch.inf).min(dim=2)
    return settled(index.masked_fill(nearest.isinf(), NEGATIVE), truth)


@torch.no_grad()
def match_adaptive(boxes: Tensor, counts: Sequence[int], truth: GroundTruth, topk: int, valid: Tensor) -> Tensor:
    """Assign ground-truth boxes to anchors by ATSS, as in mmdet: (B, N) int64 index, NEGATIVE or IGNORED.

    ``boxes`` (N, 4) are the anchors, ``counts`` the number on each level. Candidates for a ground-truth box are the ``topk``
    ``valid`` (B, N) anchors of each level whose centres are nearest to its own; it takes those whose centre lies inside it and
    whose IoU is at least the mean + standard deviation over its candidates. Of several boxes that take one anchor, that of the
    greatest IoU wins. Invalid anchors are IGNORED.
    """
    iou = pairwise_iou(boxes, truth.boxes)
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unsqueeze(-1).unbind(1)
    x1, y1, x2, y2 = truth.boxes.unsqueeze(1).unbind(-1)
    apart = torch.hypot(x - (x1 + x2) / 2, y - (y1 + y2) / 2).masked_fill_(~valid.unsqueeze(-1), torch.inf)
    places, first = [], 0
    for count in counts:
        level = apart[:, first : first + count]
        places.append(level.topk(min(topk, count), dim=1, largest=False).indices + first)
        first += count
    candidates = torch.cat(places, dim=1)  # (B, K, G)
    real = apart.gather(1, candidates).isfinite()
    overlaps = iou.gather(1, candidates)
    number = real.sum(1, keepdim=True)
    mean = (overlaps * real).sum(1, keepdim=True) / number
    deviation = ((overlaps - mean).square() * real).sum(1, keepdim=True) / (number - 1)
    inside = torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y)) > 0.01
    taken = real & (overlaps >= mean + deviation.sqrt()) & truth.present.unsqueeze(1) & inside.gather(1, candidates)
    chosen = torch.zeros_like(inside).scatter_(1, candidates, taken)
    best, index = iou.masked_fill_(~chosen, -1.0).max(dim=2)
    return settled(torch.where(best >= 0, index, NEGATIVE).masked_fill(~valid, IGNORED), truth)


def settled(matched: Tensor, truth: GroundTruth) -> Tensor:
    """Turn into IGNORED what nothing is known about in ``matched`` (B, N): rows that match a box of weight 0, and negatives of
    images whose background is unknown."""
    unknown = torch.where(matched >= 0, gather_rows(truth.weights, matched) == 0, ~truth.background.unsqueeze(1))
    return matched.masked_fill(unknown, IGNORED)


def row_weights(matched: Tensor, truth: GroundTruth) -> Tensor:
    """Return the loss weights (B, N) float32 of ``matched`` (B, N): that of the box, 1 for NEGATIVE and 0 for IGNORED."""
    return torch.where(matched >= 0, gather_rows(truth.weights, matched), (matched == NEGATIVE).float())


def at_least_one_each(chosen: Tensor, truth: GroundTruth) -> Tensor:
    """Return the sum over the images of max(1, number of ``chosen`` (B, N) rows), by which mmdet normalises losses.

    Images about which nothing is known do not count, so that they change no loss of the others.
    """
    return (chosen.sum(1).clamp(min=1) * truth.informative).sum().clamp(min=1)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Gather the rows (B, N, ...) of ``table`` (B, M, ...) at ``index`` (B, N) int64; negative indices read row 0."""
    index = index.clamp(min=0)
    shape = (*index.shape, *table.shape[2:])
    return table.gather(1, index.reshape(*index.shape, *[1] * (table.dim() - 2)).expand(shape))
