"""Check whether annotations' boxes are usable: strict by default, repaired on request and never silently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.problems import Problems

SLACK = 1.0
"""Pixels by which a box may leave the image without an error, because annotation tools round; COCO's own files have such boxes.
Training boxes are clipped to the image; the ground truth for evaluation keeps the JSON's numbers."""
MIN_SIDE = 0.01
"""Pixels inside the image below which a side counts as having no length: it could vanish in float32 when the image is scaled
down."""
ROWS = 2**18
"""Boxes that are checked at a time, which bounds the memory."""

NO_AREA = "box without area inside its image; remove the annotation, or run with --fix-boxes to drop all such boxes"
OUTSIDE = f"box leaves the image by more than {SLACK:g} px; correct it, or run with --fix-boxes to clip all such boxes"
AREA = "'area' must be a number from 0 to the image's own area (leave it out to use width x height)"
FOUR = "'bbox' must be four finite numbers [x, y, width, height]"

Place = Callable[[int], str]
"""Names the annotation in a row, for messages."""


def check_boxes(
    bbox: NDArray[np.float64],
    area: NDArray[np.float64],
    sizes: Callable[[slice], NDArray[np.float64]],
    *,
    fix: bool,
    where: Place,
    image: Place,
    problems: Problems,
) -> tuple[NDArray[np.bool_], list[str]]:
    """Check boxes, fill in missing areas, and record the problems; repair boxes in place if ``fix``.

    Args:
        bbox: float64 (n, 4), writable: x, y, width, height in pixels; finite.
        area: float64 (n,), writable: square pixels; NaN where it is not given.
        sizes: gives float64 (m, 2), width and height of the images of a slice of the rows.
        where: names a row's annotation for messages.
        image: names a row's image for messages.

    Returns:
        Which boxes are usable, bool (n,), and what was fixed, one line each.
    """
    usable = np.ones(len(bbox), dtype=bool)
    fixes: list[tuple[int, str]] = []
    for start in range(0, len(bbox), ROWS):
        rows = slice(start, start + ROWS)
        check = _Check(bbox[rows], area[rows], sizes(rows))

        def place(row: int, start: int = start) -> str:
            return f"{where(start + row)}, bbox {plain(bbox[start + row].tolist())} in {image(start + row)}"

        def area_of(row: int, start: int = start) -> str:
            return f"{where(start + row)}, area {plain([float(area[start + row])])[1:-1]}"

        problems.add_all(AREA, check.wrong_area, area_of)
        if fix:
            fixes += [(start + row, f"{place(row)}: dropped, no area inside the image") for row in check.flat]
            fixes += [(start + row, f"{place(row)}: clipped to {check.rounded(row)}") for row in check.outside]
            check.clip()
        else:
            problems.add_all(NO_AREA, check.flat, place)
            problems.add_all(OUTSIDE, check.outside, place)
        check.fill()
        usable[rows] = check.usable
    return usable, [line for _, line in sorted(fixes)]


class _Check:
    """The check of a few boxes, on views of the columns."""

    def __init__(self, bbox: NDArray[np.float64], area: NDArray[np.float64], sizes: NDArray[np.float64]) -> None:
        self._bbox, self._area = bbox, area
        with np.errstate(over="ignore", invalid="ignore"):  # numbers near the limit of float64
            ends = bbox[:, :2] + bbox[:, 2:]
            inside = [np.maximum(bbox[:, :2], 0), np.minimum(ends, sizes)]
            most = (sizes + 2 * SLACK).prod(axis=1)  # a segmentation may also reach into the slack
            wrong = ~np.isnan(area) & ~((area >= 0) & (area <= most))
            flat = ~wrong & ((inside[1] - inside[0]) < MIN_SIDE).any(1)
            outside = ~wrong & ~flat & ((bbox[:, :2] < -SLACK).any(1) | (ends > sizes + SLACK).any(1))
        self._clipped = np.concatenate([inside[0], inside[1] - inside[0]], axis=1)
        self.wrong_area, self.flat, self.outside = (np.flatnonzero(mask).tolist() for mask in (wrong, flat, outside))
        self.usable = ~wrong & ~flat

    def rounded(self, row: int) -> list[float]:
        """Return the box of a row, clipped, for a message."""
        return [round(value, 2) for value in self._clipped[row].tolist()]

    def clip(self) -> None:
        """Clip the boxes that leave their image. A segmentation's area cannot be clipped, but cannot exceed the box's."""
        self._bbox[self.outside] = self._clipped[self.outside]
        inside = self._clipped[self.outside, 2:].prod(axis=1)
        self._area[self.outside] = np.fmin(self._area[self.outside], inside)

    def fill(self) -> None:
        """Fill in the areas that are not given."""
        with np.errstate(over="ignore"):
            np.copyto(self._area, self._bbox[:, 2] * self._bbox[:, 3], where=np.isnan(self._area))


def is_box(value: Any) -> bool:
    """Return whether the value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_finite, value))


def is_finite(value: Any) -> bool:
    """Return whether the value is a finite number that float64 can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def plain(numbers: list[float]) -> str:
    """Return the numbers as a JSON may have had them: 3, not 3.0."""
    return str([int(value) if value.is_integer() and abs(value) < 2**53 else value for value in numbers])


def shortly(value: Any) -> str:
    """Return the value's ``repr``, truncated if it is long: a number may have thousands of digits."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"
