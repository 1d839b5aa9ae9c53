"""Do all boxes of a split together look as if they were written in another form than COCO's, or for other images?

One such box is a mistake of one annotation. Nearly all of them are a mistake of the file, which clipping would make worse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FRACTION_SLACK = 0.05
"""By how much a box in fractions may leave its image."""
FEW = 50
"""Boxes, and images by the fifth of it, below which a split says nothing about what its boxes do not reach."""


class Reading(NamedTuple):
    """A way in which four numbers can be meant."""

    name: str
    corners: Callable[[Array], Array]
    """Boxes (n, 4) to x1 y1 x2 y2."""
    mend: str
    least: int
    """Boxes that have to contradict COCO's form before this one is believed."""


COCO = Reading("[x, y, width, height]", lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1), "", 0)
OTHERS = (
    Reading("corners [x1, y1, x2, y2]", lambda b: b, "width = x2 - x1 and height = y2 - y1", 1),
    Reading(
        "[centre x, centre y, width, height] (YOLO's form)",
        lambda b: np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1),
        "x = centre x - width / 2 and y = centre y - height / 2",
        3,
    ),
    Reading(
        "[y, x, height, width]",
        lambda b: COCO.corners(b[:, [1, 0, 3, 2]]),
        "x before y; or the images' width and height are swapped",
        3,
    ),
    Reading("corners [y1, x1, y2, x2]", lambda b: b[:, [1, 0, 3, 2]], "width = x2 - x1 and height = y2 - y1", 3),
)


def misread(boxes: Array, sizes: Array, slack: float) -> str | None:
    """What the boxes look like and how to write them, if they do not look like COCO's; None if they do.

    Args:
        boxes: float64 (n, 4), the four numbers as they are in the JSON; finite.
        sizes: float64 (n, 2), width and height of each box's image, pixels.
        slack: pixels by which a box may leave its image.
    """
    if not len(boxes):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest that there are
        return _fractions(boxes, sizes) or _other_form(boxes, sizes, slack) or _larger_images(boxes, sizes)


def unreached(boxes: Array, sizes: Array, images: int) -> str | None:
    """A doubt that is worth telling: in no image does a box reach beyond a part of it.

    Args:
        boxes, sizes: as for :func:`misread`.
        images: that have boxes.
    """
    if len(boxes) < FEW or images < FEW // 5:
        return None
    reach = float((COCO.corners(boxes)[:, 2:] / sizes).max())
    if reach > 0.6:
        return None
    return (
        f"no box of {len(boxes)} reaches beyond {reach:.0%} of its image's width or height; if that is not how the photos are, "
        "the boxes are in percent, or those of smaller photos"
    )


def _fractions(boxes: Array, sizes: Array) -> str | None:
    small = ((boxes >= -FRACTION_SLACK) & (boxes <= 1 + FRACTION_SLACK)).all(1) & (boxes[:, 2:] > 0).all(1) & (sizes > 2).all(1)
    if small.sum() < max(1, len(boxes) / 2):
        return None
    ones = np.ones((int(small.sum()), 2))
    form = _fitting(boxes[small], ones, FRACTION_SLACK)
    return (
        f"{small.sum()} of {len(boxes)} boxes lie within the first pixel of their image: they look like fractions of its size "
        f"(0 to 1){f', as {form.name}' if form else ''}; write pixels, [x, y, width, height]: multiply by the image's width "
        f"and height{f', with {form.mend}' if form else ''}"
    )


def _other_form(boxes: Array, sizes: Array, slack: float) -> str | None:
    form = _fitting(boxes, sizes, slack)
    if form is None:
        return None
    wrong, right = _misfits(COCO, boxes, sizes, slack), len(boxes) - _misfits(form, boxes, sizes, slack)
    return (
        f"{wrong} of {len(boxes)} boxes leave their image or have no area, while {right} fit as {form.name}; write them as "
        f"{COCO.name}: {form.mend}"
    )


def _larger_images(boxes: Array, sizes: Array) -> str | None:
    ends = COCO.corners(boxes)[:, 2:] / sizes
    likely = (boxes[:, 2:] > 0).all(1) & (ends < 100).all(1)  # else a number is wrong, not a size
    outside = int((likely & (boxes[:, :2] + boxes[:, 2:] / 2 > sizes).any(1)).sum())
    if outside < max(3, 0.1 * len(boxes)):
        return None
    across, down = np.quantile(ends[likely], 0.98, axis=0)
    return (
        f"the middle of {outside} of {len(boxes)} boxes is outside its image, and boxes reach to {across:.3g} times the "
        f"images' width and {down:.3g} times their height: they look like those of larger images; scale them to these, or take "
        "the images that the boxes were drawn on"
    )


def _fitting(boxes: Array, sizes: Array, slack: float) -> Reading | None:
    """The form that the boxes fit far better than COCO's, if they fit that badly."""
    wrong = _misfits(COCO, boxes, sizes, slack)
    if wrong < 0.4 * len(boxes) and (wrong < 5 or wrong < 0.05 * len(boxes)):
        return None
    others = [(_misfits(other, boxes, sizes, slack), other) for other in OTHERS if wrong >= other.least]
    fits, best = min(others, key=lambda pair: pair[0], default=(wrong, COCO))
    return best if fits <= 0.1 * wrong else None


def _misfits(reading: Reading, boxes: Array, sizes: Array, slack: float) -> int:
    """How many boxes have no area or leave their image if they are read so."""
    corners = reading.corners(boxes)
    flat = (corners[:, 2:] <= corners[:, :2]).any(1)
    return int((flat | (corners[:, :2] < -slack).any(1) | (corners[:, 2:] > sizes + slack).any(1)).sum())
