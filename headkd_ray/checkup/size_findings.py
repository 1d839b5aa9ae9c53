"""Whether the boxes are large enough for the job's views, and whether its anchors reach them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from headkd_ray.checkup.findings import Finding, Level, gravest, skipped
from headkd_ray.checkup.subject import Subject
from headkd_ray.detectors.dense import STRIDES as DENSE_STRIDES
from headkd_ray.detectors.ops.anchors import PAD, Anchors
from headkd_ray.detectors.rpn import STRIDES as RPN_STRIDES
from headkd_ray.job import AnchorSpec, Job
from headkd_ray.profiling.step_trial import view_scales
from headkd_ray.text import rounded

GONE, BLURRED, SMALL = 2, 4, 8
"""Pixels of the view: below the first nothing of an object is left, below the last it is less than a cell of stride 8."""
MANY = {GONE: 0.02, BLURRED: 0.1, SMALL: 0.4}
"""Share of boxes below each from which they are called out."""
REACHED = 50_000
"""Most boxes that are compared with the anchors."""
MANY_UNREACHED = 0.1
"""Share of boxes without an anchor from which they are called out."""


def check_vanishing(subject: Subject) -> Finding:
    """Count boxes that are too small after the view's resize."""
    told, levels, figures, larger = [], list[Level](), dict[str, Any](), 1.0
    for name in subject.splits:
        found, view = subject.statistics(name), subject.view(name)
        counts = {side: found.below(side) for side in MANY}
        shares = {side: count / max(1, found.boxes) for side, count in counts.items()}
        over = [side for side, most in MANY.items() if shares[side] >= most and counts[side]]
        levels.append("red" if shares[GONE] >= 5 * MANY[GONE] else "yellow" if over else "green")
        if over:
            larger = max(larger, *(found.enlargement(side, MANY[side]) for side in over))
        below = ", ".join(f"{rounded(100 * each)} % below {side} px" for side, each in shares.items())
        told.append(f"{name} at {view.short_side} px: {below}")
        figures[name] = {"short_side": view.short_side, "below_px": {str(side): count for side, count in counts.items()}}
    level = gravest(levels)
    data = subject.job.data
    mend = (
        f"Make the views about {larger:.1f} times as large (data.short_side, now {list(data.short_side)}, data.eval_short_side "
        f"and data.long_side, now {data.long_side}), as far as the photos have the pixels; or cut large photos into tiles."
    )
    return Finding("vanishing boxes", level, f"shorter side in {'; '.join(told)}", None if level == "green" else mend, figures)


class AnchorRules(NamedTuple):
    """The anchors that a student's head or RPN learns with."""

    key: str
    """Job key of the section."""
    spec: AnchorSpec
    strides: tuple[int, ...]
    least_iou: float
    """IoU below which an anchor is background."""


def anchor_rules(job: Job) -> AnchorRules | None:
    """Return the anchors of the job's student; None if it has none, or chooses its positives in another way."""
    for name, strides in (("head", DENSE_STRIDES), ("rpn", RPN_STRIDES)):
        section = getattr(job.student, name, None)
        spec, least = getattr(section, "anchors", None), getattr(section, "negative_iou", None)
        if isinstance(spec, AnchorSpec) and least is not None:
            return AnchorRules(f"student.{name}.anchors", spec, strides, least)
    return None


def check_anchors(subject: Subject) -> Finding:
    """Count boxes that no anchor reaches at the middle training size, positions included."""
    rules = anchor_rules(subject.job)
    if rules is None:
        return skipped("anchors", f"a {subject.job.student.kind} student has no anchors that are matched by IoU")
    best = _best_ious(subject, rules)
    missed = int((best < rules.least_iou).sum())
    portion = missed / max(1, len(best))
    level: Level = "yellow" if portion >= MANY_UNREACHED else "green"
    figures = {"boxes": len(best), "missed": missed, "least_iou": rules.least_iou}
    found = f"{rounded(100 * portion)} % of {len(best):,} boxes of train have no anchor with an IoU of {rules.least_iou:g}"
    mend = (
        f"Fit {rules.key}: base_scale, octave_scales and ratios (--html shows the boxes' sides and aspects); or "
        "make the views larger, if the boxes are too small."
    )
    return Finding("anchors", level, found, mend if level != "green" else None, figures)


def _best_ious(subject: Subject, rules: AnchorRules) -> torch.Tensor:
    """Return for the first boxes of train the IoU with the anchor that overlaps each most, float32 (n,)."""
    shards, view, anchors = subject.split("train"), subject.view("train"), Anchors(rules.spec, rules.strides)
    scales, best, left = view_scales(shards.index, view), [torch.zeros(0)], REACHED
    for found in shards.annotations():
        rows = found.rows[:left]
        boxes = torch.from_numpy(found.boxes[:left] * scales[rows, None]).float()
        sides = np.stack([shards.index.width[rows], shards.index.height[rows]], axis=1) * scales[rows, None]
        best.append(best_ious(anchors, boxes, torch.from_numpy(sides).float()))
        left -= len(boxes)
        if left <= 0:
            break
    return torch.cat(best)


def best_ious(anchors: Anchors, boxes: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Return the IoU of each of ``boxes`` (n, 4) with the anchor that overlaps it most, float32 (n,).

    Of the anchors of one shape it is the one whose centre is nearest. ``sides`` (n, 2) are width and height of the box's view.
    """
    centre, best = (boxes[:, :2] + boxes[:, 2:]) / 2, torch.zeros(len(boxes))
    for stride in anchors.strides:
        last = (torch.ceil(sides / PAD) * PAD / stride).ceil() - 1
        corner = torch.minimum((centre / stride).round().clamp(min=0), last) * stride
        for anchor in anchors.base(stride):
            best = torch.maximum(best, _iou(boxes, corner.repeat(1, 2) + anchor))
    return best


def _iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the IoU of boxes (n, 4) with others (n, 4), pair by pair."""
    size = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    common = size.prod(1)
    areas = (one[:, 2:] - one[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1)
    return common / (areas - common).clamp(min=1e-6)
