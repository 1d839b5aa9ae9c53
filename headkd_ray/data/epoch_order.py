"""Compute the order in which a split is read, with pure functions of (index, seed, epoch, batch size, world size).

An epoch's order is made in steps, each a function of its key alone, so that any rank, any restart and any machine agree:

0. With ``data.sampling`` the epoch's images are drawn first (``repeats.py``): some appear several times, as copies that are
   numbered from 0, some not at all.
1. The row groups of the shards are shuffled with (seed, epoch) and laid end to end. (Prepare has mixed the images over the row
   groups once, so a row group is already a random handful of images.)
2. The sequence of N images is cut into ``world_size`` ranges, as equal as possible: each image is on exactly one rank.
3. A rank's range is cut into windows of about ``data.shuffle_window`` images. A window is read as a whole, each row group once,
   and its images are shuffled among themselves.
4. Within a window, images are batched by aspect (landscape or square; portrait). A window holds a multiple of the batch size,
   so the images left over in the two groups fill at most one batch of mixed aspect, and no image is carried to another window.

The number of batches on a rank is therefore ceil(images of the rank / batch size) in *every* epoch, whatever the shuffle. Ranks
whose range gives one batch less than the longest get one idle step; with gradient accumulation all ranks get up to
``accumulate - 1`` more, so that an epoch is a whole number of optimizer steps. Without accumulation there is thus at most one
idle step per rank and epoch, and none for one rank.

Ranks here are those of the job, of which one process may run several (``interleaved``): the number of processes changes neither
the order nor the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.rng import key_permutation
from headkd_ray.data.shards import ShardIndex

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class PlannedBatch:
    """The images that make up one batch."""

    step: int
    """Global micro-batch number, counted over all epochs; the same on every rank."""
    rows: tuple[int, ...]
    """Rows of the index; empty = the rank is idle in this step."""
    copies: tuple[int, ...]
    """For each row, how many times the epoch shows the image in other places that come before this one: 0 for the first."""


@dataclass(frozen=True)
class Window:
    """A group of batches whose images are read together."""

    epoch: int
    batches: tuple[PlannedBatch, ...]

    @property
    def rows(self) -> Rows:
        """Index rows of all images in the window, int64, ascending."""
        return np.unique(np.array([row for batch in self.batches for row in batch.rows], dtype=np.int64))


class Draws(Protocol):
    """How often an epoch shows each image (``repeats.Repeats``)."""

    @property
    def total(self) -> int:
        """Number of images of an epoch, with repeated ones."""

    def counts(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return how often the epoch shows each image, int64 (n,)."""


def train_rows(index: ShardIndex, keep_empty: bool) -> Rows:
    """Return the index rows to train on, int64: all, or those with at least one non-crowd box.

    Of images without ground truth they are those that a teacher has something to say about.
    """
    wanted = np.ones(len(index), dtype=bool) if keep_empty else index.boxes > 0
    return np.flatnonzero(
        wanted if index.without_truth is None else np.where(index.has_truth, wanted, index.without_truth.taught)
    )


def steps_per_epoch(images: int, batch_size: int, world_size: int, accumulate: int = 1) -> int:
    """Return the micro-batches per rank and epoch, including idle ones: equal everywhere, and a multiple of ``accumulate``."""
    longest_rank = _ceil(images, world_size)
    return _ceil(_ceil(longest_rank, batch_size), accumulate) * accumulate


def train_windows(
    index: ShardIndex,
    rows: Rows,
    *,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    window: int,
    epochs: int,
    accumulate: int = 1,
    start_step: int = 0,
    draws: Draws | None = None,
) -> Iterator[Window]:
    """Yield the windows of ``rank`` from micro-batch ``start_step``, counted over all epochs, to the end of training.

    Args:
        index: the split's index.
        rows: index rows to train on, from ``train_rows``.
        window: images per window, rounded up to a multiple of ``batch_size``.
        start_step: a resumed run's next micro-batch: windows that end before it are left out, and the window that contains it
            keeps only the remaining batches.
        draws: how often an epoch shows each of ``rows``; None = once.
    """
    steps = steps_per_epoch(len(rows) if draws is None else draws.total, batch_size, world_size, accumulate)
    for epoch in range(start_step // steps, epochs):
        for planned in epoch_windows(
            index,
            rows,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            window=window,
            steps=steps,
            draws=draws,
        ):
            remaining = tuple(batch for batch in planned.batches if batch.step >= start_step)
            if remaining:
                yield replace(planned, batches=remaining)


def epoch_windows(
    index: ShardIndex,
    rows: Rows,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    batch_size: int,
    window: int,
    steps: int,
    draws: Draws | None = None,
) -> Iterator[Window]:
    """Yield the windows of one rank in one epoch: ``steps`` batches in all, the last ones idle if there are too few images.

    The windows of all ranks cover the same steps.
    """
    size = len(index)
    slots = rows if draws is None else _slots(rows, draws.counts(seed, epoch), size)
    order = _shuffled_groups(index.group[slots % size], slots, seed, epoch)
    first, last = (len(order) * r // world_size for r in (rank, rank + 1))
    mine = order[first:last]
    length = _ceil(window, batch_size)  # steps of a window
    for number, start in enumerate(range(0, steps, length)):
        part = mine[start * batch_size : (start + length) * batch_size]
        part = part[key_permutation(len(part), "window", seed, epoch, rank, number)]
        batches = list(_by_aspect(part, index.portrait, batch_size))
        batches += [()] * (min(length, steps - start) - len(batches))
        yield Window(epoch, tuple(_planned(epoch * steps + start + i, batch, size) for i, batch in enumerate(batches)))


def _slots(rows: Rows, counts: NDArray[np.int64], size: int) -> Rows:
    """Return each row as often as ``counts`` says, its copy number k as row + k * ``size``, in the order of the rows."""
    slots = np.repeat(rows, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return slots + (np.arange(len(slots)) - first) * size


def _planned(step: int, slots: tuple[int, ...], size: int) -> PlannedBatch:
    return PlannedBatch(step, tuple(slot % size for slot in slots), tuple(slot // size for slot in slots))


def interleaved(ranks: Sequence[Iterable[Window]]) -> Iterator[Window]:
    """Yield the windows of a process that runs several ranks: for each step, the batch of each rank in order."""
    for windows in zip(*ranks, strict=True):
        steps = zip(*(window.batches for window in windows), strict=True)
        yield Window(windows[0].epoch, tuple(chain.from_iterable(steps)))


def eval_windows(index: ShardIndex, *, rank: int, world_size: int, batch_size: int, window: int = 256) -> Iterator[Window]:
    """Yield every image of the split once, in the order of the shards; each rank has a contiguous range and no idle steps.

    Batches are grouped by aspect within a window, as in training.
    """
    first, last = (len(index) * r // world_size for r in (rank, rank + 1))
    size = _ceil(window, batch_size) * batch_size
    step = 0
    for start in range(first, last, size):
        part = np.arange(start, min(start + size, last))
        parts = _by_aspect(part, index.portrait, batch_size)
        batches = tuple(_planned(step + i, batch, len(index)) for i, batch in enumerate(parts))
        step += len(batches)
        yield Window(0, batches)


def _shuffled_groups(groups: NDArray[np.int64], rows: Rows, seed: int, epoch: int) -> Rows:
    """Return ``rows``, or slots, with their row groups in the random order of (seed, epoch)."""
    _, group = np.unique(groups, return_inverse=True)  # row groups without a training image do not count
    position = np.argsort(key_permutation(int(group.max(initial=-1)) + 1, "epoch", seed, epoch))
    return rows[np.argsort(position[group], kind="stable")]


def _by_aspect(slots: Rows, portrait: NDArray[np.bool_], batch_size: int) -> Iterator[tuple[int, ...]]:
    """Yield batches of one aspect in the order in which they fill up; the remainders are merged if they fit one batch."""
    buckets: tuple[list[int], list[int]] = ([], [])
    for slot in slots.tolist():
        bucket = buckets[int(portrait[slot % len(portrait)])]
        bucket.append(slot)
        if len(bucket) == batch_size:
            yield tuple(bucket)
            bucket.clear()
    rest = [*buckets[0], *buckets[1]]
    parts = [rest] if len(rest) <= batch_size else list(buckets)
    yield from (tuple(part) for part in parts if part)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
