"""Augment images reproducibly: (image id, view number, seed) determine the pixels and boxes on any machine.

A view consists of a short side and a flip. Resizing follows the paper's pipeline: the image is scaled by
min(short / shorter side, long / longer side) and sides are rounded to whole pixels (mmdet's ``Resize(keep_ratio=True)``); boxes
scale with the *rounded* sides. Interpolation is antialiased bilinear on uint8 (mmdet: OpenCV bilinear without antialiasing).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headkd_ray.data.rng import key_integers
from headkd_ray.job import DataSpec


@dataclass(frozen=True)
class View:
    """The augmentation of one image."""

    short_side: int
    """Requested length of the shorter side in pixels."""
    long_side: int
    """Limit of the longer side in pixels, which takes precedence over ``short_side``."""
    flip: bool = False
    """Whether the image is mirrored left to right."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels that the image has to fit into as well; None = no such limit."""


def train_view(image_id: int, number: int, seed: int, spec: DataSpec) -> View:
    """Return view ``number`` of an image: short side uniform in ``spec.short_side``, flipped with probability ``spec.flip``."""
    low, high = spec.short_side
    resolution = 1 << 32
    size, coin = key_integers(2, resolution, "view", seed, image_id, number)
    return View(low + size * (high - low + 1) // resolution, spec.long_side, coin < spec.flip * resolution)


def view_number(epoch: int, spec: DataSpec) -> int:
    """Return the number of the view that ``epoch`` uses for every image."""
    return epoch if spec.views is None else epoch % spec.views


def eval_view(spec: DataSpec) -> View:
    """Return the view that is used at evaluation."""
    return View(spec.eval_short_side, spec.long_side)


def view_size(height: int, width: int, view: View) -> tuple[int, int]:
    """Return the height and width in pixels of an image of (height, width) under ``view``."""
    scale = min(view.short_side / min(height, width), view.long_side / max(height, width))
    if view.canvas is not None:
        scale = min(scale, view.canvas[0] / height, view.canvas[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def extreme_sizes(spec: DataSpec, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return the lowest, narrowest, tallest and widest views of images of these sizes, as (height, width) with padding.

    Args:
        heights, widths: sizes of the images in pixels; both training and evaluation views count.
    """
    images = np.unique(np.stack([heights, widths], axis=1), axis=0).tolist()
    views = [View(short_side, spec.long_side) for short_side in sorted({*spec.short_side, spec.eval_short_side})]
    shown = (view_size(height, width, view) for height, width in images for view in views)
    sizes = {(-(-height // spec.pad) * spec.pad, -(-width // spec.pad) * spec.pad) for height, width in shown}
    return sorted({pick(sizes, key=itemgetter(axis)) for pick in (min, max) for axis in (0, 1)})


def apply_view(image: Tensor, boxes: NDArray[np.float32], view: View) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Apply ``view`` to ``image`` and its boxes.

    Args:
        image: uint8 (3, H, W).
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of ``image``.

    Returns:
        uint8 (3, h, w) and float32 (n, 4) in pixels of the view, inside [0, w] x [0, h].

    Raises:
        ValueError: a box has no area in the view (prepare refuses boxes that are small enough for this).
    """
    height, width = image.shape[1:]
    new_height, new_width = view_size(height, width, view)
    if (new_height, new_width) != (height, width):
        # What torchvision's v2 ``resize`` runs, without torchvision's import (see images.py).
        whole = _interleaved(image)
        image = F.interpolate(whole, size=(new_height, new_width), mode="bilinear", antialias=True)[0, :3]
    pixels: NDArray[np.uint8] = image.numpy()
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float64)
    limit = np.array([new_width, new_height] * 2, dtype=np.float64)
    corners = np.clip(boxes.astype(np.float64) * scale, 0, limit)
    if view.flip:
        pixels = pixels[:, :, ::-1]
        corners = np.stack([new_width - corners[:, 2], corners[:, 1], new_width - corners[:, 0], corners[:, 3]], axis=1)
    shown: NDArray[np.float32] = corners.astype(np.float32)
    empty = (shown[:, 2] <= shown[:, 0]) | (shown[:, 3] <= shown[:, 1])
    if empty.any():
        raise ValueError(f"{int(empty.sum())} boxes without area at {new_width} x {new_height} px: {boxes[empty][:3].tolist()}")
    return pixels, shown


def _interleaved(image: Tensor) -> Tensor:
    """Return an image (3, H, W) as a batch of one whose memory is interleaved, where torch resizes without repacking it.

    If the image's memory has 4 bytes a pixel, the fourth is a channel of the result: torch resizes 4 channels faster than 3.
    """
    height, width = image.shape[1:]
    channels = 4 if image.stride() == (1, 4 * width, 4) else 3
    if channels == 3:
        image = image.permute(1, 2, 0).contiguous()
    # With other strides of the batch's one-element axis torch would take the batch for planar, and its result would be.
    strides = (channels * height * width, 1, channels * width, channels)
    return image.as_strided((1, channels, height, width), strides)
