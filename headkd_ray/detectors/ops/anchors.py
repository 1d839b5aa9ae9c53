"""Anchors of a dense head: every cell (level, y, x) of a pyramid has the same few boxes, scaled with the level's stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors.ops.fixed_size import constant
from headkd_ray.detectors.ops.tracing import traced
from headkd_ray.job import AnchorSpec

Shape = tuple[int, int]

PAD = 32
"""Anchors are valid within the image padded to a multiple of this many pixels (mmdet's Pad, size_divisor=32)."""


class AnchorGrid(NamedTuple):
    """All anchors of a batch's pyramid, level after level, and in the order (y, x, anchor) within a level."""

    boxes: Tensor
    """(N, 4) float32, pixels of the network input, not clipped."""
    origin: Tensor
    """(N, 2) float32: (y, x) x stride of the anchor's cell, in pixels."""
    counts: tuple[int, ...]
    """Number of anchors on each level; the sum is N."""
    shapes: tuple[Shape, ...]
    """(H, W) of each level."""


class Anchors:
    """Makes and caches the anchors of one head.

    Within a cell, anchors are ordered ratio-major, scale-minor, as in mmdet and torchvision. Without ``rounding`` they are
    centred on (x * stride, y * stride), as in mmdet 2.x and later; with it sizes and corners are whole pixels and the strides
    are image size // feature size, as in torchvision. ``offset`` moves all centres right and down, in units of the stride.
    """

    def __init__(self, spec: AnchorSpec, strides: Sequence[int], offset: float = 0.0) -> None:
        self.spec = spec
        self.offset = offset
        self.strides = tuple(strides)
        self.per_cell = len(spec.ratios) * spec.octave_scales
        self._memo: dict[tuple[tuple[Shape, ...], torch.device], AnchorGrid] = {}

    def base(self, stride: int) -> Tensor:
        """Return the (A, 4) float32 anchors of the cell at the origin of a level with this nominal ``stride``."""
        spec = self.spec
        sizes = spec.base_scale * stride * 2 ** (torch.arange(spec.octave_scales) / spec.octave_scales)
        if spec.rounding:
            sizes = sizes.floor()
        height_ratios = torch.tensor(spec.ratios).sqrt()
        widths = (1 / height_ratios[:, None] * sizes).flatten()
        heights = (height_ratios[:, None] * sizes).flatten()
        boxes = torch.stack([-widths, -heights, widths, heights], dim=-1) / 2
        return (boxes.round() if spec.rounding else boxes) + self.offset * stride

    def grid(self, features: Sequence[Tensor]) -> AnchorGrid:
        """Return the anchors for pyramid levels ``features`` (B, C, H, W), on their device."""
        shapes = tuple((f.shape[-2], f.shape[-1]) for f in features)
        if traced():  # the graph computes them from the sizes that it is run with
            return self._make(shapes, features[0].device)
        key = (shapes, features[0].device)
        if key not in self._memo:
            if len(self._memo) >= 16:  # multi-scale training has a few dozen shapes; drop the oldest
                del self._memo[next(iter(self._memo))]
            self._memo[key] = self._make(shapes, features[0].device)
        return self._memo[key]

    def _make(self, shapes: tuple[Shape, ...], device: torch.device) -> AnchorGrid:
        boxes, origins = [], []
        for (height, width), stride, step in zip(shapes, self.strides, self._steps(shapes), strict=True):
            y, x = (torch.arange(n, device=device, dtype=torch.float32) * s for n, s in zip((height, width), step, strict=True))
            corner = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[:, :, None].expand(-1, -1, self.per_cell, -1)
            boxes.append((corner.flip(-1).repeat(1, 1, 1, 2) + self.base(stride).to(device, non_blocking=True)).reshape(-1, 4))
            origins.append(corner.reshape(-1, 2))
        counts = tuple(level.shape[0] for level in boxes)
        return AnchorGrid(torch.cat(boxes), torch.cat(origins), counts, shapes)

    def _steps(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Return the distance (down, across) in pixels from one cell to the next, for each level."""
        if not self.spec.rounding:
            return [(stride, stride) for stride in self.strides]
        image = tuple(side * self.strides[0] for side in shapes[0])  # exact: batches are padded to multiples of the stride
        return [(image[0] // height, image[1] // width) for height, width in shapes]

    def valid(self, grid: AnchorGrid, sizes: Tensor) -> Tensor:
        """Return the mask (B, N) of the anchors of ``grid`` that count in each image.

        Their cell lies within the image's unpadded (h, w) in ``sizes`` (B, 2), rounded up to a multiple of 32, whatever the
        batch is padded to.
        """
        return valid_anchors(grid, padded_extents(sizes))

    def nearest(self, boxes: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Find the anchor nearest to each of ``boxes`` (N, 4) on levels of ``shapes`` (H, W).

        Returns (N, 4) int64 (level, y, x, anchor). This closed form picks, of all levels and anchors, the shape that overlaps
        the box most when both have one centre, then the cell of that level whose anchor centres are nearest to the box's. Where
        these are far from it, the anchor of greatest IoU over all cells can have another shape or level.
        """
        base = torch.stack([self.base(stride) for stride in self.strides]).to(boxes, non_blocking=True)  # (levels, A, 4)
        size, sides = boxes[:, 2:] - boxes[:, :2], (base[..., 2:] - base[..., :2]).flatten(0, 1)
        overlap = torch.minimum(size.unsqueeze(1), sides).prod(-1)
        iou = overlap / (size.prod(-1, keepdim=True) + sides.prod(-1) - overlap)
        best = iou.argmax(dim=1)
        return self.cells_around(boxes, best // self.per_cell, shapes, best % self.per_cell)

    def cells_around(self, boxes: Tensor, level: Tensor, shapes: Sequence[Shape], anchor: Tensor | None = None) -> Tensor:
        """Find the cell of the given ``level`` (N,) whose anchor centres are nearest to that of each of ``boxes`` (N, 4).

        Returns (N, 4) int64 (level, y, x, anchor), where ``anchor`` (N,) is 0 by default.
        """
        offset = self.offset * constant(self.strides, boxes)[level].unsqueeze(1)
        step = torch.stack([constant(side, boxes) for side in zip(*self._steps(shapes), strict=True)], dim=1)[level]
        last = torch.stack([constant(side, level) for side in zip(*shapes, strict=True)], dim=1)[level] - 1
        centre = ((boxes[:, :2] + boxes[:, 2:]) * 0.5).flip(1)
        y, x = torch.minimum(((centre - offset) / step).round().long().clamp(min=0), last).unbind(1)
        return torch.stack([level, y, x, torch.zeros_like(level) if anchor is None else anchor], dim=1)

    def cells(self, index: Tensor, level: int, width: int) -> Tensor:
        """Turn positions ``index`` (...) in a level ``width`` cells wide into (..., 4) int64 (level, y, x, anchor)."""
        cell = index // self.per_cell
        return torch.stack([torch.full_like(index, level), cell // width, cell % width, index % self.per_cell], dim=-1)


def padded_extents(sizes: Tensor) -> Tensor:
    """Round the unpadded (h, w) in ``sizes`` (B, 2) up to multiples of 32; the result is (B, 2) int64."""
    return (sizes + PAD - 1) // PAD * PAD


def valid_anchors(grid: AnchorGrid, extents: Tensor) -> Tensor:
    """Return the mask (B, N) of the anchors whose cell lies within each image's (h, w) in ``extents`` (B, 2).

    Cell y of a level is valid if y < ceil(h / stride), that is, if y * stride < h.
    """
    return (grid.origin < extents.unsqueeze(1)).all(-1)
