"""Precision and recall of each class against the score threshold, and the threshold that balances them best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headkd_ray.diagnosis.overlaps import Floats, Matches, Overlaps, matched


@dataclass(frozen=True)
class Curve:
    """One class at IoU 0.5: what keeping only detections of at least a score gives, for every score that occurs."""

    name: str
    objects: int
    """Objects of the class, without crowds."""
    score: Floats
    """(N,) thresholds, descending."""
    precision: Floats
    """(N,) share of the detections kept that are right."""
    recall: Floats
    """(N,) share of the objects that are found; NaN if there are none."""

    @property
    def f1(self) -> Floats:
        """(N,) harmonic mean of precision and recall; 0 if both are 0."""
        total = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)

    @property
    def best(self) -> int | None:
        """Index of the threshold with the highest F1, and of these the highest threshold; None if nothing right is found.

        A threshold keeps all detections of its score, of which half precision gives many the same, so that only the last of
        them counts.
        """
        if not self.objects or not len(self.score) or not self.f1.max() > 0:
            return None
        return int(np.argmax(np.where(np.append(self.score[1:] < self.score[:-1], True), self.f1, 0.0)))

    @property
    def threshold(self) -> float | None:
        """The score with the highest F1; None if nothing right is found."""
        return None if self.best is None else float(self.score[self.best])

    @property
    def ap50(self) -> float:
        """Average precision as COCO computes it, in [0, 1]: the mean over 101 recalls of the best precision there; NaN without
        objects."""
        if not self.objects:
            return float("nan")
        envelope = np.maximum.accumulate(self.precision[::-1])[::-1]
        at = np.searchsorted(self.recall, np.linspace(0, 1, 101), side="left")
        return float(np.append(envelope, 0.0)[np.minimum(at, len(envelope))].mean())


def curves(pairs: Overlaps, matches: Matches | None = None) -> list[Curve]:
    """Return the curve of each class. Detections that cover only a crowd do not count.

    Args:
        matches: what ``matched`` returns; None = at IoU 0.5.
    """
    objects, ignored = matched(pairs) if matches is None else matches
    return [
        curve(name, int((counted & (pairs.objects.label == label)).sum()), pairs.score[mine], objects[mine] >= 0)
        for counted in [~pairs.crowd]
        for label, name in enumerate(pairs.classes)
        for mine in [np.flatnonzero((pairs.found.label == label) & ~ignored)]
    ]


def curve(name: str, objects: int, score: Floats, right: np.ndarray) -> Curve:
    """Return the curve of detections, given best first, of which ``right`` (N,) says which are right."""
    hits = np.cumsum(right, dtype=np.float64)
    recall = hits / objects if objects else np.full(len(hits), np.nan)
    return Curve(name, objects, score, hits / np.arange(1, len(hits) + 1), recall)
