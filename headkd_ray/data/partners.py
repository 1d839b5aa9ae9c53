"""Choose the other images of a mosaic: a function of (image, view number, seed), whatever window, worker or machine makes it.

All come from one row group of the shards, another one in each view, so that a window reads about twice as many row groups and
not four times as many images, each in a row group of its own. Prepare has mixed the images over the row groups, and so each is
a random handful.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.epoch_order import Rows
from headkd_ray.data.rng import key_permutation
from headkd_ray.data.shards import ShardIndex


@dataclass(frozen=True)
class Partners:
    """The images that mosaics are made of."""

    index: ShardIndex
    rows: Rows
    """Rows of the index that are trained on, int64, ascending."""
    seed: int
    """The seed of the views."""

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row groups that have such rows, and where in ``rows`` those of each begin."""
        return np.unique(self.index.group[self.rows], return_index=True)

    def of(self, row: int, number: int, count: int) -> list[int]:
        """Return the rows of the ``count`` other images in view ``number`` of the image at ``row``, which is trained on.

        Without other images they are the image itself, and with too few of them some come twice.
        """
        groups, first = self._groups
        own = int(np.searchsorted(groups, self.index.group[row]))
        start, *end = first[_partner_groups(len(groups), self.seed, number)[own] :][:2]
        others = self.rows[start : end[0] if end else None]
        others = others[others != row]
        if not len(others):
            return [row] * count
        order = key_permutation(len(others), "partners", self.seed, int(self.index.image_id[row]), number)
        return [int(others[order[place % len(order)]]) for place in range(count)]


@lru_cache(maxsize=4)
def _partner_groups(groups: int, seed: int, number: int) -> NDArray[np.int64]:
    """Return the row group whose images each row group's mosaics of view ``number`` show, as positions."""
    return key_permutation(groups, "partner groups", seed, number)
