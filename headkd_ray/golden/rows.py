"""Matching rows whose order may differ: proposals and RoIs by the cell they came from, detections by class, box and score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headkd_ray.golden.compare import VALUES, Row, compare, explained, failure, merge


def positions(rows: Tensor, of: Tensor) -> Tensor | None:
    """For each row of ``of`` (N, K) where it stands in ``rows`` (M, K), (N,) int64; -1 = nowhere. None if rows repeat."""
    where = {tuple(row): i for i, row in enumerate(rows.tolist())}
    wanted = [tuple(row) for row in of.tolist()]
    if len(where) < len(rows) or len(set(wanted)) < len(wanted):
        return None
    return torch.tensor([where.get(row, -1) for row in wanted], dtype=torch.int64)


def compare_proposals(
    name: str,
    ours: tuple[Tensor, Tensor, Tensor],
    golden: tuple[Tensor, Tensor, Tensor],
    iou: float,
    cuts: Sequence[tuple[int | None, float]],
) -> Row:
    """Proposals of one image, (boxes (N, 4), scores (N,), cells (N, 4)) each, matched by cell.

    ``cuts``: scores below which a level (or, None, the image) drops proposals.
    """
    found = positions(ours[2], golden[2])
    if found is None:
        return failure(name, "a cell occurs twice")
    hit = found >= 0
    compared = [
        compare(name, ours[0][found[hit]], golden[0][hit]),
        compare(name, ours[1][found[hit]], golden[1][hit]),
    ]
    extra = torch.ones(len(ours[0]), dtype=torch.bool)
    extra[found[hit]] = False
    if hit.all() and not extra.any():
        return merge(name, compared)
    boxes, scores = torch.cat([golden[0], ours[0][extra]]), torch.cat([golden[1], ours[1][extra]])
    groups = torch.cat([golden[2][:, 0], ours[2][extra][:, 0]])
    lost = torch.cat([~hit, extra[extra]])
    known = explained(boxes, scores, groups, lost, iou, cuts)
    if bool((lost & ~known).any()):
        missing, surplus = int((~hit).sum()), int(extra.sum())
        return merge(name, [*compared, failure(name, f"{missing} golden cells not proposed, {surplus} others proposed")])
    return merge(name, compared, [f"{int(lost.sum())} rows differ by a near-tie in NMS or score"])


def compare_detections(
    name: str, ours: tuple[Tensor, Tensor, Tensor], golden: Tensor, iou: float, threshold: float, limit: int
) -> Row:
    """Detections of one image: ours (boxes (N, 4), scores (N,), labels (N,)) with golden (M, 6) x1 y1 x2 y2 score label."""
    boxes, scores, labels = ours[0].double(), ours[1].double(), ours[2]
    golden = golden.double()
    wanted_boxes, wanted_scores, wanted_labels = golden[:, :4], golden[:, 4], golden[:, 5].long()
    scale = max(float(wanted_boxes.abs().max()) if len(golden) else 1.0, 1.0)
    # Distance in units of what is tolerated; another class is infinitely far.
    box_error = (wanted_boxes[:, None] - boxes[None]).abs().amax(-1) / scale
    distance = torch.maximum(box_error, (wanted_scores[:, None] - scores[None]).abs())
    distance = distance.masked_fill(wanted_labels[:, None] != labels[None], float("inf"))
    free = torch.ones(len(boxes), dtype=torch.bool)
    hit = torch.zeros(len(golden), dtype=torch.bool)
    worst = (0.0, 0.0)
    for i in range(len(golden)):
        left = distance[i].masked_fill(~free, float("inf"))
        if len(left) == 0 or float(left.min()) > VALUES:
            continue
        j = int(left.argmin())
        free[j], hit[i] = False, True
        worst = max(worst, (float(distance[i, j]), float((wanted_boxes[i] - boxes[j]).abs().max())))
    row = Row(name, worst[1], worst[0], VALUES, True)
    if hit.all() and not free.any():
        return row
    lost = torch.cat([~hit, free[free]])
    kept = (torch.cat([wanted_boxes, boxes[free]]), torch.cat([wanted_scores, scores[free]]))
    groups = torch.cat([wanted_labels, labels[free]])
    cuts: list[tuple[int | None, float]] = [(None, threshold)]
    if min(len(scores), len(golden)) >= limit:
        cuts.append((None, float(scores.min())))
    if bool((lost & ~explained(*kept, groups, lost, iou, cuts)).any()):
        note = f"{int((~hit).sum())} golden detections not found, {int(free.sum())} others found"
        return merge(name, [row, failure(name, note)])
    return merge(name, [row], [f"{int(lost.sum())} rows differ by a near-tie in NMS or score"])
