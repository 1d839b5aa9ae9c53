"""Detect whether the boxes of a split, taken together, are in a format other than COCO's, or belong to other images.

One such box is a mistake in one annotation. If nearly all are wrong, the file is, and clipping would make it worse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FRACTION_SLACK = 0.05
"""Part of the image's side by which a box in fractions may leave its image."""
LARGER = 1.15
"""Reach, in sides of the image, from which boxes belong to larger images; less may be carelessly drawn small objects."""
FEW_BOXES, FEW_IMAGES = 50, 10
"""Numbers below which the reach of a split's boxes says nothing."""


class Reading(NamedTuple):
    """A box format: what four numbers may mean."""

    name: str
    corners: Callable[[Array], Array]
    """Converts boxes (n, 4) to x1 y1 x2 y2."""
    mend: str
    least: int
    """Number of boxes that must contradict COCO's format before this one is assumed."""


COCO = Reading("[x, y, width, height]", lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1), "", 0)
CENTRES = Reading(
    "[centre x, centre y, width, height] (YOLO's format)",
    lambda b: np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1),
    "x = centre x - width / 2 and y = centre y - height / 2",
    3,
)
CENTRES_OTHERS = (
    Reading("corners [x1, y1, x2, y2]", lambda b: b, "centre x = (x1 + x2) / 2 and width = x2 - x1, and so on", 1),
    Reading("[x, y, width, height]", COCO.corners, "centre x = x + width / 2 and centre y = y + height / 2", 3),
)
"""What boxes may be that were taken for centres."""
OTHERS = (
    Reading("corners [x1, y1, x2, y2]", lambda b: b, "width = x2 - x1 and height = y2 - y1", 1),
    CENTRES,
    Reading(
        "[y, x, height, width]",
        lambda b: COCO.corners(b[:, [1, 0, 3, 2]]),
        "x before y; or the images' width and height are swapped",
        3,
    ),
    Reading("corners [y1, x1, y2, x2]", lambda b: b[:, [1, 0, 3, 2]], "width = x2 - x1 and height = y2 - y1", 3),
)


def misread(boxes: Array, sizes: Array, slack: float = 1.0) -> tuple[str, int] | None:
    """Return what the boxes look like and how to write them, and the number of an example; None if they look like COCO's.

    Args:
        boxes: float64 (n, 4), the four numbers as they are in the JSON; finite.
        sizes: float64 (n, 2), width and height of each box's image, pixels.
        slack: pixels by which a box may leave its image.
    """
    if not len(boxes):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the limit of float64
        return _fractions(boxes, sizes) or _other_form(boxes, sizes, slack) or larger_images(boxes, sizes)


def misread_fractions(boxes: Array, sizes: Array) -> tuple[str, int] | None:
    """Return the same as :func:`misread` for boxes that were written as centres, in fractions of their image, as YOLO's are.

    Args:
        boxes: float64 (n, 4): x, y, width, height in pixels, as they follow from the fractions.
        sizes: float64 (n, 2), width and height of each box's image, pixels.
    """
    if not len(boxes):
        return None
    written = _fractions_of(boxes, sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        large = (written > 1 + FRACTION_SLACK).any(1)
        pixels = (written[:, :2] <= sizes).all(1) & (written[:, 2:] <= sizes).all(1) & large
        form = _fitting(written, np.ones_like(sizes), FRACTION_SLACK, CENTRES, CENTRES_OTHERS)
    if 2 * large.sum() > len(boxes) and pixels.sum() >= 0.9 * large.sum():
        message = f"{large.sum()} of {len(boxes)} boxes are not in fractions (0 to 1) of their image: they look like pixels"
        return f"{message}; divide by the image's width and height", int(pixels.argmax())
    if form is None:
        return None
    wrong = _misfits(CENTRES, written, np.ones_like(sizes), FRACTION_SLACK)
    message = (
        f"{wrong.sum()} of {len(boxes)} boxes leave their image or have no area, while nearly all fit as {form.name}; write "
        f"them as {CENTRES.name}: {form.mend}"
    )
    return message, int(wrong.argmax())


def written_fractions(box: Array, size: Array) -> str:
    """Return a box (4,) in pixels of an image of that width and height as YOLO writes it."""
    return " ".join(f"{value:.6g}" for value in _fractions_of(box[None], size[None])[0].tolist())


def _fractions_of(boxes: Array, sizes: Array) -> Array:
    """Return x, y, width, height in pixels as centres, in fractions of the images' sides."""
    parts = boxes / np.tile(sizes, (1, 2))
    return np.concatenate([parts[:, :2] + parts[:, 2:] / 2, parts[:, 2:]], axis=1)


def unreached(boxes: Array, sizes: Array, images: int) -> str | None:
    """Return a warning if no box of any image reaches beyond a part of its image; None otherwise.

    Args:
        boxes, sizes: as for :func:`misread`.
        images: number of images that have boxes.
    """
    if len(boxes) < FEW_BOXES or images < FEW_IMAGES:
        return None
    with np.errstate(over="ignore"):
        reach = float((COCO.corners(boxes)[:, 2:] / sizes).max())
    if not reach <= 0.6:
        return None
    return (
        f"no box of {len(boxes)} reaches beyond {reach:.0%} of its image's width or height; if the photos are not like that, "
        "the boxes are in percent, or belong to smaller photos"
    )


def _fractions(boxes: Array, sizes: Array) -> tuple[str, int] | None:
    small = ((boxes >= -FRACTION_SLACK) & (boxes <= 1 + FRACTION_SLACK)).all(1) & (boxes[:, 2:] > 0).all(1) & (sizes > 2).all(1)
    if small.sum() < max(1, len(boxes) / 2):
        return None
    ones = np.ones((int(small.sum()), 2))
    form = _fitting(boxes[small], ones, FRACTION_SLACK)
    message = (
        f"{small.sum()} of {len(boxes)} boxes lie within the first pixel of their image: they look like fractions of its size "
        f"(0 to 1){f', as {form.name}' if form else ''}; write pixels, {COCO.name}: multiply by the image's width and height"
        f"{f', with {form.mend}' if form else ''}"
    )
    return message, int(small.argmax())


def _other_form(boxes: Array, sizes: Array, slack: float) -> tuple[str, int] | None:
    form = _fitting(boxes, sizes, slack)
    if form is None:
        return None
    wrong, right = _misfits(COCO, boxes, sizes, slack), ~_misfits(form, boxes, sizes, slack)
    message = (
        f"{wrong.sum()} of {len(boxes)} boxes leave their image or have no area, while {right.sum()} fit as {form.name}; write "
        f"them as {COCO.name}: {form.mend}"
    )
    return message, int((wrong & right).argmax())


def larger_images(boxes: Array, sizes: Array) -> tuple[str, int] | None:
    """Return the same as :func:`misread` if the boxes look like those of larger images."""
    if not len(boxes):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return _of_larger_images(boxes, sizes)


def _of_larger_images(boxes: Array, sizes: Array) -> tuple[str, int] | None:
    ends = COCO.corners(boxes)[:, 2:] / sizes
    likely = (boxes[:, 2:] > 0).all(1) & (ends < 100).all(1)  # else a number is wrong, not a size
    outside = likely & (boxes[:, :2] + boxes[:, 2:] / 2 > sizes).any(1)
    if outside.sum() < max(3, 0.1 * len(boxes)):
        return None
    across, down = np.quantile(ends[likely], 0.98, axis=0)
    if max(across, down) < LARGER:
        return None
    message = (
        f"the middle of {outside.sum()} of {len(boxes)} boxes is outside its image, and boxes reach to {across:.3g} times the "
        f"images' width and {down:.3g} times their height: they look like those of larger images; scale them to these, or use "
        "the images that the boxes were drawn on"
    )
    return message, int(outside.argmax())


def _fitting(
    boxes: Array, sizes: Array, slack: float, expected: Reading = COCO, others: tuple[Reading, ...] = OTHERS
) -> Reading | None:
    """Return which of the ``others`` the boxes fit far better than ``expected``, or None if they fit that well enough."""
    wrong = _misfits(expected, boxes, sizes, slack).sum()
    if wrong < 0.4 * len(boxes) and (wrong < 5 or wrong < 0.05 * len(boxes)):
        return None
    # In COCO's format some boxes start nearer to the left or top border than half their size, which no centre does. Where few
    # such boxes are to be expected, their absence proves nothing.
    near_border = (boxes[:, 2:] / (2 * sizes)).sum()
    likely = [other for other in others if wrong >= other.least and (other is not CENTRES or near_border >= 4)]
    counts = [(_misfits(other, boxes, sizes, slack).sum(), other) for other in likely]
    fits, best = min(counts, key=lambda pair: pair[0], default=(wrong, expected))
    return best if fits <= 0.1 * wrong else None


def _misfits(reading: Reading, boxes: Array, sizes: Array, slack: float) -> NDArray[np.bool_]:
    """Return which boxes, in this format, have no area or leave their image: bool (n,)."""
    corners = reading.corners(boxes)
    flat = (corners[:, 2:] <= corners[:, :2]).any(1)
    outside = (corners[:, :2] < -slack).any(1) | (corners[:, 2:] > sizes + slack).any(1)
    return np.asarray(flat | outside)
