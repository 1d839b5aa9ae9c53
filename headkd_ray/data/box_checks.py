"""Check whether an annotation's box is usable: strict by default, repaired on request and never silently."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkd_ray.data.problems import Problems
    from headkd_ray.data.records import CocoImage

SLACK = 1.0
"""Pixels by which a box may leave the image without an error, because annotation tools round; COCO's own files have such boxes.
Training boxes are clipped to the image; the ground truth for evaluation keeps the JSON's numbers."""
MIN_SIDE = 0.01
"""Pixels inside the image below which a side counts as having no length: it could vanish in float32 when the image is scaled
down."""

NO_AREA = "box without area inside its image; remove the annotation, or run with --fix-boxes to drop all such boxes"
OUTSIDE = f"box leaves the image by more than {SLACK:g} px; correct it, or run with --fix-boxes to clip all such boxes"
AREA = "'area' must be a number from 0 to the image's own area (leave it out to use width x height)"

Box = tuple[float, float, float, float]


class BoxCheck:
    """Checks boxes one by one and records the problems, or what was fixed."""

    def __init__(self, fix: bool, problems: Problems) -> None:
        self.fixes: list[str] = []
        self._fix, self._problems = fix, problems

    def __call__(self, bbox: Any, area: Any, image: CocoImage, where: str) -> tuple[Box, float] | None:
        """Return the ``bbox`` (x, y, width, height) and ``area`` to use, or None if the box is dropped or refused."""
        if not is_box(bbox):
            self._problems.add("'bbox' must be four finite numbers [x, y, width, height]", f"{where}, bbox {shortly(bbox)}")
            return None
        # A segmentation may also reach into the slack.
        most = (image.width + 2 * SLACK) * (image.height + 2 * SLACK)
        if area is not None and (not _is_finite(area) or not 0 <= area <= most):
            self._problems.add(AREA, f"{where}, area {shortly(area)}")
            return None
        x, y, width, height = map(float, bbox)
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
        place = f"{where}, bbox {bbox} in image {image.id} ({image.file_name}, {image.width} x {image.height})"
        if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
            if self._fix:
                self.fixes.append(f"{place}: dropped, no area inside the image")
            else:
                self._problems.add(NO_AREA, place)
            return None
        if min(x, y) < -SLACK or x + width > image.width + SLACK or y + height > image.height + SLACK:
            if not self._fix:
                self._problems.add(OUTSIDE, place)
                return None
            clipped = (left, top, right - left, bottom - top)
            self.fixes.append(f"{place}: clipped to {[round(v, 2) for v in clipped]}")
            inside = clipped[2] * clipped[3]
            # A segmentation's area cannot be clipped without the segmentation, but it cannot exceed the box's.
            return clipped, inside if area is None else min(float(area), inside)
        return (x, y, width, height), width * height if area is None else float(area)


def is_box(value: Any) -> bool:
    """Return whether the value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    """Return whether the value is a finite number that float64 can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def shortly(value: Any) -> str:
    """Return the value's ``repr``, truncated if it is long: a number may have thousands of digits."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"
