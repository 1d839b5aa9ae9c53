"""Count a split's boxes by class, size and oddity, shard by shard, so that the memory does not grow with the split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.sample import Annotations
from headkd_ray.data.shards import ShardSet

TINY = 3.0
"""Side in stored pixels below which a box is hardly that of an object; more often it comes from a slip of the mouse."""
WHOLE = 0.95
"""Share of the image's area from which a box is one of the whole image."""
SAME = 0.9
"""IoU from which two boxes of an image are taken for one object that was marked twice."""
SHOWN = 6
"""Most images that are kept as examples of an oddity."""
OCTAVE = 8
"""Bins per factor of 2 in the histograms of sides and aspects."""
FINEST, COARSEST = -4, 14
"""Powers of 2 at the ends of the histograms."""
BINS = (COARSEST - FINEST) * OCTAVE


class Marked(NamedTuple):
    """Boxes of an image that have something odd."""

    row: int
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]


@dataclass
class Oddity:
    """Boxes with something odd: how many there are, and some of them."""

    count: int = 0
    examples: list[Marked] = field(default_factory=list)

    def add(self, found: Annotations, *places: NDArray[np.int64]) -> None:
        """Count the boxes at ``places``; several arrays of one length belong together, box by box."""
        self.count += len(places[0])
        known = {example.row for example in self.examples}
        for group in zip(*(place.tolist() for place in places), strict=True):
            if len(self.examples) == SHOWN:
                return
            row = int(found.rows[group[0]])
            if row not in known:
                known.add(row)
                boxes = tuple(tuple(found.boxes[each].tolist()) for each in group)
                self.examples.append(Marked(row, boxes, tuple(int(found.labels[each]) for each in group)))


def _no_histogram() -> NDArray[np.int64]:
    return np.zeros(BINS, dtype=np.int64)


@dataclass
class BoxStatistics:
    """What there is in a split, crowds and ignored boxes left out."""

    boxes_of_class: NDArray[np.int64]
    """Boxes of each class, int64 (C,)."""
    images_of_class: NDArray[np.int64]
    """Images that show each class, int64 (C,)."""
    sides: NDArray[np.int64] = field(default_factory=_no_histogram)
    """Histogram of the boxes' shorter sides in pixels of the stored image; see ``edges``."""
    shown_sides: NDArray[np.int64] = field(default_factory=_no_histogram)
    """The same in pixels of the view that the network sees."""
    aspects: NDArray[np.int64] = field(default_factory=_no_histogram)
    """Histogram of the boxes' height / width; see ``edges``."""
    odd: defaultdict[str, Oddity] = field(default_factory=lambda: defaultdict(Oddity))
    """By kind: tiny, whole (boxes of the whole image), double (marked twice), double_class (twice, as different classes)."""

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return int(self.boxes_of_class.sum())

    def below(self, side: float) -> int:
        """Return how many boxes have a shorter side of less than ``side`` pixels, a power of 2, in the view."""
        return int(self.shown_sides[: int((np.log2(side) - FINEST) * OCTAVE)].sum())

    def enlargement(self, side: float, share: float) -> float:
        """Return how many times larger views must be so that less than ``share`` of the boxes are below ``side`` pixels."""
        wanted = int(np.searchsorted(np.cumsum(self.shown_sides), share * max(1, self.boxes), side="right"))
        return float(max(1.0, side / edges()[min(wanted, len(self.shown_sides) - 1)]))


def edges() -> NDArray[np.float64]:
    """Return the lower edges of the bins, which are ``OCTAVE`` to a factor of 2."""
    return 2.0 ** np.arange(FINEST, COARSEST, 1 / OCTAVE)


def box_statistics(shards: ShardSet, scales: NDArray[np.float64]) -> BoxStatistics:
    """Count the boxes of a split.

    Args:
        scales: pixels of the view in a pixel of each image, float64 (images,).

    Raises:
        DataError: a shard cannot be read.
    """
    classes, index = len(shards.meta.classes), shards.index
    total = BoxStatistics(np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64))
    for found in shards.annotations():
        width, height = (found.boxes[:, 2:] - found.boxes[:, :2]).astype(np.float64).T
        side = np.minimum(width, height)
        total.boxes_of_class += np.bincount(found.labels, minlength=classes)
        pairs = np.unique(found.rows * classes + found.labels)
        total.images_of_class += np.bincount(pairs % classes, minlength=classes)
        total.sides += _histogram(side)
        total.shown_sides += _histogram(side * scales[found.rows])
        total.aspects += _histogram(height / np.maximum(width, 1e-6))
        total.odd["tiny"].add(found, np.flatnonzero(side < TINY))
        area = index.width[found.rows].astype(np.float64) * index.height[found.rows]
        total.odd["whole"].add(found, np.flatnonzero(width * height >= WHOLE * area))
        first, second = same_places(found)
        alike = found.labels[first] == found.labels[second]
        total.odd["double"].add(found, first[alike], second[alike])
        total.odd["double_class"].add(found, first[~alike], second[~alike])
    return total


def same_places(found: Annotations) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of boxes of one image with an IoU of at least ``SAME``, as two int64 arrays of places."""
    order = np.lexsort((found.boxes[:, 0], found.rows))
    rows, boxes = found.rows[order], found.boxes[order].astype(np.float64)
    # Sorted by left side, such a pair is near: the left sides are at most (1 - SAME) of the first one's width apart.
    reach = boxes[:, 0] + (1 - SAME) * (boxes[:, 2] - boxes[:, 0])
    pairs = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    ones, step = np.arange(max(0, len(order) - 1)), 1
    while len(ones):
        others = ones + step
        near = (rows[others] == rows[ones]) & (boxes[others, 0] <= reach[ones])
        ones, others = ones[near], others[near]
        alike = _iou(boxes[ones], boxes[others]) >= SAME
        pairs.append((order[ones[alike]], order[others[alike]]))
        step += 1
        ones = ones[ones + step < len(order)]
    first, second = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return first, second


def _iou(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of boxes (n, 4) with others (n, 4), pair by pair."""
    size = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    common = np.maximum(size, 0).prod(axis=1)
    areas = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1)
    return common / np.maximum(areas - common, 1e-9)


def _histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    places = np.floor((np.log2(np.maximum(values, 2.0**FINEST)) - FINEST) * OCTAVE).astype(np.int64)
    return np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
