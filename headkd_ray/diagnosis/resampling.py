"""Average precision on resampled images, for confidence intervals by the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headkd_ray.diagnosis.overlaps import Flags, Floats, Ints, Overlaps, matched

IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""COCO's IoU thresholds."""
RECALLS = np.linspace(0, 1, 101)
CELLS = 2**23
"""Pairs of a resample and a detection that are counted at a time, which bounds the memory."""


@dataclass(frozen=True)
class _Class:
    """The detections of a class, best first, and its objects."""

    image: Ints
    """(D,) index of the image of each detection."""
    right: Flags
    """(T, D) whether it finds an object, for each IoU threshold."""
    counted: Flags
    """(T, D) whether it counts: it does not if it matches a crowd."""
    objects: Ints
    """(images,) objects in each image, without crowds."""

    def ap(self, weights: Ints) -> Floats:
        """Return AP (B, T) at each IoU threshold, for each row of ``weights`` (B, images); NaN where there is no object."""
        rows = max(1, CELLS // max(1, len(self.image)))
        return np.concatenate([self._ap(weights[start : start + rows]) for start in range(0, len(weights), rows)])

    def _ap(self, weights: Ints) -> Floats:
        objects = weights @ self.objects
        values = np.full((len(weights), len(IOUS)), np.nan)
        each = weights[:, self.image]
        so_far = np.cumsum(each, axis=1)
        for column, (right, counted) in enumerate(zip(self.right, self.counted, strict=True)):
            found, left_out = np.flatnonzero(right), np.flatnonzero(~counted)
            hits = np.cumsum(each[:, found], axis=1)
            seen = so_far[:, found]  # precision is best right after a hit
            if len(left_out):
                before = np.cumsum(np.pad(each[:, left_out], ((0, 0), (1, 0))), axis=1)
                seen -= before[:, np.searchsorted(left_out, found)]
            precision = np.divide(hits, seen, out=np.zeros(hits.shape), where=seen > 0)
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for row in np.flatnonzero(objects):
                at = np.searchsorted(hits[row] / objects[row], RECALLS, side="left")
                values[row, column] = np.append(envelope[row], 0.0)[at].mean()
        return values


class ResampledAP:
    """COCO's AP of a detector on any multiset of the images, from matches that are made once."""

    def __init__(self, pairs: Overlaps) -> None:
        self.images = len(pairs.image_ids)
        matches = [matched(pairs, iou) for iou in IOUS]
        self.classes = [
            _Class(
                pairs.found.image[mine],
                np.stack([objects[mine] >= 0 for objects, _ in matches]) & ~np.stack([out[mine] for _, out in matches]),
                ~np.stack([ignored[mine] for _, ignored in matches]),
                np.bincount(pairs.objects.image[(pairs.objects.label == label) & ~pairs.crowd], minlength=self.images),
            )
            for label in range(len(pairs.classes))
            for mine in [np.flatnonzero(pairs.found.label == label)]
        ]

    def __call__(self, weights: Ints) -> Floats:
        """Return AP in percent for each row of ``weights``, int64 (B, images): how often each image counts."""
        values = np.stack([each.ap(weights).mean(axis=1) for each in self.classes])
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(axis=0)
        return 100 * np.divide(total, known.sum(axis=0), out=np.full(len(weights), np.nan), where=known.any(axis=0))


def resamples(images: int, count: int, seed: int = 0) -> Ints:
    """Return ``count`` random multisets of ``images`` images each, as weights: int64 (count, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=count).astype(np.int64)


def interval(differences: Floats, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of a mean paired difference, over seeds and images at once.

    Args:
        differences: (seeds, B) difference of two detectors' AP, trained with each seed, on each resample of the images.
    """
    seeds, count = differences.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=(count, seeds))
    means = differences[chosen, np.arange(count)[:, None]].mean(axis=1)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
