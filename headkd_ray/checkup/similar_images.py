"""Fingerprints of a split's images, and the near-duplicates among them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.near_duplicates import BANDS, Fingerprint, fingerprint, near_groups
from headkd_ray.data.shards import READERS, ShardSet


class Fingerprints(NamedTuple):
    """The fingerprints of some of a split's images."""

    rows: NDArray[np.int64]
    """Rows of the index, int64 (n,)."""
    prints: NDArray[np.uint16]
    """uint16 (n, 8)."""
    unreadable: list[tuple[int, str]]
    """Row and reason of each image that cannot be decoded."""
    seen_bytes: int
    """Size of all image files that were read."""


def fingerprints(shards: ShardSet, most: int) -> Fingerprints:
    """Read the first ``most`` images of the shards, which are in random order, and return their fingerprints.

    Raises:
        DataError: a shard cannot be read.
    """
    places = enumerate(zip(shards.index.shard.tolist(), (shards.index.row // shards.index.row_group).tolist(), strict=True))
    wanted = [(row, place) for row, place in places if row < most]
    by_group = [(place, [row for row, _ in members]) for place, members in groupby(wanted, lambda each: each[1])]

    def look(place: tuple[int, int], rows: Sequence[int]) -> list[tuple[int, Fingerprint | str, int]]:
        samples = shards.read_group(*place, rows=shards.index.row[list(rows)].tolist())
        return [(row, _print_of(sample.image), len(sample.image)) for row, sample in zip(rows, samples, strict=True)]

    with ThreadPoolExecutor(READERS, thread_name_prefix="headkd-read") as pool:
        found = [each for some in pool.map(look, *zip(*by_group, strict=True)) for each in some] if by_group else []
    readable = [(row, print_) for row, print_, _ in found if not isinstance(print_, str)]
    return Fingerprints(
        np.array([row for row, _ in readable], dtype=np.int64),
        np.array([print_ for _, print_ in readable], dtype=np.uint16).reshape(-1, BANDS),
        [(row, print_) for row, print_, _ in found if isinstance(print_, str)],
        sum(size for *_, size in found),
    )


def _print_of(image: bytes) -> Fingerprint | str:
    try:
        return fingerprint(image)
    except ValueError as error:
        return str(error)


def similar_groups(prints: NDArray[np.uint16]) -> list[NDArray[np.int64]]:
    """Return the positions of each group of near-duplicates, the largest groups first."""
    root = near_groups(prints)
    order = np.argsort(root, kind="stable")
    found = np.split(order, np.flatnonzero(np.diff(root[order])) + 1)
    return sorted((each for each in found if len(each) > 1), key=len, reverse=True)


def nearest_pair(prints: NDArray[np.uint16], some: NDArray[np.int64], others: NDArray[np.int64]) -> tuple[int, int]:
    """Return the position in ``some`` and the one in ``others`` whose fingerprints differ least."""
    some, others = some[:100], others[:1000]  # of thousands that are alike, which bounds the memory
    differing = np.bitwise_count(prints[some][:, None] ^ prints[others][None]).sum(axis=-1)
    one, other = np.unravel_index(int(differing.argmin()), differing.shape)
    return int(some[one]), int(others[other])
