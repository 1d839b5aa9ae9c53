"""Draw the eight shapes of the synthetic data set. Each function draws one, white on black, into the unit disk with a ``pen``
whose coordinates x, y are in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

Point = tuple[float, float]


class Pen:
    """A pen that paints a square mask in unit coordinates, rotated by ``angle`` (radians)."""

    def __init__(self, side: int, angle: float) -> None:
        self.mask = Image.new("L", (side, side))
        self._draw = ImageDraw.Draw(self.mask)
        self._half = side / 2
        self._cos, self._sin = math.cos(angle), math.sin(angle)

    def polygon(self, points: Sequence[Point], fill: int = 255) -> None:
        """Paint a filled polygon; ``fill`` 0 cuts it out."""
        self._draw.polygon([self._place(point) for point in points], fill=fill)

    def disk(self, centre: Point, radius: float, fill: int = 255) -> None:
        """Paint a filled disk; ``fill`` 0 cuts it out."""
        x, y = self._place(centre)
        r = radius * self._half
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def _place(self, point: Point) -> Point:
        x, y = point
        return self._half * (1 + x * self._cos - y * self._sin), self._half * (1 + x * self._sin + y * self._cos)


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> list[Point]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _circle_points(count: int, radii: Sequence[float], start: float = 0.0) -> list[Point]:
    """Return ``count`` points around the origin, whose radii are taken from ``radii`` in turn."""
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _ring(pen: Pen) -> None:
    pen.disk((0, 0), 0.95)
    pen.disk((0, 0), 0.5, fill=0)


def _button(pen: Pen) -> None:
    pen.disk((0, 0), 0.95)
    for x in (-0.4, 0.4):
        pen.disk((x, 0), 0.2, fill=0)


def _window(pen: Pen) -> None:
    for y in (-0.7, -0.22, 0.26):
        pen.polygon(_rectangle(-0.7, y, 0.7, y + 0.26))
    pen.polygon(_rectangle(-0.7, -0.7, -0.55, 0.7))
    pen.polygon(_rectangle(0.55, -0.7, 0.7, 0.7))
    pen.polygon(_rectangle(-0.7, 0.55, 0.7, 0.7))


def _triangle(pen: Pen) -> None:
    pen.polygon(_circle_points(3, [1.0]))


def _star(pen: Pen) -> None:
    pen.polygon(_circle_points(10, [1.0, 0.42]))


def _plus(pen: Pen) -> None:
    pen.polygon(_rectangle(-1, -0.27, 1, 0.27))
    pen.polygon(_rectangle(-0.27, -1, 0.27, 1))


def _arrow(pen: Pen) -> None:
    pen.polygon(_rectangle(-0.95, -0.18, 0.3, 0.18))
    pen.polygon([(0.95, 0), (0.15, 0.6), (0.15, -0.6)])


def _crescent(pen: Pen) -> None:
    pen.disk((0, 0), 0.95)
    pen.disk((0.42, 0), 0.72, fill=0)


SHAPES: dict[str, Callable[[Pen], None]] = {
    "ring": _ring,
    "button": _button,
    "window": _window,
    "triangle": _triangle,
    "star": _star,
    "plus": _plus,
    "arrow": _arrow,
    "crescent": _crescent,
}
"""Class name -> function that draws the shape."""
