"""Comparison of values, and the check whether a near-tie in ordering or NMS explains rows that one side lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headkd_ray.detectors.ops.boxes import pairwise_iou

VALUES = 1e-4
"""Largest relative error of tensors and losses; a tensor's is relative to its largest magnitude."""
GRADIENTS = 1e-3
"""Largest relative error of a gradient norm."""
IOU_TIE = 1e-4
"""Two IoUs this close to the NMS threshold may fall on either side of it."""
SCORE_TIE = 1e-5
"""Two scores this close may sort either way."""


@dataclass(frozen=True)
class Row:
    """The result of comparing one quantity."""

    name: str
    absolute: float
    relative: float
    tolerance: float
    passed: bool
    note: str = ""


def failure(name: str, note: str) -> Row:
    """Return the row of a quantity that cannot be compared at all."""
    return Row(name, math.nan, math.nan, math.nan, False, note)


def compare(name: str, ours: Tensor, golden: Tensor, tolerance: float = VALUES, note: str = "") -> Row:
    """Compare two tensors by their largest difference, absolute and relative to the golden's largest magnitude."""
    if ours.shape != golden.shape:
        return failure(name, f"shape {tuple(ours.shape)}, golden {tuple(golden.shape)}")
    if golden.numel() == 0:
        return Row(name, 0.0, 0.0, tolerance, True, note or "empty")
    ours, golden = ours.detach().double(), golden.double()
    absolute = float((ours - golden).abs().max())
    relative = absolute / max(float(golden.abs().max()), 1e-12)
    return Row(name, absolute, relative, tolerance, relative <= tolerance, note)


def compare_number(name: str, ours: float, golden: float, tolerance: float, floor: float = 0.0, note: str = "") -> Row:
    """Compare two numbers; differences up to ``floor`` count as rounding around zero."""
    absolute = abs(ours - golden)
    relative = absolute / abs(golden) if golden else (0.0 if absolute <= floor else math.inf)
    return Row(name, absolute, relative, tolerance, relative <= tolerance or absolute <= floor, note)


def merge(name: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> Row:
    """Merge several rows into the worst of them, under one name."""
    worst = max(rows, key=lambda row: (not row.passed, row.relative if row.relative == row.relative else math.inf))
    texts = dict.fromkeys(note for note in (*notes, *(row.note for row in rows if not row.passed or row is worst)) if note)
    return Row(name, worst.absolute, worst.relative, worst.tolerance, all(row.passed for row in rows), "; ".join(texts))


def explained(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    lost: Tensor,
    iou: float,
    cuts: Sequence[tuple[int | None, float]],
    either: bool = False,
) -> Tensor:
    """Return which of the ``lost`` rows (N,) bool, those that only one side kept, a near-tie explains; (N,) bool.

    ``boxes`` (N, 4), ``scores`` and ``groups`` (N,) hold the rows of both sides together. A lost row is explained if its IoU
    with a box of its group that scores no lower is within IOU_TIE of the NMS threshold ``iou``, if its score is within
    SCORE_TIE of a cut (group or None = any, score) below which rows are dropped, or if another explained lost row of its
    group overlaps it, because what NMS does with one decides what it does with the next. With ``either`` it is also explained
    by a lost row that overlaps it and scores the same, since NMS may keep either; use that only for rows known to be two
    candidates, not one with a wrong box.
    """
    overlap = pairwise_iou(boxes.double(), boxes.double())
    same = (groups[:, None] == groups[None, :]) & ~torch.eye(len(groups), dtype=torch.bool)
    no_lower = scores[None, :] >= scores[:, None] - SCORE_TIE
    known = ((overlap - iou).abs() <= IOU_TIE).logical_and(same & no_lower).any(1)
    tied = (scores[None, :] - scores[:, None]).abs() <= SCORE_TIE
    if either:
        known |= (tied & same & (overlap > iou) & lost[None, :]).any(1)
    for group, cut in cuts:
        close = (scores - cut).abs() <= SCORE_TIE
        known |= close if group is None else close & (groups == group)
    known &= lost
    while True:
        chained = ((overlap > iou - IOU_TIE) & same & no_lower & known[None, :]).any(1) & lost
        if bool((chained & ~known).any()):
            known |= chained
        else:
            return known
