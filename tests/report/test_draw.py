"""Pictures have the right size, and boxes lie where they belong."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from headkd_ray.report.draw import brightness, colour, contact_sheet, draw, draw_found


def grey(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def test_a_box_is_drawn_on_its_border_in_its_class_s_colour() -> None:
    image = grey(100, 200)
    boxes = torch.tensor([[40.0, 30.0, 120.0, 80.0], [150.0, 10.0, 190.0, 90.0]])
    shown = draw(image, boxes, torch.tensor([0, 7]), ["", ""])
    assert shown.dtype == torch.uint8 and shown.shape == (3, 100, 200)
    assert (image == 128).all(), "the image itself is left alone"
    for box, label in zip(boxes.int().tolist(), (0, 7), strict=True):
        x1, y1, x2, y2 = box
        for y, x in ((y1, (x1 + x2) // 2), (y2, (x1 + x2) // 2), ((y1 + y2) // 2, x1), ((y1 + y2) // 2, x2)):
            assert tuple(shown[:, y, x].tolist()) == colour(label), (box, y, x)
        assert (shown[:, y1 + 5 : y2 - 5, x1 + 5 : x2 - 5] == 128).all(), "inside"
    assert (shown[:, :8, :140] == 128).all() and (shown[:, 85:, :140] == 128).all(), "outside"


def test_captions_are_drawn() -> None:
    arguments = (grey(100, 200), torch.tensor([[40.0, 30.0, 120.0, 80.0]]), torch.tensor([3]))
    assert not torch.equal(draw(*arguments, ["cat 0.93"]), draw(*arguments, [""]))


@pytest.mark.parametrize("ground", [0, 128, 255, "stripes"])
@pytest.mark.parametrize("label", range(8))
def test_captions_and_lines_are_clear_on_any_ground(ground: int | str, label: int) -> None:
    """As WCAG asks, letters have a contrast of 4.5 to their ground, and lines one of 3 to their edges or to the image."""
    image = torch.full((3, 100, 200), 0 if ground == "stripes" else int(ground), dtype=torch.uint8)
    if ground == "stripes":
        image[:, :, ::2] = 255
    shown = draw(image, torch.tensor([[40.0, 50.0, 160.0, 90.0]]), torch.tensor([label]), ["MMMMMM 0.93"])
    caption = shown[:, 36:44, 46:110].reshape(3, -1).T.tolist()
    shades = sorted({tuple(pixel) for pixel in caption if caption.count(pixel) > 20}, key=brightness)
    assert colour(label) in shades, "its ground is the class's colour"
    assert (brightness(shades[-1]) + 0.05) / (brightness(shades[0]) + 0.05) >= 4.5
    assert tuple(shown[:, 70, 40].tolist()) == tuple(shown[:, 70, 41].tolist()) == colour(label)
    assert not shown[:, 70, 39].any() and not shown[:, 70, 42].any(), "edged with black"


def test_captions_stay_within_the_image_and_off_each_other() -> None:
    corners = [[0.0, 0.0, 30.0, 20.0], [370.0, 280.0, 399.0, 299.0], [2.0, 1.0, 33.0, 22.0], [0.0, 0.0, 399.0, 299.0]]
    image = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    boxes, labels = torch.tensor(corners), torch.tensor([0, 1, 2, 3])
    shown = draw(image, boxes, labels, ["cat 0.93", "dog 0.90", "emu 0.80", "yak 0.70"])
    for label in range(4):
        alone = draw(image, boxes, labels, ["emu 0.80" if each == label else "" for each in range(4)])
        ground = ((alone == torch.tensor(colour(label), dtype=torch.uint8).view(3, 1, 1)).all(0)).sum()
        seen = ((shown == torch.tensor(colour(label), dtype=torch.uint8).view(3, 1, 1)).all(0)).sum()
        assert seen > 0.8 * ground, label


def test_nothing_to_draw() -> None:
    assert torch.equal(draw(grey(10, 20), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), []), grey(10, 20))


def test_coco_results_are_drawn_from_the_score_on() -> None:
    """bbox is x, y, width, height; the colour belongs to the class, not to its category id."""
    found = [
        {"bbox": [40.0, 30.0, 80.0, 50.0], "score": 0.5, "category_id": 90},
        {"bbox": [150.0, 10.0, 40.0, 80.0], "score": 0.49, "category_id": 3},
    ]
    shown = draw_found(grey(100, 200), found, {3: "emu", 90: "dog"}, 0.5)
    expected = draw(grey(100, 200), torch.tensor([[40.0, 30.0, 120.0, 80.0]]), torch.tensor([1]), ["dog 0.50"])
    assert torch.equal(shown, expected)
    assert torch.equal(draw_found(grey(9, 9), found, {3: "emu", 90: "dog"}, 0.6), grey(9, 9))


def test_neighbouring_classes_have_far_colours() -> None:
    colours = np.array([colour(label) for label in range(80)], dtype=int)
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 100
    assert ((colours >= 0) & (colours <= 255)).all() and len({tuple(c) for c in colours.tolist()}) > 70


def test_contact_sheet_has_a_tile_an_image_at_its_place() -> None:
    red, green, blue = (
        torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1).expand(3, *size)
        for rgb, size in (((255, 0, 0), (50, 100)), ((0, 255, 0), (100, 50)), ((0, 0, 255), (300, 300)))
    )
    png = contact_sheet([[red, green], [blue, red], [green, blue]], ["truth", "found"], side=64)
    sheet = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    gap, header = 6, 24
    assert sheet.shape == (3 * (64 + gap) + gap + header, 2 * (64 + gap) + gap, 3)

    def tile(row: int, column: int) -> np.ndarray:
        top, left = header + gap + row * (64 + gap), gap + column * (64 + gap)
        return sheet[top : top + 64, left : left + 64]

    def area(part: np.ndarray, rgb: tuple[int, int, int]) -> int:
        return int((np.abs(part - rgb).max(axis=-1) < 8).sum())

    whole, half = 64 * 64, 64 * 32
    red_, green_, blue_ = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    expected = [[(red_, half), (green_, half)], [(blue_, whole), (red_, half)], [(green_, half), (blue_, whole)]]
    for row, columns in enumerate(expected):
        for column, (rgb, pixels) in enumerate(columns):
            assert area(tile(row, column), rgb) == pixels, (row, column)
    assert (sheet[:header, :70] < 128).any() and (sheet[:header, 76:] < 128).any(), "both titles are written"
