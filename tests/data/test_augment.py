"""What data.augment adds to a view is a function of (image, view number, seed), and boxes stay on what they show."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as operators

from headkd_ray.data.colour import ColourChange
from headkd_ray.data.frames import Crop, Mosaic, ZoomOut
from headkd_ray.data.images import Reading
from headkd_ray.data.sample import Sample
from headkd_ray.data.views import (
    FILL,
    StoredImage,
    View,
    apply_view,
    distinct_views,
    show,
    shows_mosaics,
    train_view,
    view_number,
    view_size,
)
from headkd_ray.job import DataSpec
from tests.data.coco_files import encoded, pixels

SPEC = DataSpec(train="a", val="b", short_side=(30, 50), long_side=80)


def spec_with(views: int | None = None, sampling: str = "all", **augment: Any) -> DataSpec:
    return DataSpec.model_validate({**SPEC.model_dump(), "views": views, "sampling": sampling, "augment": augment})


@dataclass(frozen=True)
class Drawing:
    """A photo that needs no decoding."""

    image: NDArray[np.uint8]
    """uint8 (H, W, 3 or 4)."""
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def weights(self) -> NDArray[np.float32]:
        """A weight for each label, so that a view shows which box it belongs to."""
        return (1 + self.labels).astype(np.float32)

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def pixels(self, least: tuple[int, int] | None = None) -> Tensor:
        return torch.from_numpy(self.image).permute(2, 0, 1)[:3]


def drawing(height: int, width: int, box: tuple[int, int, int, int], label: int = 0, channels: int = 4) -> Drawing:
    """Draw a white box on black."""
    image = np.zeros((height, width, channels), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return Drawing(image, np.array([box], np.float32), np.array([label]))


@st.composite
def drawings(draw: st.DrawFn) -> Drawing:
    height, width = draw(st.integers(8, 90)), draw(st.integers(8, 90))
    x1, x2 = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    return drawing(height, width, (x1, y1, x2, y2), draw(st.integers(0, 5)), draw(st.sampled_from((3, 4))))


AUGMENTS: dict[str, dict[str, Any]] = {
    "crop": {"crop": 1.0, "crop_side": (0.1, 1.0)},
    "zoom_out": {"zoom_out": 1.0, "zoom_out_side": (1.0, 5.0)},
    "mosaic": {"mosaic": 1.0},
}


@pytest.mark.parametrize("kind", AUGMENTS)
@settings(max_examples=40, deadline=None)
@given(photos=st.lists(drawings(), min_size=4, max_size=4), number=st.integers(0, 99), share=st.sampled_from((0.0, 0.3, 1.0)))
def test_boxes_stay_in_the_view_and_keep_enough_of_their_area(
    kind: str, photos: list[Drawing], number: int, share: float
) -> None:
    spec = spec_with(**AUGMENTS[kind], min_visible=share, flip_vertical=0.5)
    view = train_view(3, number, 0, spec)
    used = photos[: 1 + view.partners]
    pixels, boxes, labels, weights = show(used, view)
    height, width = view_size(*used[0].size, view)
    assert pixels.shape == (3, height, width) and (pixels.dtype, boxes.dtype, labels.dtype) == (np.uint8, np.float32, np.int64)
    assert (boxes >= 0).all() and (boxes <= [width, height] * 2).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    assert weights.dtype == np.float32 and view.frame is not None and len(boxes) == len(labels) <= len(used)
    tiles = view.frame.tiles([photo.size for photo in used], (height, width), used[0].boxes, share)
    areas: dict[int, list[float]] = {}
    for photo, (source, target) in zip(used, tiles, strict=True):
        x1, y1, x2, y2 = photo.boxes[0].tolist()
        scale = target.width * target.height / max(1, source.width * source.height)
        areas.setdefault(int(photo.labels[0]), []).append((x2 - x1) * (y2 - y1) * scale)
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        most = max(areas[label])
        least = min(areas[label])
        assert share * least * 0.999 <= (x2 - x1) * (y2 - y1) <= most * 1.001
    again = show(used, view)
    assert all(np.array_equal(one, other) for one, other in zip(again, (pixels, boxes, labels, 1 + labels), strict=True))


@pytest.mark.parametrize("kind", ["crop", "zoom_out"])
@settings(max_examples=40, deadline=None)
@given(photo=drawings(), number=st.integers(0, 99))
def test_boxes_follow_their_pixels(kind: str, photo: Drawing, number: int) -> None:
    spec = spec_with(**AUGMENTS[kind], min_visible=0.0, flip_vertical=0.5)
    view = train_view(3, number, 0, spec)
    pixels, boxes, *_ = show([photo], view)
    left, top, right, bottom = boxes[0].tolist()
    lit = (pixels == 255).all(axis=0)
    (tile,) = view.frame.tiles([photo.size], pixels.shape[1:], photo.boxes, 0.0)  # type: ignore[union-attr]
    scale = (tile.target.width / tile.source.width, tile.target.height / tile.source.height)
    blur = 1 + max(1.0, *scale) + max(0.0, 1 / min(scale) - 1)  # pixels by which interpolation spreads an edge
    columns, rows = np.flatnonzero(lit.any(0)), np.flatnonzero(lit.any(1))
    if len(columns):
        assert abs(columns[0] - left) <= blur and abs(columns[-1] + 1 - right) <= blur
        assert abs(rows[0] - top) <= blur and abs(rows[-1] + 1 - bottom) <= blur
    else:
        assert min(right - left, bottom - top) <= 2 * blur


def test_a_mosaic_shows_four_images_each_with_its_boxes() -> None:
    photos: list[StoredImage] = []
    for label, (height, width) in enumerate([(40, 60), (60, 30), (25, 25), (90, 120)]):
        image = np.full((height, width, 3 + label % 2), 50 * (label + 1), np.uint8)
        photos.append(Drawing(image, np.array([[0, 0, width, height]], np.float32), np.array([label])))
    quarters = set()
    for number in range(40):
        view = train_view(7, number, 0, spec_with(mosaic=1.0, min_visible=0.0))
        pixels, boxes, labels, weights = show(photos, view)
        assert labels.tolist() == [0, 1, 2, 3] and weights.tolist() == [1, 2, 3, 4] and len(np.unique(pixels)) == 4
        height, width = pixels.shape[1:]
        for (x1, y1, x2, y2), label in zip(boxes.astype(int).tolist(), labels.tolist(), strict=True):
            assert (pixels[:, y1:y2, x1:x2] == 50 * (label + 1)).all()
        x1, y1, x2, y2 = boxes[0].astype(int).tolist()
        quarters.add((x1 > 0, y1 > 0))
        assert 0.29 <= (x2 - x1) / width <= 0.71 and 0.29 <= (y2 - y1) / height <= 0.71
        assert sum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) == height * width
    assert len(quarters) == 4, "the image itself is in any quarter"


def test_zoomed_out_images_lie_on_grey() -> None:
    image = drawing(40, 60, (0, 0, 60, 40))
    view = train_view(1, 0, 0, spec_with(zoom_out=1.0, zoom_out_side=(3.0, 3.0)))
    pixels, boxes, *_ = show([image], view)
    x1, y1, x2, y2 = boxes[0].astype(int).tolist()
    assert (pixels[:, y1:y2, x1:x2] == 255).all()
    assert (pixels.reshape(3, -1).T == FILL).all(axis=1).sum() == pixels[0].size - (x2 - x1) * (y2 - y1)
    assert (x2 - x1) * 3 == pytest.approx(pixels.shape[2], abs=3)


def test_a_crop_shows_some_box_if_any_window_does() -> None:
    corner = drawing(80, 80, (70, 70, 80, 80))
    spec = spec_with(crop=1.0, crop_side=(0.3, 0.6), min_visible=0.5)
    seen = [len(show([corner], train_view(image, 0, 0, spec))[1]) for image in range(60)]
    assert seen == [1] * 60
    nothing = Drawing(corner.image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert {show([nothing], train_view(image, 0, 0, spec))[1].shape for image in range(9)} == {(0, 4)}


def test_views_that_are_off_are_those_of_always() -> None:
    photo = drawing(37, 53, (5, 8, 30, 20))
    for number in range(20):
        view = train_view(11, number, 4, SPEC)
        assert view == View(view.short_side, SPEC.long_side, view.flip)
        own, (image, boxes) = show([photo], view), apply_view(photo.pixels(), photo.boxes, view)
        assert np.array_equal(own[0], image) and np.array_equal(own[1], boxes) and own[2].tolist() == [0]
        every = spec_with(crop=1.0, crop_side=(1.0, 1.0), zoom_out=1.0)
        whole = show([photo], train_view(11, number, 4, every))
        assert np.array_equal(whole[0], image) and np.array_equal(whole[1], boxes), "a crop of the whole image is the image"


def test_switching_one_on_changes_no_other() -> None:
    def views(**augment: Any) -> list[View]:
        return [train_view(image, 2, 5, spec_with(**augment)) for image in range(30)]

    plain, cropped = views(), views(crop=0.5)
    both = views(crop=0.5, brightness=0.3, zoom_out=0.5, flip_vertical=0.5)
    assert [(view.short_side, view.flip) for view in both] == [(view.short_side, view.flip) for view in plain]
    frames = [view.frame for view in cropped]
    assert all(isinstance(view.frame, Crop) == isinstance(frame, Crop) for view, frame in zip(both, frames, strict=True))
    assert all(view.frame == frame for view, frame in zip(both, frames, strict=True) if frame is not None)
    assert {type(view.frame) for view in both} == {Crop, ZoomOut, type(None)}
    assert {view.flip_vertical for view in both} == {True, False}


def test_augmented_views_are_the_same_on_any_machine() -> None:
    spec = spec_with(
        mosaic=0.4, crop=0.5, zoom_out=0.7, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, flip_vertical=0.2
    )
    frames = [train_view(image, 3, 1, spec).frame for image in (0, 1, 2, 6)]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 50, 4), dtype=np.uint8)
    change = train_view(5, 3, 1, spec).colour
    assert change is not None
    box, changed = np.array([[100, 200, 180, 300]], np.float32), "views changed: teacher caches and resumed runs would differ"
    tiles = [
        frame.tiles([(480, 640)] * (4 if isinstance(frame, Mosaic) else 1), (30, 40), box, 0.3)[0]
        for frame in frames
        if frame is not None
    ]
    assert [tuple(tile.source) for tile in tiles] == [
        (0, 114, 480, 520), (86, 85, 371, 495), (19, 0, 427, 640), (0, 0, 480, 640),
    ], changed  # fmt: skip
    assert [tuple(tile.target) for tile in tiles] == [(0, 0, 12, 13), (0, 0, 30, 40), (0, 0, 16, 24), (11, 19, 15, 21)], changed
    assert hashlib.sha256(change(image).tobytes()).hexdigest()[:16] == "112d4661a412b1fa", changed


def test_colours_as_torchvision_changes_them() -> None:
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    assert np.array_equal(ColourChange()(pixels), pixels)
    for factor in (0.6, 1.3):
        for name in ("brightness", "contrast", "saturation"):
            own = ColourChange(**{name: factor})(pixels).astype(int)
            theirs = getattr(operators, f"adjust_{name}")(image, factor).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(own - theirs).max() <= 1, name


def test_colours_are_exact_whatever_order_a_machine_adds_in() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    change = ColourChange(1.37, 0.71, 1.6, 0.12)
    matrix, offset = change._matrix(), change._offset(pixels)
    coefficients = [[Fraction(float(share)) for share in shares] for shares in matrix]
    for pixel, changed in zip(pixels.reshape(-1, 3).tolist(), change(pixels).reshape(-1, 3).tolist(), strict=True):
        for shares, value in zip(coefficients, changed, strict=True):
            exact = sum(share * own for share, own in zip(shares, pixel, strict=True)) + Fraction(float(offset))
            assert value == int(min(255, max(0, exact)))


def test_hue_turns_colours_and_leaves_grey() -> None:
    grey = np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 3).reshape(5, 5, 3)
    assert np.abs(ColourChange(hue=0.2)(grey).astype(int) - grey).max() <= 1
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 200
    for turn, strongest in ((1 / 3, 1), (-1 / 3, 2)):
        assert np.abs(ColourChange(hue=turn)(red)[0, 0].astype(int) - 200 * (np.arange(3) == strongest)).max() <= 1


def test_epochs_without_mosaics_have_views_of_their_own() -> None:
    spec = spec_with(mosaic=1.0, mosaic_epochs=3)
    assert [view_number(epoch, spec) for epoch in range(5)] == [0, 1, 2, 3, 4]
    assert [shows_mosaics(number, spec) for number in range(5)] == [True] * 3 + [False] * 2
    assert [isinstance(train_view(1, number, 0, spec).frame, Mosaic) for number in range(5)] == [True] * 3 + [False] * 2
    cached = spec_with(views=2, mosaic=1.0, mosaic_epochs=3)
    assert [view_number(epoch, cached) for epoch in range(6)] == [0, 1, 0, 2, 3, 2]
    assert [shows_mosaics(number, cached) for number in range(4)] == [True, True, False, False]
    assert distinct_views(6, cached) == 4 and distinct_views(4, cached) == 3 and distinct_views(6, spec) == 6


@pytest.mark.parametrize("mosaic_epochs", [None, 1, 3, 5])
@pytest.mark.parametrize("views", [1, 2, 4, 9])
def test_copies_of_an_image_show_views_that_a_cache_has(views: int, mosaic_epochs: int | None) -> None:
    spec = spec_with(views=views, sampling="repeat_factor", mosaic=0.5, mosaic_epochs=mosaic_epochs)
    numbers = {epoch: [view_number(epoch, spec, copy) for copy in range(12)] for epoch in range(7)}
    assert {number for own in numbers.values() for number in own} == set(range(distinct_views(7, spec)))
    for epoch, own in numbers.items():
        mosaics = mosaic_epochs is None or epoch < mosaic_epochs
        assert {shows_mosaics(number, spec) for number in own} == {mosaics}
    free = spec_with(sampling="repeat_factor", mosaic=0.5, mosaic_epochs=mosaic_epochs)
    every = [view_number(epoch, free, copy) for epoch in range(7) for copy in range(3)]
    assert len(set(every)) == len(every) and all(
        shows_mosaics(view_number(epoch, free, 2), free) == (mosaic_epochs is None or epoch < mosaic_epochs)
        for epoch in range(7)
    )


@pytest.mark.parametrize("kind", ["whole", *AUGMENTS])
def test_jpegs_that_are_decoded_smaller_show_the_same(kind: str) -> None:
    """Up to how the edges of what they show are blurred, and with boxes as exact."""
    photos = []
    for number in range(4):
        image = pixels(number, 640, 480)
        box = np.array([[60, 100, 500, 460]], np.float32)
        photos.append(Sample(number, encoded(image, quality=95), box, np.array([number]), (480, 640), Reading()))
    plain = spec_with(**AUGMENTS.get(kind, {}), min_visible=0.0)
    closest = []
    for number in range(6):
        views = [train_view(0, number, 3, spec) for spec in (plain, plain.replace({"reduced_decode": True}))]
        whole, reduced = (show(photos[: 1 + view.partners], view) for view in views)
        assert reduced[0].shape == whole[0].shape and np.array_equal(reduced[2], whole[2])
        np.testing.assert_allclose(reduced[1], whole[1], atol=1.0 if kind in ("crop", "mosaic") else 0)
        difference = np.abs(reduced[0].astype(int) - whole[0].astype(int))
        assert difference.mean() < 3
        closest.append(difference.max() > 0)
    assert any(closest), "it was decoded otherwise"
    sizes = [photos[0].pixels(least).shape[1:] for least in (None, (241, 100), (240, 320), (150, 100), (60, 80), (1, 1))]
    assert sizes == [(480, 640), (480, 640), (240, 320), (180, 240), (60, 80), (60, 80)]
