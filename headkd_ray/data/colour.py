"""Change the colours of an image: brightness, contrast, saturation and hue as one affine map of (R, G, B).

torchvision's functional operators do the first three one after the other, each rounded to whole numbers; here they are one map,
rounded once, so that its values differ from theirs by a little. Hue is turned about the axis of greys. Coefficients are
multiples of 2^-10: their products and sums with pixels have at most 24 bits, which float32 holds exactly. So the result does
not depend on the order in which a machine adds, and is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.rng import key_fractions
from headkd_ray.job import AugmentSpec

GREY = (0.299, 0.587, 0.114)
"""Share of R, G and B in an image's grey (ITU-R BT.601, as in torchvision)."""
STEPS = 1 << 10
"""Coefficients are multiples of 1 / STEPS."""
BLOCK_PIXELS = 16_384
"""Pixels that are changed at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class ColourChange:
    """A change of colours. 1, 1, 1, 0 changes nothing."""

    brightness: float = 1.0
    """Factor of all values."""
    contrast: float = 1.0
    """Factor of the distance from the image's mean grey."""
    saturation: float = 1.0
    """Factor of a pixel's distance from its own grey."""
    hue: float = 0.0
    """Share of a full turn by which hues are turned."""

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the changed pixels, uint8 (H, W, 3) whose memory is planar.

        Args:
            pixels: uint8 (H, W, 3) or (H, W, 4), of which the fourth value has no meaning.
        """
        height, width = pixels.shape[:2]
        matrix, offset = self._matrix(), self._offset(pixels)
        changed = np.empty((3, height, width), dtype=np.uint8)
        rows = max(1, BLOCK_PIXELS // width)
        for first in range(0, height, rows):
            block = [pixels[first : first + rows, :, channel].astype(np.float32) for channel in range(3)]
            for channel, shares in enumerate(matrix):
                total = sum((plane * share for plane, share in zip(block, shares, strict=True)), start=offset)
                changed[channel, first : first + rows] = np.clip(total, 0, 255)  # truncated; the offset has the half
        return changed.transpose(1, 2, 0)

    def _matrix(self) -> NDArray[np.float32]:
        """Return the coefficients (3, 3) of R, G, B in the new R, G, B."""
        grey = np.array([GREY] * 3)
        own = np.eye(3)
        turn = 2 * math.pi * self.hue
        axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # cross product with (1, 1, 1) / sqrt 3
        turned = math.cos(turn) * own + math.sin(turn) * axis + (1 - math.cos(turn)) / 3
        saturated = self.saturation * own + (1 - self.saturation) * grey
        return _rounded(self.brightness * self.contrast * (turned @ saturated))

    def _offset(self, pixels: NDArray[np.uint8]) -> np.float32:
        """Return what is added to each value, with the half by which it is rounded."""
        if self.contrast == 1:
            return np.float32(0.5)
        sums = [int(pixels[..., channel].sum(dtype=np.int64)) for channel in range(3)]
        mean = sum(share * total for share, total in zip(GREY, sums, strict=True)) / (pixels.shape[0] * pixels.shape[1])
        return np.float32(_rounded(np.array((1 - self.contrast) * self.brightness * mean)) + 0.5)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return (np.round(values * STEPS) / STEPS).astype(np.float32)


def draw_colour(spec: AugmentSpec, *key: int | str) -> ColourChange | None:
    """Draw the colour change of a view, which ``key`` identifies; None = there is none."""
    strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    if not any(strengths):
        return None
    deviations = [
        strength * (2 * share - 1) for strength, share in zip(strengths, key_fractions(4, "colour", *key), strict=True)
    ]
    brightness, contrast, saturation = (1 + deviation for deviation in deviations[:3])
    return ColourChange(brightness, contrast, saturation, deviations[3])
