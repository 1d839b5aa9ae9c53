"""The closed form for the anchor or point that would have proposed a box agrees with a search of the whole pyramid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import FCOSHead, RepPointsHead, RetinaHead
from headkd_ray.detectors.fcos import FCOSOutputs
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import pairwise_iou
from headkd_ray.detectors.reppoints import RepPointsOutputs
from headkd_ray.job import AnchorSpec
from tests.detectors.micro import fcos_spec, reppoints_spec, retinanet_spec

STRIDES = (8, 16, 32, 64, 128)
ANCHORS = {
    "retinanet": Anchors(AnchorSpec(), STRIDES),
    "centred cells": Anchors(AnchorSpec(), STRIDES, offset=0.5),
    "torchvision": Anchors(AnchorSpec(rounding=True), STRIDES),
    "lopsided": Anchors(AnchorSpec(octave_scales=2, ratios=(0.3, 0.8)), STRIDES, offset=0.25),
}
SIDES = {"320x480": (320, 480), "416x544": (416, 544)}
"""Height and width in pixels. The coarse levels of the second do not divide it, so torchvision's strides differ from the
nominal."""


def shapes_of(sides: tuple[int, int]) -> list[tuple[int, int]]:
    return [(math.ceil(sides[0] / stride), math.ceil(sides[1] / stride)) for stride in STRIDES]


def maps(sides: tuple[int, int], channels: int = 1) -> list[Tensor]:
    return [torch.zeros(1, channels, *shape) for shape in shapes_of(sides)]


def drawn(sides: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """Return boxes inside the image; square roots of areas (16 to 400 pixels) and ratios (1/3 to 3) are log-uniform."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 * torch.exp(math.log(400 / 16) * torch.rand(count, generator=generator))
    ratio = torch.exp(math.log(3) * (2 * torch.rand(count, generator=generator) - 1)).sqrt()
    limit = torch.tensor([sides[1], sides[0]], dtype=torch.float32)
    extent = torch.minimum(torch.stack([size / ratio, size * ratio], dim=1), limit)
    corner = torch.rand(count, 2, generator=generator) * (limit - extent)
    return torch.cat([corner, corner + extent], dim=1)


def row_of(anchors: Anchors, cells: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the position in ``anchors.grid`` of each of ``cells`` (N, 4), which must lie inside it."""
    shapes = torch.tensor(shapes_of(sides))
    level, y, x, anchor = cells.unbind(1)
    assert ((y >= 0) & (y < shapes[level, 0]) & (x >= 0) & (x < shapes[level, 1])).all()
    assert ((anchor >= 0) & (anchor < anchors.per_cell)).all()
    before = torch.tensor([0, *anchors.grid(maps(sides)).counts]).cumsum(0)
    return before[level] + (y * shapes[level, 1] + x) * anchors.per_cell + anchor


@pytest.mark.parametrize("kind", ANCHORS)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_an_anchor_is_nearest_to_itself(kind: str, sides: tuple[int, int]) -> None:
    anchors = ANCHORS[kind]
    boxes = anchors.grid(maps(sides)).boxes
    assert torch.equal(row_of(anchors, anchors.nearest(boxes, shapes_of(sides)), sides), torch.arange(len(boxes)))


@pytest.mark.parametrize("kind", ANCHORS)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_first_the_shape_and_then_the_cell(kind: str, sides: tuple[int, int]) -> None:
    """The closed form keeps its promise exactly, ties aside.

    No shape overlaps a concentric box more, and no cell of that level holds a nearer anchor of that shape.
    """
    anchors = ANCHORS[kind]
    boxes, grid = drawn(sides, 300), anchors.grid(maps(sides)).boxes
    cells = anchors.nearest(boxes, shapes_of(sides))
    iou = pairwise_iou(boxes[None], grid[None])[0]
    found = row_of(anchors, cells, sides)
    shapes = torch.cat([anchors.base(stride) for stride in STRIDES]).double()
    counts = anchors.grid(maps(sides)).counts
    level = torch.arange(len(STRIDES)).repeat_interleave(torch.tensor(counts))
    shape_of_row = level * anchors.per_cell + torch.arange(len(grid)) % anchors.per_cell
    for box, cell, row, overlaps in zip(boxes.double(), cells.tolist(), found.tolist(), iou, strict=True):
        width, height = (box[2:] - box[:2]).tolist()
        fits = []
        for x1, y1, x2, y2 in shapes.tolist():
            both = min(width, x2 - x1) * min(height, y2 - y1)
            fits.append(both / (width * height + (x2 - x1) * (y2 - y1) - both))
        shape = cell[0] * anchors.per_cell + cell[3]
        assert fits[shape] >= max(fits) - 1e-5
        assert overlaps[row] >= overlaps[shape_of_row == shape].max() - 1e-5


@pytest.mark.parametrize(("kind", "size"), [("retinanet", "320x480"), ("centred cells", "320x480"), ("torchvision", "416x544")])
def test_the_anchor_of_greatest_iou(kind: str, size: str) -> None:
    """Compare with a search for the greatest IoU over all anchors and cells.

    Measured on these boxes, 81 to 83 % of the closed form's anchors attain it (most are that very anchor, the others overlap as
    much: a small box lies inside several), 85 to 87 % miss it by less than .01, 95 % by less than .05; the mean miss is .007,
    the worst .16 to .19. The level holds an anchor of greatest IoU for 95 to 97 %.

    The rest are boxes with no cell near their centre, up to half a stride away along both axes: there another shape of the same
    level (three in four) or one of a finer level (one in five) overlaps more than the shape that fits best.
    """
    anchors, sides = ANCHORS[kind], SIDES[size]
    boxes = drawn(sides, 1500)
    grid, cells = anchors.grid(maps(sides)), anchors.nearest(boxes, shapes_of(sides))
    iou = pairwise_iou(boxes[None], grid.boxes[None])[0]
    best = iou.amax(1)
    missed = best - iou.gather(1, row_of(anchors, cells, sides).unsqueeze(1)).squeeze(1)
    assert (missed < 1e-4).double().mean() > 0.8
    assert (missed < 0.01).double().mean() > 0.84
    assert (missed < 0.05).double().mean() > 0.94
    assert missed.mean() < 0.008 and missed.max() < 0.2
    on_level = torch.stack([part.amax(1) for part in iou.split(grid.counts, dim=1)], dim=1).gather(1, cells[:, :1]).squeeze(1)
    assert (best - on_level < 1e-4).double().mean() > 0.94


def test_boxes_that_no_image_holds_still_have_a_cell() -> None:
    """This holds for padding and for boxes that reach beyond every side."""
    boxes = torch.tensor([[0.0, 0, 0, 0], [-900, -900, -800, -800], [900, 900, 1000, 1000], [-2000, -2000, 2000, 2000]])
    sides = SIDES["320x480"]
    for anchors in ANCHORS.values():
        row_of(anchors, anchors.nearest(boxes, shapes_of(sides)), sides)
    head = RetinaHead(retinanet_spec().head, 16, 3)
    cells = head.nearest_cells(head([torch.zeros(1, 16, h, w) for h, w in shapes_of(sides)]), boxes)
    assert torch.equal(cells, head.anchors.nearest(boxes, shapes_of(sides)))


def points(kind: str, sides: tuple[int, int], level: int) -> list[list[float]]:
    """Return y of the rows and x of the columns of a level's points."""
    shape, stride = shapes_of(sides)[level], STRIDES[level]
    if kind == "torchvision":  # image size // feature size, for the image as padded for the finest level
        padded = [n * STRIDES[0] for n in shapes_of(sides)[0]]
        return [[float(i * (side // n)) for i in range(n)] for n, side in zip(shape, padded, strict=True)]
    return [[(i + (0.5 if kind == "fcos" else 0.0)) * stride for i in range(n)] for n in shape]


def assert_nearest(kind: str, sides: tuple[int, int], boxes: Tensor, levels: list[int], cells: Tensor) -> None:
    assert cells.dtype == torch.int64 and cells[:, [0, 3]].tolist() == [[level, 0] for level in levels]
    for (x1, y1, x2, y2), (level, y, x, _) in zip(boxes.double().tolist(), cells.tolist(), strict=True):
        rows, columns = points(kind, sides, level)
        assert abs(rows[y] - (y1 + y2) / 2) <= min(abs(row - (y1 + y2) / 2) for row in rows) + 1e-3
        assert abs(columns[x] - (x1 + x2) / 2) <= min(abs(column - (x1 + x2) / 2) for column in columns) + 1e-3


ODD = torch.tensor([[0.0, 0, 0, 0], [-900, -900, -850, -850], [900, 900, 990, 980], [7, 7, 7, 90]])


@pytest.mark.parametrize("kind", ["fcos", "torchvision"])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("ranges", [(64.0, 128.0, 256.0, 512.0), (20.0, 30.0, 50.0, 90.0)])
def test_fcos_by_regress_range_and_nearest_point(kind: str, sides: tuple[int, int], ranges: tuple[float, ...]) -> None:
    head = FCOSHead(fcos_spec(points="corner" if kind == "torchvision" else "centre", regress_ranges=ranges).head, 16, 3)
    boxes = torch.cat([drawn(sides, 500), ODD])
    half = [max(x2 - x1, y2 - y1) / 2 for x1, y1, x2, y2 in boxes.tolist()]
    levels = [sum(bound < reach for bound in ranges) for reach in half]
    assert len(set(levels)) == 5 or ranges[0] != 20
    assert_nearest(kind, sides, boxes, levels, head.nearest_cells(FCOSOutputs(maps(sides, channels=3), [], [], []), boxes))


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("base_scale", [4.0, 1.0])
def test_reppoints_by_size_and_nearest_point(sides: tuple[int, int], base_scale: float) -> None:
    head = RepPointsHead(reppoints_spec(base_scale=base_scale).head, 16, 3)
    boxes = torch.cat([drawn(sides, 500), ODD])
    sizes = [math.sqrt(max(x2 - x1, 1e-6) * max(y2 - y1, 1e-6)) for x1, y1, x2, y2 in boxes.tolist()]
    levels = [max(sum(stride * base_scale <= size for stride in STRIDES) - 1, 0) for size in sizes]
    assert len(set(levels)) == (4 if base_scale == 4 else 5)
    outputs = RepPointsOutputs(maps(sides, channels=3), [], [], [])
    assert_nearest("reppoints", sides, boxes, levels, head.nearest_cells(outputs, boxes))
