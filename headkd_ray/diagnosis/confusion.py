"""The confusion matrix: which class is found where there is an object of which class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headkd_ray.diagnosis.overlaps import Ints, Overlaps


def confusion(pairs: Overlaps, thresholds: Sequence[float | None], iou: float = 0.5) -> Ints:
    """Count pairs of an object and a detection that overlap, whatever their classes.

    Only detections at or above their class's threshold count. The pairs with the highest IoU are taken first, and each object
    and each detection once. Detections that only cover a crowd of their class do not count.

    Args:
        thresholds: score threshold of each class; None = no detection of this class counts.
    Returns:
        int64 (C + 1, C + 1): rows are true classes, columns those found, in the order of ``pairs.classes``. The last row is
        background taken for an object, the last column objects that are not found.
    """
    classes = len(pairs.classes)
    limits = np.array([np.inf if each is None else each for each in thresholds], dtype=np.float64)
    kept = pairs.score >= limits[pairs.found.label]
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    found, objects = np.zeros(len(pairs.found), dtype=bool), np.zeros(len(pairs.objects), dtype=bool)
    crowd = pairs.crowd[pairs.pair_object]
    chosen = np.flatnonzero(kept[pairs.pair_found] & (pairs.iou >= iou) & ~crowd)
    for pair in chosen[np.argsort(-pairs.iou[chosen], kind="stable")].tolist():
        one, other = pairs.pair_found[pair], pairs.pair_object[pair]
        if not found[one] and not objects[other]:
            found[one] = objects[other] = True
            matrix[pairs.objects.label[other], pairs.found.label[one]] += 1
    covering = np.flatnonzero(crowd & pairs.same_label & (pairs.iou >= iou))
    found[pairs.pair_found[covering]] = True
    matrix[-1, :-1] = np.bincount(pairs.found.label[kept & ~found], minlength=classes)
    matrix[:-1, -1] = np.bincount(pairs.objects.label[~objects & ~pairs.crowd], minlength=classes)
    return matrix
