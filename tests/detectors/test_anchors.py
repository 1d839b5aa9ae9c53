import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from headkd_ray.detectors.ops.anchors import Anchors, padded_extents, valid_anchors
from headkd_ray.job import AnchorSpec

STRIDES = (8, 16, 32, 64, 128)
SHAPES = ((12, 10), (6, 5), (3, 3), (2, 2), (1, 1))


def maps(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, *shape) for shape in shapes]


def test_anchors_and_cells_follow_y_x_anchor_order() -> None:
    spec = AnchorSpec(base_scale=4, octave_scales=3, ratios=(0.5, 1.0, 2.0))
    anchors = Anchors(spec, STRIDES)
    grid = anchors.grid(maps())
    row = 0
    for level, ((height, width), stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
        first = row
        for y in range(height):
            for x in range(width):
                for a in range(9):
                    ratio, octave = spec.ratios[a // 3], a % 3
                    size = 4 * stride * 2 ** (octave / 3)
                    w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
                    expected = [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
                    assert grid.boxes[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
                    cell = anchors.cells(torch.tensor(row - first), level, width)
                    assert cell.tolist() == [level, y, x, a]
                    row += 1
        assert grid.counts[level] == row - first
    assert len(grid.boxes) == row


@pytest.mark.parametrize("retina", [True, False])
def test_rounding_gives_torchvisions_anchors(retina: bool) -> None:
    bases = [32, 64, 128, 256, 512]
    if retina:
        sizes = tuple((b, int(b * 2 ** (1 / 3)), int(b * 2 ** (2 / 3))) for b in bases)
        ours = Anchors(AnchorSpec(base_scale=4, octave_scales=3, rounding=True), STRIDES)
    else:
        sizes = tuple((b,) for b in bases)
        ours = Anchors(AnchorSpec(base_scale=8, octave_scales=1, rounding=True), (4, 8, 16, 32, 64))
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    # At 96 x 160 pixels the coarse levels do not divide the image, and torchvision's strides differ from the nominal ones.
    stride = ours.strides[0]
    shapes = [(96 // stride, 160 // stride)]
    while len(shapes) < 5:
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    features = maps(tuple(shapes))
    expected = theirs(ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)]), features)[0]
    torch.testing.assert_close(ours.grid(features).boxes, expected, rtol=0, atol=0)


def test_anchors_count_only_within_an_images_own_padding() -> None:
    # Official rule: padded = size rounded up to 32; valid cells = ceil(padded / stride), at most the level's.
    anchors = Anchors(AnchorSpec(), STRIDES)
    grid = anchors.grid(maps())
    sizes = torch.tensor([[96, 80], [33, 64], [20, 70]])
    valid = valid_anchors(grid, padded_extents(sizes))
    for image, (h, w) in enumerate(sizes.tolist()):
        expected = []
        for (height, width), stride in zip(SHAPES, STRIDES, strict=True):
            rows = min(math.ceil(math.ceil(h / 32) * 32 / stride), height)
            columns = min(math.ceil(math.ceil(w / 32) * 32 / stride), width)
            for y in range(height):
                for x in range(width):
                    expected += [y < rows and x < columns] * 9
        assert valid[image].tolist() == expected
    assert not valid[1].all()


def test_grids_are_remembered_but_not_forever() -> None:
    anchors = Anchors(AnchorSpec(), STRIDES)
    assert anchors.grid(maps()) is anchors.grid(maps())
    for n in range(1, 40):
        anchors.grid(maps(((n, n),) * 5))
    assert len(anchors._memo) <= 16
