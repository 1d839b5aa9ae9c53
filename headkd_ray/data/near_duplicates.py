"""Find near-duplicates among images: copies that were scaled, compressed again or slightly brightened, and frames of a video in
which little moves.

The fingerprint of an image is a difference hash: of a thumbnail of 9 x 9 grey values, 128 bits say which of two neighbours is
brighter. Two images are near-duplicates if at most ``MOST`` bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.images import thumbnail

SIDE = 9
BANDS = 8
MOST = BANDS - 1
"""Bits that may differ. Of 8 bands of 16 bits, one is then equal, so that only images that share a band need to be compared."""
AT_A_TIME = 2**22
"""Pairs of images that are compared at a time, which bounds the memory."""

Fingerprint = NDArray[np.uint16]


def fingerprint(data: bytes) -> Fingerprint:
    """Return the fingerprint of an image file, uint16 (8,). Raises ValueError if it cannot be decoded."""
    grey = thumbnail(data, SIDE)
    bits = np.concatenate([grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1].T > grey[:-1, :-1].T], axis=None)
    return np.packbits(bits).view(np.uint16)


def near_groups(fingerprints: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Return for each image the first one of its group of near-duplicates, int64 (n,), as ``groups`` does.

    Args:
        fingerprints: uint16 (n, 8).
    """
    distinct, first, of = np.unique(fingerprints, axis=0, return_index=True, return_inverse=True)
    halves = np.ascontiguousarray(distinct).view(np.uint64)
    root, waiting, size = np.arange(len(distinct)), list[NDArray[np.int64]](), 0
    for run in _sharing_a_band(distinct):
        rows = max(1, AT_A_TIME // len(run))
        for start in range(0, len(run) - 1, rows):
            if (root[run] == root[run[0]]).all():  # the frames of a fixed camera, which share nearly all bands
                break
            some, others = run[start : start + rows], run[start:]
            differing = np.bitwise_count(halves[some][:, None] ^ halves[others][None]).sum(-1, dtype=np.uint8)
            one, other = np.nonzero(np.triu(differing <= MOST, 1))
            waiting.append(np.stack([some[one], others[other]], axis=1))
            size += some.size * others.size
            if size >= AT_A_TIME:
                _join(root, np.concatenate(waiting))
                waiting, size = [], 0
    _join(root, np.concatenate([np.zeros((0, 2), dtype=np.int64), *waiting]))
    least = np.full(len(distinct), len(fingerprints), dtype=np.int64)
    np.minimum.at(least, root, first)
    return least[root][of.reshape(-1)]


def _sharing_a_band(distinct: NDArray[np.uint16]) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of the fingerprints that have the same value in a band, for each band and value of several."""
    for band in range(BANDS):
        order = np.argsort(distinct[:, band], kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(distinct[order, band])) + 1)
        yield from (run for run in runs if len(run) > 1)


def groups(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of ``count`` positions the first position that ``pairs`` (m, 2) connect it with, int64 (count,)."""
    root = np.arange(count)
    _join(root, pairs)
    return root


def _join(root: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
    """Connect ``pairs`` (m, 2) in ``root``, which has the first position of each position's group, in place."""
    one, other = pairs.T
    while True:
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        apart = low < high
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        np.minimum.at(root, high[apart], low[apart])
        while not np.array_equal(above := root[root], root):
            root[:] = above
