"""A view is a function of (image id, view number, seed), and its boxes stay on their pixels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import resize

from headkd_ray.data.images import decode
from headkd_ray.data.views import View, apply_view, eval_view, train_view, view_number, view_size
from headkd_ray.job import DataSpec
from tests.data.coco_files import encoded, pixels

SPEC = DataSpec(train="a", val="b", short_side=(100, 140), long_side=200, flip=0.5, eval_short_side=120)


def test_a_view_is_the_same_in_any_process() -> None:
    code = (
        "from headkd_ray.data.views import train_view; from headkd_ray.job import DataSpec\n"
        "spec = DataSpec(train='a', val='b', short_side=(100, 140), long_side=200)\n"
        "print([(v.short_side, v.flip) for v in (train_view(i, n, 3, spec) for i in range(5) for n in range(4))])"
    )
    here = [(v.short_side, v.flip) for v in (train_view(i, n, 3, SPEC) for i in range(5) for n in range(4))]
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    )
    assert there.stdout.strip() == str(here)
    assert here[:3] == [(112, True), (137, True), (138, True)], "views changed: teacher caches and resumed runs would differ"


def test_short_sides_are_uniform_and_half_are_flipped() -> None:
    views = [train_view(image, number, 0, SPEC) for image in range(200) for number in range(20)]
    counts = np.bincount([view.short_side for view in views], minlength=141)[100:]
    assert len(counts) == 41 and counts.min() > 50 and counts.max() < 160
    assert 0.47 < np.mean([view.flip for view in views]) < 0.53
    assert {view.flip for view in (train_view(i, 0, 0, SPEC.replace({"flip": 0.0})) for i in range(99))} == {False}
    assert {view.flip for view in (train_view(i, 0, 0, SPEC.replace({"flip": 1.0})) for i in range(99))} == {True}


def test_every_part_of_the_key_matters() -> None:
    def shown(seed: int, number: int, shift: int = 0) -> list[View]:
        return [train_view(image + shift, number, seed, SPEC) for image in range(30)]

    assert shown(0, 0) == shown(0, 0)
    assert shown(0, 0) != shown(1, 0) and shown(0, 0) != shown(0, 1) and shown(0, 0) != shown(0, 0, shift=1)


def test_view_numbers_repeat_after_data_views() -> None:
    assert [view_number(epoch, SPEC) for epoch in range(4)] == [0, 1, 2, 3]
    assert [view_number(epoch, SPEC.replace({"views": 3})) for epoch in range(5)] == [0, 1, 2, 0, 1]


def test_evaluation_view() -> None:
    assert eval_view(SPEC) == View(120, 200, flip=False)


@pytest.mark.parametrize(("size", "view", "expected"), [
    ((480, 640), View(800, 1333), (800, 1067)),
    ((640, 480), View(800, 1333), (1067, 800)),
    ((427, 640), View(800, 1333), (800, 1199)),
    ((200, 1000), View(800, 1333), (267, 1333)),
    ((3, 3000), View(800, 1333), (1, 1333)),
])  # fmt: skip
def test_sizes_as_mmdet_rescales(size: tuple[int, int], view: View, expected: tuple[int, int]) -> None:
    assert view_size(*size, view) == expected


def test_pixels_as_torchvision_resizes() -> None:
    image = torch.randint(0, 256, (3, 91, 133), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nothing = np.zeros((0, 4), np.float32)
    shown, _ = apply_view(image, nothing, View(60, 400))
    assert np.array_equal(shown, resize(image, [60, 88], antialias=True).numpy())
    flipped, _ = apply_view(image, nothing, View(60, 400, flip=True))
    assert np.array_equal(flipped, shown[:, :, ::-1])
    same, _ = apply_view(image, nothing, View(91, 400))
    assert np.array_equal(same, image.numpy())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_of_decoded_files_as_torchvision_resizes(kind: str) -> None:
    """Their memory has 4 or 3 bytes a pixel; neither the layout nor the byte without meaning changes a view."""
    image = decode(encoded(pixels(3, 133, 91), kind))
    assert image.stride()[2] == {"JPEG": 4, "PNG": 3}[kind]
    for short_side in (60, 91, 120):
        for flip in (False, True):
            view = View(short_side, 400, flip)
            shown, _ = apply_view(image, np.zeros((0, 4), np.float32), view)
            expected = resize(image.contiguous(), list(view_size(91, 133, view)), antialias=True).numpy()
            assert np.array_equal(shown, expected[:, :, ::-1] if flip else expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_follow_their_pixels(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(8, 90)), data.draw(st.integers(8, 90))
    x1, x2 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    view = View(data.draw(st.integers(8, 200)), data.draw(st.integers(40, 300)), data.draw(st.booleans()))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    shown, boxes = apply_view(image, np.array([[x1, y1, x2, y2]], np.float32), view)
    assert shown.shape == (3, *view_size(height, width, view)) and boxes.dtype == np.float32
    (left, top, right, bottom) = boxes[0].tolist()
    assert 0 <= left < right <= shown.shape[2] and 0 <= top < bottom <= shown.shape[1]
    scale = shown.shape[2] / width, shown.shape[1] / height
    assert (right - left) == pytest.approx((x2 - x1) * scale[0], rel=1e-4)
    lit = shown[0] > 0
    columns, rows = np.flatnonzero(lit.any(0)), np.flatnonzero(lit.any(1))
    blur = 1 + max(1.0, *scale) + max(0.0, 1 / min(scale) - 1)  # pixels by which interpolation spreads an edge
    if len(columns):
        assert abs(columns[0] - left) <= blur and abs(columns[-1] + 1 - right) <= blur
        assert abs(rows[0] - top) <= blur and abs(rows[-1] + 1 - bottom) <= blur


def test_smallest_box_that_prepare_accepts_survives() -> None:
    image = torch.zeros(3, 4000, 6000, dtype=torch.uint8)
    for flip in (False, True):
        _, boxes = apply_view(image, np.array([[5999.9, 3999.9, 5999.9102, 3999.9102]], np.float32), View(40, 60, flip))
        assert boxes[0, 2] > boxes[0, 0] and boxes[0, 3] > boxes[0, 1]


def test_a_box_without_area_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 boxes without area at 20 x 10"):
        apply_view(torch.zeros(3, 20, 40, dtype=torch.uint8), np.array([[3, 3, 3, 9], [1, 1, 5, 5]], np.float32), View(10, 99))
