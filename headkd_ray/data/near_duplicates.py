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
ROWS = 2**12
"""Images that are compared with others at a time, which bounds the memory."""

Fingerprint = NDArray[np.uint16]


def fingerprint(data: bytes) -> Fingerprint:
    """Return the fingerprint of an image file, uint16 (8,). Raises ValueError if it cannot be decoded."""
    grey = thumbnail(data, SIDE)
    bits = np.concatenate([grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1].T > grey[:-1, :-1].T], axis=None)
    return np.packbits(bits).view(np.uint16)


def near_pairs(fingerprints: NDArray[np.uint16]) -> Iterator[NDArray[np.int64]]:
    """Yield pairs of positions of near-duplicates, int64 (m, 2), which connect every group of them.

    Args:
        fingerprints: uint16 (n, 8).
    """
    distinct, first, of = np.unique(fingerprints, axis=0, return_index=True, return_inverse=True)
    of = of.reshape(-1)
    same = np.flatnonzero(first[of] != np.arange(len(of)))
    yield np.stack([first[of[same]], same], axis=1)
    halves = np.ascontiguousarray(distinct).view(np.uint64)
    for band in range(BANDS):
        order = np.argsort(distinct[:, band], kind="stable")
        values = distinct[order, band]
        for run in np.split(order, np.flatnonzero(np.diff(values)) + 1):
            for start in range(0, len(run) - 1, ROWS):
                some = run[start : start + ROWS]
                differing = np.bitwise_count(halves[some][:, None] ^ halves[run][None]).sum(-1)
                one, other = np.nonzero(differing <= MOST)
                later = one + start < other
                yield first[np.stack([some[one[later]], run[other[later]]], axis=1)]


def groups(count: int, pairs: Iterator[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return for each of ``count`` positions the first position that is connected with it by ``pairs``, int64 (count,)."""
    root = list(range(count))

    def find(position: int) -> int:
        while root[position] != position:
            root[position] = position = root[root[position]]
        return position

    for some in pairs:
        for one, other in some.tolist():
            low, high = sorted((find(one), find(other)))
            root[high] = low
    return np.array([find(position) for position in range(count)], dtype=np.int64)
