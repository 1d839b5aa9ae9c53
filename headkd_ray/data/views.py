"""Augment images reproducibly: (image id, view number, seed) determine the pixels and boxes on any machine.

A view is made in this order: part of the image (``frames.py``), resize, colour (``colour.py``), flips. Resizing follows the
paper's pipeline: the image is scaled by min(short / shorter side, long / longer side) and sides are rounded to whole pixels
(mmdet's ``Resize(keep_ratio=True)``); boxes scale with the *rounded* sides. Interpolation is antialiased bilinear on uint8
(mmdet: OpenCV bilinear without antialiasing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headkd_ray.data.colour import ColourChange, draw_colour
from headkd_ray.data.frames import Boxes, Frame, Mosaic, Rect, Size, Tile, draw_frame, shown_tiles
from headkd_ray.data.rng import key_fractions, key_integers
from headkd_ray.job import DataSpec

FILL = (124, 116, 104)
"""Colour around an image that is zoomed out: ImageNet's mean, which normalisation turns into nearly 0, as padding is."""
COPIES = 1 << 32
"""Distance between the view numbers of an image's copies in one epoch, with data.sampling."""


@dataclass(frozen=True)
class View:
    """The augmentation of one image."""

    short_side: int
    """Requested length of the shorter side in pixels."""
    long_side: int
    """Limit of the longer side in pixels, which takes precedence over ``short_side``."""
    flip: bool = False
    """Whether the view is mirrored left to right."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels that the image has to fit into as well; None = no such limit."""
    flip_vertical: bool = False
    """Whether the view is mirrored top to bottom."""
    frame: Frame | None = None
    """What the view shows; None = the whole image."""
    min_visible: float = 0.0
    """Share of a box's area below which a box that ``frame`` cuts is left out."""
    colour: ColourChange | None = None
    """How colours change; None = they do not."""
    reduced: bool = False
    """Whether JPEGs may be decoded at reduced size."""

    @property
    def partners(self) -> int:
        """Number of other images that the view shows."""
        return 3 if isinstance(self.frame, Mosaic) else 0


class StoredImage(Protocol):
    """An image with its boxes, as the shards hold it (``Sample``)."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""

    @property
    def boxes(self) -> Boxes:
        """float32 (n, 4): x1 y1 x2 y2 in pixels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 (n,)."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """float32 (n,): loss weights of the boxes; 0 = ignored."""

    def pixels(self, least: Size | None = None) -> Tensor:
        """Decode the image to uint8 (3, H, W), RGB; if ``least`` is given, perhaps smaller, but no smaller than that."""


class Shown(NamedTuple):
    """What a view shows."""

    pixels: NDArray[np.uint8]
    """uint8 (3, h, w)."""
    boxes: Boxes
    """float32 (n, 4): x1 y1 x2 y2 in pixels of the view."""
    labels: NDArray[np.int64]
    """int64 (n,)."""
    weights: NDArray[np.float32]
    """float32 (n,): loss weights of the boxes."""


def train_view(image_id: int, number: int, seed: int, spec: DataSpec) -> View:
    """Return view ``number`` of an image: short side uniform in ``spec.short_side``, flipped with probability ``spec.flip``,
    and what ``spec.augment`` adds."""
    low, high = spec.short_side
    resolution = 1 << 32
    key = (seed, image_id, number)
    size, coin = key_integers(2, resolution, "view", *key)
    short_side, flip, augment = low + size * (high - low + 1) // resolution, coin < spec.flip * resolution, spec.augment
    upside_down = augment.flip_vertical > 0 and key_fractions(1, "flip vertical?", *key)[0] < augment.flip_vertical
    frame = draw_frame(augment, shows_mosaics(number, spec), *key)
    min_visible = 0.0 if frame is None else augment.min_visible
    colour = draw_colour(augment, *key)
    return View(short_side, spec.long_side, flip, None, upside_down, frame, min_visible, colour, spec.reduced_decode)


def view_number(epoch: int, spec: DataSpec, copy: int = 0) -> int:
    """Return the number of the view that ``epoch`` shows of an image, the ``copy``-th time that it does.

    The epochs with mosaics and those without have views of their own, so that a cache can hold both.
    """
    mosaics, views = _mosaic_epochs(spec), spec.views
    if views is None:
        return epoch + copy * COPIES
    if mosaics is None:
        return (epoch + copy) % views
    first = min(mosaics, views)  # of the views without mosaics
    return (epoch + copy) % first if epoch < mosaics else first + (epoch - mosaics + copy) % views


def shows_mosaics(number: int, spec: DataSpec) -> bool:
    """Return whether view ``number`` belongs to the epochs with mosaics."""
    mosaics = _mosaic_epochs(spec)
    return mosaics is None or number % COPIES < min(mosaics, spec.views or mosaics)


def distinct_views(epochs: int, spec: DataSpec) -> int:
    """Return how many views ``epochs`` show of an image; they are numbered from 0.

    With ``spec.views`` the views of repeated images (``spec.sampling``) count; without it they are numbered from COPIES.
    """
    mosaics, views = _mosaic_epochs(spec), spec.views
    if views is None:
        return epochs
    first = 0 if mosaics is None or mosaics >= epochs else min(mosaics, views)
    rest = epochs if first == 0 else epochs - (mosaics or 0)
    return first + (min(views, rest) if spec.sampling == "all" else views)


def _mosaic_epochs(spec: DataSpec) -> int | None:
    return spec.augment.mosaic_epochs if spec.augment.mosaic else None


def eval_view(spec: DataSpec) -> View:
    """Return the view that is used at evaluation."""
    return View(spec.eval_short_side, spec.long_side)


def view_size(height: int, width: int, view: View) -> Size:
    """Return the height and width in pixels of an image of (height, width) under ``view``."""
    scale = min(view.short_side / min(height, width), view.long_side / max(height, width))
    if view.canvas is not None:
        scale = min(scale, view.canvas[0] / height, view.canvas[1] / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def extreme_sizes(spec: DataSpec, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> list[Size]:
    """Return the lowest, narrowest, tallest and widest views of images of these sizes, as (height, width) with padding.

    Args:
        heights, widths: sizes of the images in pixels; both training and evaluation views count.
    """
    images = np.unique(np.stack([heights, widths], axis=1), axis=0).tolist()
    views = [View(short_side, spec.long_side) for short_side in sorted({*spec.short_side, spec.eval_short_side})]
    shown = (view_size(height, width, view) for height, width in images for view in views)
    sizes = {(-(-height // spec.pad) * spec.pad, -(-width // spec.pad) * spec.pad) for height, width in shown}
    return sorted({pick(sizes, key=itemgetter(axis)) for pick in (min, max) for axis in (0, 1)})


def apply_view(image: Tensor, boxes: Boxes, view: View) -> tuple[NDArray[np.uint8], Boxes]:
    """Apply ``view``, which shows the whole image, to ``image`` and its boxes.

    Args:
        image: uint8 (3, H, W).
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of ``image``.

    Returns:
        uint8 (3, h, w) and float32 (n, 4) in pixels of the view, inside [0, w] x [0, h].

    Raises:
        ValueError: a box has no area in the view (prepare refuses boxes that are small enough for this).
    """
    height, width = image.shape[1:]
    return _whole(image, (height, width), boxes, view)


def _whole(image: Tensor, stored: Size, boxes: Boxes, view: View) -> tuple[NDArray[np.uint8], Boxes]:
    """Apply ``view`` as ``apply_view`` does; ``stored`` is the size to which the boxes belong, and ``image`` may be smaller."""
    size = view_size(*stored, view)
    placed, _ = Tile(Rect(0, 0, *stored), Rect(0, 0, *size)).placed(boxes, 0.0)
    pixels, shown = _finished(_resized(_interleaved(image), size), placed, view)
    empty = ~_with_area(shown)
    if empty.any():
        raise ValueError(f"{int(empty.sum())} boxes without area at {size[1]} x {size[0]} px: {boxes[empty][:3].tolist()}")
    return pixels, shown


def _with_area(boxes: Boxes) -> NDArray[np.bool_]:
    """Return which boxes have an area as float32, which very small ones may lose by rounding."""
    there: NDArray[np.bool_] = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return there


def show(images: Sequence[StoredImage], view: View) -> Shown:
    """Show ``view`` of an image, together with the other images that it shows.

    Args:
        images: the image, followed by ``view.partners`` others.

    Raises:
        ValueError: an image cannot be decoded, or as for ``apply_view``.
    """
    own = images[0]
    size = view_size(*own.size, view)
    if view.frame is None:
        return Shown(*_whole(own.pixels(size if view.reduced else None), own.size, own.boxes, view), own.labels, own.weights)
    tiles = view.frame.tiles([image.size for image in images], size, own.boxes[own.weights > 0], view.min_visible)
    boxes, labels, weights, parts = [], [], [], []
    for number, tile in shown_tiles(tiles):
        image = images[number]
        whole = _interleaved(image.pixels(tile.least(image.size) if view.reduced else None))
        (top, left, height, width), exact = tile.within(image.size, (whole.shape[0], whole.shape[1]))
        window = np.ascontiguousarray(whole[top : top + height, left : left + width])
        parts.append((tile.target, _resized(window, (tile.target.height, tile.target.width))))
        placed, shown = exact.placed(image.boxes, view.min_visible)
        boxes.append(placed[shown])
        labels.append(image.labels[shown])
        weights.append(image.weights[shown])
    pixels, corners = _finished(_composed(parts, size), np.concatenate(boxes), view)
    there = _with_area(corners)
    return Shown(pixels, corners[there], np.concatenate(labels)[there], np.concatenate(weights)[there])


def _composed(parts: Sequence[tuple[Rect, NDArray[np.uint8]]], size: Size) -> NDArray[np.uint8]:
    """Put images (h, w, 3 or 4) at their places on a ground of FILL, and return it, (H, W, 3 or 4)."""
    pixels = parts[0][1]
    if len(parts) == 1 and pixels.shape[:2] == size:
        return pixels
    ground = np.empty((*size, pixels.shape[2]), dtype=np.uint8)
    if sum(place.height * place.width for place, _ in parts) < size[0] * size[1]:
        ground[:] = (*FILL, 0)[: pixels.shape[2]]
    for (top, left, height, width), image in parts:
        channels = min(image.shape[2], ground.shape[2])
        ground[top : top + height, left : left + width, :channels] = image[..., :channels]
    return ground


def _finished(
    pixels: NDArray[np.uint8], corners: NDArray[np.float64], view: View
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Change the colours of pixels (h, w, 3 or 4), flip them and their boxes, and return uint8 (3, h, w) and float32 (n, 4)."""
    height, width = pixels.shape[:2]
    if view.colour is not None:
        pixels = view.colour(pixels)
    shown = pixels[..., :3].transpose(2, 0, 1)
    x1, y1, x2, y2 = corners.T
    if view.flip:
        shown, x1, x2 = shown[:, :, ::-1], width - x2, width - x1
    if view.flip_vertical:
        shown, y1, y2 = shown[:, ::-1], height - y2, height - y1
    return shown, np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _interleaved(image: Tensor) -> NDArray[np.uint8]:
    """Return an image (3, H, W) as (H, W, 3), or (H, W, 4) if its memory has 4 bytes a pixel, of which the last has no meaning.

    In these layouts torch resizes without repacking, and 4 channels faster than 3.
    """
    height, width = image.shape[1:]
    if image.stride() == (1, 4 * width, 4):
        return image.as_strided((height, width, 4), (4 * width, 4, 1)).numpy()
    return image.permute(1, 2, 0).contiguous().numpy()


def _resized(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resize (H, W, C) to ``size``: what torchvision's v2 ``resize`` runs, without torchvision's import (see images.py)."""
    height, width, channels = pixels.shape
    if size == (height, width):
        return pixels
    # With other strides of the batch's one-element axis torch would take the batch for planar, and its result would be.
    strides = (channels * height * width, 1, channels * width, channels)
    whole = torch.from_numpy(pixels).as_strided((1, channels, height, width), strides)
    return F.interpolate(whole, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
