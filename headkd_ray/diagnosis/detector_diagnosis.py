"""Everything about a detector on a split, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headkd_ray.diagnosis.confusion import confusion
from headkd_ray.diagnosis.curves import Curve, curves
from headkd_ray.diagnosis.error_types import ErrorTypes, error_types
from headkd_ray.diagnosis.overlaps import Ints, Matches, Overlaps, matched


@dataclass(frozen=True)
class Diagnosis:
    """What a detector gets right and wrong on a split."""

    curves: tuple[Curve, ...]
    """Of each class, in the order of the ground truth's categories."""
    errors: ErrorTypes
    confusion: Ints
    """As ``confusion`` returns it, at each class's best threshold."""
    mistakes: Mapping[int, int]
    """Image id → objects missed and false detections at those thresholds, most first; images without any are left out."""

    @property
    def thresholds(self) -> dict[str, float | None]:
        """The score threshold of each class with the highest F1 at IoU 0.5, by name; None if nothing right is found."""
        return {each.name: each.threshold for each in self.curves}

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """Return the most frequent (true class, class found instead, count), without background."""
        counts = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
        names = [each.name for each in self.curves]
        return [(names[one], names[other], int(counts[one, other])) for one, other in pairs if counts[one, other]]


def diagnose(pairs: Overlaps) -> Diagnosis:
    """Analyse the overlaps of a detector's results with the ground truth."""
    matches = matched(pairs)
    found = tuple(curves(pairs, matches))
    thresholds = [each.threshold for each in found]
    errors = error_types(pairs, matches)
    return Diagnosis(found, errors, confusion(pairs, thresholds), _mistakes(pairs, matches, thresholds))


def _mistakes(pairs: Overlaps, matches: Matches, thresholds: Sequence[float | None]) -> dict[int, int]:
    limits = np.array([np.inf if each is None else each for each in thresholds])
    objects, ignored = matches
    kept = pairs.score >= limits[pairs.found.label]
    missed = ~pairs.crowd
    missed[objects[kept & (objects >= 0)]] = False
    false = kept & (objects < 0) & ~ignored
    images = np.concatenate([pairs.objects.image[missed], pairs.found.image[false]])
    counts = np.bincount(images, minlength=len(pairs.image_ids))
    order = np.argsort(-counts, kind="stable")
    return {pairs.image_ids[index]: int(counts[index]) for index in order.tolist() if counts[index]}
