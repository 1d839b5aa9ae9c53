"""Matching of rows whose order may differ: proposals and RoIs by their cells, detections by class, box and score."""

from __future__ import annotations

import torch
from torch import Tensor

from headkd_ray.golden.proposed import Proposed
from headkd_ray.golden.tolerances import VALUES, Row, compare, explained, failure, merge


def positions(rows: Tensor, of: Tensor) -> Tensor | None:
    """Find each row of ``of`` (N, K) in ``rows`` (M, K): (N,) int64 index, -1 = absent. None if rows repeat."""
    where = {tuple(row): i for i, row in enumerate(rows.tolist())}
    wanted = [tuple(row) for row in of.tolist()]
    if len(where) < len(rows) or len(set(wanted)) < len(wanted):
        return None
    return torch.tensor([where.get(row, -1) for row in wanted], dtype=torch.int64)


def nearest_rows(rows: Tensor, of: Tensor) -> Tensor | None:
    """Find the nearest row of ``rows`` (M, K) for each of ``of`` (N, K), each taken once: (N,) int64. None if N > M."""
    if len(of) > len(rows):
        return None
    distance = torch.cdist(of.double(), rows.double(), p=torch.inf)
    found = distance.argmin(1) if len(of) else torch.zeros(0, dtype=torch.int64)
    if len(found.unique()) == len(found):
        return found
    found = torch.zeros(len(of), dtype=torch.int64)
    for i in range(len(of)):  # equal boxes
        found[i] = distance[i].argmin()
        distance[:, found[i]] = torch.inf
    return found


def compare_proposals(name: str, run: Proposed, image: int, golden: Tensor) -> Row:
    """Compare the proposals of one image with ``golden`` (n, 9) x1 y1 x2 y2 score level y x anchor, matched by cell.

    An RPN's may be (n, 5), without cells; these are matched by box and score. Rows that only one side has must be explained by
    a near-tie, and a golden one must still equal what our anchor predicts.
    """
    if golden.shape[1] == 5:
        return _compare_without_cells(name, run, image, golden)
    if golden.shape[1] != 9:
        return failure(name, f"{golden.shape[1]} columns, not x1 y1 x2 y2 score level y x anchor")
    real = run.proposals.valid[image]
    ours = (run.proposals.boxes[image][real], run.proposals.scores[image][real], run.proposals.cells[image][real])
    theirs = (golden[:, :4], golden[:, 4], golden[:, 5:].long())
    found, said = positions(ours[2], theirs[2]), run.at(image, theirs[2])
    if found is None or said is None:
        return failure(name, "a cell occurs twice" if found is None else "a cell outside the pyramid")
    hit = found >= 0
    compared = [compare(name, said[k], theirs[k]) for k in (0, 1)]
    compared += [compare(name, ours[k][found[hit]], theirs[k][hit]) for k in (0, 1)]
    extra = torch.ones(len(ours[0]), dtype=torch.bool)
    extra[found[hit]] = False
    if hit.all() and not extra.any():
        return merge(name, compared)
    cuts: list[tuple[int | None, float]] = [*run.cuts(image)]
    if min(len(ours[1]), len(golden)) >= run.rules.post_nms:
        cuts.append((None, float(ours[1].min())))
    boxes, scores, cells = (torch.cat([t, o[extra]]) for t, o in zip(theirs, ours, strict=True))
    lost = torch.cat([~hit, extra[extra]])
    known = explained(boxes, scores, cells[:, 0], lost, run.rules.nms_iou, cuts, either=True)
    if bool((lost & ~known).any()):
        note = f"{int((~hit).sum())} golden cells not proposed, {int(extra.sum())} others proposed"
        return merge(name, [*compared, failure(name, note)])
    return merge(name, compared, [f"{int(lost.sum())} rows differ by a near-tie in NMS or score"])


def _compare_without_cells(name: str, run: Proposed, image: int, golden: Tensor) -> Row:
    real = run.proposals.valid[image]
    boxes, scores = run.proposals.boxes[image][real], run.proposals.scores[image][real]
    labels = torch.zeros(len(scores), dtype=torch.int64)
    wanted = torch.cat([golden, torch.zeros(len(golden), 1, dtype=golden.dtype)], dim=1)
    threshold = max((score for _, score in run.cuts(image)), default=0.0)
    return compare_detections(name, (boxes, scores, labels), wanted, run.rules.nms_iou, threshold, run.rules.post_nms)


def compare_detections(
    name: str, ours: tuple[Tensor, Tensor, Tensor], golden: Tensor, iou: float, threshold: float, limit: int
) -> Row:
    """Compare the detections of one image with ``golden`` (M, 6) x1 y1 x2 y2 score label.

    ``ours`` are boxes (N, 4), scores (N,) and labels (N,).
    """
    boxes, scores, labels = ours[0].double(), ours[1].double(), ours[2]
    golden = golden.double()
    wanted_boxes, wanted_scores, wanted_labels = golden[:, :4], golden[:, 4], golden[:, 5].long()
    scale = max(float(wanted_boxes.abs().max()) if len(golden) else 1.0, 1.0)
    # The larger of the errors of box (relative) and score; a detection of another class is infinitely far away.
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
