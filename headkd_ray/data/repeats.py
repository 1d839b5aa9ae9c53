"""Decide which images an epoch shows, and how often: rare classes more often (``data.sampling``), and a share of the unlabelled
images (``data.unlabelled_share``).

Each training image has a share: how often an epoch shows it on average. In a given epoch it is shown as often as the share
says, rounded down or up; all epochs have equally many images, so that the number of steps is the same. The counts are a
function of (seed, epoch) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.epoch_order import Rows, train_rows
from headkd_ray.data.rng import key_integers, key_permutation
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError
from headkd_ray.job import DataSpec

FINE = 1 << 30
"""Chances are whole numbers of 1 / FINE while they are added."""
UNIT = 1 << 20
"""Shares are whole numbers of 1 / UNIT, so that sums are exact on any machine."""


@dataclass(frozen=True)
class Repeats:
    """How often an epoch shows each of the training images, on average."""

    shares: NDArray[np.int64]
    """int64 (n,), in units of 1 / UNIT; their sum is a whole number."""

    @property
    def total(self) -> int:
        """Number of images of an epoch, with repeated ones."""
        return int(self.shares.sum()) // UNIT

    def counts(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return how often the epoch shows each image, int64 (n,): its share, rounded down or up."""
        order = key_permutation(len(self.shares), "repeats", seed, epoch)
        (start,) = key_integers(1, UNIT, "first repeat", seed, epoch)
        marks = (np.cumsum(self.shares[order]) + start) // UNIT
        counts = np.empty_like(self.shares)
        counts[order] = np.diff(marks, prepend=0)
        return counts


@dataclass(frozen=True)
class Sampling:
    """The images that a job trains on."""

    rows: Rows
    """Their rows of the index."""
    repeats: Repeats | None = None
    """How often an epoch shows each; None = once."""

    @property
    def images(self) -> int:
        """Number of images that an epoch shows."""
        return len(self.rows) if self.repeats is None else self.repeats.total


def sampling_of(shards: ShardSet, spec: DataSpec) -> Sampling:
    """Return the images that a job with ``spec`` trains on; reads the labels of all images if it repeats some.

    Raises DataError if a shard cannot be read, or if ``spec.repeat_threshold`` repeats nothing.
    """
    rows = train_rows(shards.index, spec.keep_empty)
    labelled = shards.index.has_truth[rows]
    own = _repeats_of_labelled(shards, rows[labelled], spec)
    others = len(rows) - len(own.shares)
    if (spec.sampling == "all" or not len(rows)) and (spec.unlabelled_share == 1 or not others):
        return Sampling(rows)
    # Each side has a whole number of images in an epoch, and a share of 1 stays exactly that.
    return Sampling(rows, Repeats(np.concatenate([own.shares, *([_shares(others, spec.unlabelled_share)] if others else [])])))


def _shares(images: int, share: float) -> NDArray[np.int64]:
    return repeats_of(np.full(images, share)).shares


def _repeats_of_labelled(shards: ShardSet, rows: Rows, spec: DataSpec) -> Repeats:
    """Return how often an epoch shows each of the labelled images at ``rows``; raise as :func:`sampling_of`."""
    if spec.sampling == "all" or not len(rows):
        return Repeats(np.full(len(rows), UNIT, dtype=np.int64))
    found = _classes_of(shards, rows)
    if spec.sampling == "class_balanced":
        return repeats_of(_balanced(found))
    factors = _repeat_factors(found, spec.repeat_threshold)
    if factors.max() == 1:
        images = found.counts[:-1]
        rarest = int(np.argmin(np.where(images > 0, images, len(rows) + 1)))
        raise DataError(
            f"data.repeat_threshold: {spec.repeat_threshold:g} repeats no image of {shards.folder.uri}: its rarest class, "
            f"{shards.meta.classes[rarest]}, is in {images[rarest]} of {len(rows)} images; use more than "
            f"{images[rarest] / len(rows):.2g}, or data.sampling all"
        )
    return repeats_of(factors)


def repeats_of(wanted: NDArray[np.float64]) -> Repeats:
    """Return shares in the proportions of ``wanted`` (n,), whose sum is rounded up to a whole number."""
    exact = math.fsum(wanted.tolist())  # in any order the same
    total = math.ceil(exact - 1e-6)
    shares = np.floor(wanted * (total / exact) * UNIT).astype(np.int64)
    missing = total * UNIT - int(shares.sum())
    assert 0 <= missing <= len(shares), "rounding down loses less than a unit each"
    shares[:missing] += 1
    return Repeats(shares)


@dataclass(frozen=True)
class _Classes:
    """Which classes the images have boxes of; having none counts as one more class, the last."""

    label: NDArray[np.int64]
    """int64 (P,): the classes of each image, image by image."""
    first: NDArray[np.int64]
    """int64 (n,): where those of each image begin. Each has at least one."""
    counts: NDArray[np.int64]
    """int64 (C + 1,): images that have each class."""


def _classes_of(shards: ShardSet, rows: Rows) -> _Classes:
    """Return the classes of the images at ``rows``; pairs of image and class, because a table of both would be large."""
    image, label = shards.labels()
    classes = len(shards.meta.classes) + 1
    empty = np.flatnonzero(shards.index.boxes == 0)
    pairs = np.unique(np.concatenate([image * classes + label, empty * classes + classes - 1]))
    image, label = np.divmod(pairs, classes)
    wanted = np.isin(image, rows)
    image, label = image[wanted], label[wanted]
    return _Classes(label, np.searchsorted(image, rows), np.bincount(label, minlength=classes))


def _repeat_factors(found: _Classes, threshold: float) -> NDArray[np.float64]:
    """Return LVIS's repeat factor of each image: the greatest of its classes' max(1, sqrt(threshold / share of images))."""
    factors = np.sqrt(np.maximum(1.0, threshold * len(found.first) / np.maximum(found.counts, 1)))
    factors[-1] = 1.0  # having no object is not a class
    return np.maximum.reduceat(factors[found.label], found.first)


def _balanced(found: _Classes) -> NDArray[np.float64]:
    """Return how often each image is drawn if a class is drawn uniformly, and then an image that has it, once per image."""
    images = found.counts
    chances = np.where(images > 0, len(found.first) / np.maximum(images, 1) / (images > 0).sum(), 0.0)
    fine = np.rint(chances * FINE).astype(np.int64)  # whole numbers, whose sum is the same on any machine
    return np.add.reduceat(fine[found.label], found.first) / FINE
