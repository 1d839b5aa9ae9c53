"""Shapes that do not depend on values, so that the host never waits for a GPU in a training step.

To know how many rows a mask keeps, the host has to wait until the GPU has computed the mask. There, rows that do not count
stay, as padding that the losses leave out. On the CPU nothing waits and every row costs work, so they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

FIXED_SIZE_DEVICES = ("cuda",)
"""Types of devices on which shapes must not depend on values."""


def fixed_size(tensor: Tensor) -> bool:
    """Return whether shapes must not depend on values on the device of ``tensor``."""
    return tensor.device.type in FIXED_SIZE_DEVICES


def rows_that_count(counted: Tensor, *tables: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Drop the rows of ``tables`` (R, ...) that are not ``counted`` (R,), and return None and the tables.

    Where shapes must not depend on values, the mask and the whole tables are returned.
    """
    if fixed_size(counted):
        return counted, tables
    return None, [table[counted] for table in tables]


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return ``values`` as a tensor (len(values),) with the dtype and on the device of ``like``.

    They are filled in there one by one, because for a copy from the host's memory the host would wait for a GPU.
    """
    table = like.new_empty(len(values))
    for place, value in enumerate(values):
        table[place] = value
    return table
