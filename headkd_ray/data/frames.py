"""What part of a view shows what part of which image: a crop, an image zoomed out, or a mosaic of four.

A frame is drawn as shares, before the image is known, and becomes ``Tile``s when its size and its boxes are. No frame changes
the size of the view: crops and zoomed-out images keep the image's aspect, and a mosaic has the size that its own image alone
would have. So batches, memory and the grouping by aspect can be planned without decoding anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.rng import key_fractions
from headkd_ray.job import AugmentSpec

CROPS = 20
"""Number of windows that are tried for a crop."""
CENTRES = (0.3, 0.7)
"""Range of a mosaic's centre, as a share of the view's sides."""

ROUNDING = 1e-6
"""Share of a box's area that rounding may seem to cut off."""

Size = tuple[int, int]
"""Height and width in pixels."""
Boxes = NDArray[np.float32]
"""float32 (n, 4): x1 y1 x2 y2 in pixels."""


class Rect(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int


class Window(NamedTuple):
    """A rectangle that need not begin and end at whole pixels."""

    top: float
    left: float
    height: float
    width: float


class Tile(NamedTuple):
    """A window of an image, and the place of the view where it is shown."""

    source: Rect | Window
    target: Rect

    def least(self, size: Size) -> Size:
        """Return the height and width that an image of ``size`` has when the window has as many pixels as its place."""
        height, width = size
        return (
            math.ceil(height * self.target.height / self.source.height),
            math.ceil(width * self.target.width / self.source.width),
        )

    def within(self, size: Size, decoded: Size) -> tuple[Rect, Tile]:
        """Return the window in whole pixels of an image that was decoded smaller, and the tile of just that window.

        Args:
            size: height and width of the image.
            decoded: height and width of the image in hand.
        """
        if decoded == size and isinstance(self.source, Rect):
            return self.source, self
        scales = [have / whole for have, whole in zip(decoded, size, strict=True)]
        starts = [min(have - 1, round(start * by)) for have, start, by in zip(decoded, self.source[:2], scales, strict=True)]
        lengths = [
            min(have - start, max(1, round(length * by)))
            for have, start, length, by in zip(decoded, starts, self.source[2:], scales, strict=True)
        ]
        window = Rect(starts[0], starts[1], lengths[0], lengths[1])
        exact = [length / by for length, by in zip(window, scales * 2, strict=True)]
        return window, Tile(Window(*exact), self.target)

    def placed(self, boxes: Boxes, min_visible: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the image's boxes as the view shows them, clipped to the tile, and which of them it shows.

        Args:
            boxes: boxes in pixels of the image.
            min_visible: smallest share of a box's area that has to be visible.

        Returns:
            float64 (n, 4) in pixels of the view, and bool (n,).
        """
        source, target = self
        scale = np.array([target.width / source.width, target.height / source.height] * 2)
        start = np.array([target.left, target.top] * 2, dtype=np.float64)
        whole = (boxes.astype(np.float64) - [source.left, source.top] * 2) * scale + start
        seen = np.clip(whole, start, start + [target.width, target.height] * 2)
        return seen, (_areas(seen) > 0) & (_areas(seen) >= (min_visible - ROUNDING) * _areas(whole))


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


@dataclass(frozen=True)
class Crop:
    """A window of the image: the first of some candidates in which a box is visible."""

    candidates: tuple[tuple[float, float, float], ...]
    """Side of each as a share of the image's, and its place across and down, 0 = at the left or top edge, below 1."""

    def tiles(self, sizes: Sequence[Size], size: Size, boxes: Boxes, min_visible: float) -> list[Tile]:
        """Return the tile of the image; if no candidate shows enough of a box, the whole image. See ``Frame``."""
        ((height, width),) = sizes
        target = Rect(0, 0, *size)
        tiles = [Tile(_window(height, width, *candidate), target) for candidate in self.candidates]
        good = (tile for tile in tiles if not len(boxes) or tile.placed(boxes, min_visible)[1].any())
        return [next(good, Tile(Rect(0, 0, height, width), target))]


@dataclass(frozen=True)
class ZoomOut:
    """The whole image, smaller than the view."""

    side: float
    """Sides of the view in sides of the image on it, at least 1."""
    x: float
    """Place across: 0 = at the left edge, below 1."""
    y: float

    def tiles(self, sizes: Sequence[Size], size: Size, boxes: Boxes, min_visible: float) -> list[Tile]:
        """Return the tile of the image. See ``Frame``."""
        ((height, width),) = sizes
        return [Tile(Rect(0, 0, height, width), _window(*size, 1 / self.side, self.x, self.y))]


@dataclass(frozen=True)
class Mosaic:
    """Four images, each of which fills a quarter of the view and is cut where it is longer."""

    x: float
    """Centre across as a share of the view's width."""
    y: float
    first: int
    """The quarter of the view's own image, 0 to 3: top left, top right, bottom left, bottom right."""
    places: tuple[float, ...]
    """For each quarter, which part of a longer image it shows: 0 = the left or top end, below 1."""

    def tiles(self, sizes: Sequence[Size], size: Size, boxes: Boxes, min_visible: float) -> list[Tile]:
        """Return the tiles of the view's own image and of the others, in the order of ``sizes``. See ``Frame``."""
        height, width = size
        row, column = round(self.y * height), round(self.x * width)
        quarters = [
            Rect(top, left, bottom - top, right - left)
            for top, bottom in ((0, row), (row, height))
            for left, right in ((0, column), (column, width))
        ]
        order = [(self.first + number) % len(quarters) for number in range(len(quarters))]
        return [
            Tile(_filling(image, quarters[place], self.places[place]), quarters[place])
            for image, place in zip(sizes, order, strict=True)
        ]


Frame = Crop | ZoomOut | Mosaic
"""What a view shows other than one whole image.

``tiles`` returns a ``Tile`` for each image that the view shows, its own first. Its arguments are the heights and widths of the
images and of the view, the boxes of the view's own image, and the smallest share of a box's area that has to be visible.
"""


def draw_frame(spec: AugmentSpec, mosaics: bool, *key: int | str) -> Frame | None:
    """Draw the frame of a view; None = the whole image.

    Each kind draws with a key of its own, so that switching one on changes no view of another.

    Args:
        mosaics: whether the view may be a mosaic.
        key: what identifies the view.
    """
    if mosaics and _happens(spec.mosaic, "mosaic?", *key):
        x, y, first, *places = key_fractions(7, "mosaic", *key)
        return Mosaic(_between(CENTRES, x), _between(CENTRES, y), int(4 * first), tuple(places))
    if _happens(spec.crop, "crop?", *key):
        numbers = iter(key_fractions(3 * CROPS, "crop", *key))
        return Crop(tuple((_between(spec.crop_side, side), x, y) for side, x, y in zip(numbers, numbers, numbers, strict=True)))
    if _happens(spec.zoom_out, "zoom out?", *key):
        side, x, y = key_fractions(3, "zoom out", *key)
        return ZoomOut(_between(spec.zoom_out_side, side), x, y)
    return None


def _happens(probability: float, *key: int | str) -> bool:
    return probability > 0 and key_fractions(1, *key)[0] < probability


def _between(ends: tuple[float, float], share: float) -> float:
    low, high = ends
    return low + share * (high - low)


def _window(height: int, width: int, side: float, x: float, y: float) -> Rect:
    """Return a rectangle of ``height`` x ``width`` pixels, with ``side`` times their length, at (x, y) of the room it has."""
    inner_height, inner_width = (min(length, max(1, round(side * length))) for length in (height, width))
    return Rect(int(y * (height - inner_height + 1)), int(x * (width - inner_width + 1)), inner_height, inner_width)


def _filling(image: Size, quarter: Rect, place: float) -> Rect:
    """Return the largest window of an image that has the aspect of ``quarter``; one without pixels if that has none."""
    height, width = image
    if not quarter.height or not quarter.width:
        return Rect(0, 0, 0, 0)
    scale = max(quarter.height / height, quarter.width / width)
    inner_height, inner_width = (
        min(length, max(1, round(side / scale))) for length, side in zip(image, quarter[2:], strict=True)
    )
    return Rect(int(place * (height - inner_height + 1)), int(place * (width - inner_width + 1)), inner_height, inner_width)


def shown_tiles(tiles: Sequence[Tile]) -> Iterator[tuple[int, Tile]]:
    """Yield the tiles that have pixels, each with the number of its image."""
    return ((number, tile) for number, tile in enumerate(tiles) if tile.target.height and tile.target.width)
