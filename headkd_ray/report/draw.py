"""Draw detections on images."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from headkd_ray.report.fonts import Run, runs

TILE = 384
"""Side of a picture in a contact sheet, in pixels."""
LEAST_LETTERS, LETTERS_A_SIDE = 13, 60
"""Size of a caption's font: its minimum in pixels, and how many times it fits into the longer side of the image."""

Rectangle = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, without the last column and row."""
Scores = float | Mapping[int, float]
"""A least score, or one for each category id."""
Colour = tuple[int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def draw(image: Tensor, boxes: Tensor, labels: Tensor, captions: Sequence[str], least_side: int = 0) -> Tensor:
    """Draw boxes with captions on an image, each class in its own colour, with the first boxes on top.

    Lines have a black outline and captions a background, so that both are visible on any image.

    Args:
        image: uint8 (3, H, W), RGB.
        boxes: float (N, 4), xyxy, pixels of ``image``.
        labels: int64 (N,).
        captions: N strings; none is drawn if the string is empty or no font has its letters.
        least_side: enlarge the image first until its longer side has this many pixels.
    Returns:
        uint8 (3, H', W'), which is (3, H, W) unless enlarged.
    """
    factor = max(1.0, least_side / max(image.shape[-2:]))
    picture = to_pil_image(image)
    if factor > 1:
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    corners = [(round(x1), round(y1), round(x2), round(y2)) for x1, y1, x2, y2 in (boxes * factor).tolist()]
    colours = [colour(label) for label in labels.tolist()]
    width = max(2, round(max(picture.size) / 250))
    for (x1, y1, x2, y2), shade in reversed(list(zip(corners, colours, strict=True))):
        for grown, outline, thickness in ((1, BLACK, width + 2), (0, shade, width)):
            right, bottom = max(x1, x2) + grown, max(y1, y2) + grown
            pen.rectangle((x1 - grown, y1 - grown, right, bottom), outline=outline, width=thickness)
    size = max(LEAST_LETTERS, round(max(picture.size) / LETTERS_A_SIDE))
    placed: list[tuple[Rectangle, list[Run], Colour]] = []
    for corner, shade, caption in zip(corners, colours, captions, strict=True):
        pieces = runs(caption, size) if caption else None
        if pieces is not None:
            placed.append((_place(corner, _extent(pieces, size), picture.size, [old for old, *_ in placed]), pieces, shade))
    for ground, pieces, shade in reversed(placed):
        _write(pen, ground, pieces, shade, size)
    return pil_to_tensor(picture)


def _extent(pieces: Sequence[Run], size: int) -> tuple[int, int]:
    """Return the width and height of a caption's background."""
    return round(sum(font.getlength(text) for text, font in pieces)) + size // 2, round(size * 1.35)


def _place(box: Rectangle, extent: tuple[int, int], size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Place a caption above, below or inside its box, within the image and, if possible, not on another caption."""
    x1, y1, x2, y2 = box
    width, height = extent
    lefts = [max(0, min(x, size[0] - width)) for x in (x1, x2 - width)]
    tops = [y for y in (y1 - height, y2, y1, y2 - height) if 0 <= y <= size[1] - height] or [0]
    places = [(x, y, x + width, y + height) for y in tops for x in lefts]
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _write(pen: ImageDraw.ImageDraw, ground: Rectangle, pieces: Sequence[Run], shade: Colour, size: int) -> None:
    """Draw a caption on its background, in black or white, whichever is more legible."""
    left, top, right, bottom = ground
    pen.rectangle((left, top, right - 1, bottom - 1), fill=shade, outline=BLACK)
    ink = BLACK if brightness(shade) > 0.18 else WHITE
    x: float = left + size // 4
    for text, font in pieces:
        pen.text((x, bottom - round(size * 0.35)), text, fill=ink, font=font, anchor="ls")
        x += font.getlength(text)


def draw_found(
    image: Tensor, found: Sequence[Mapping[str, Any]], names: Mapping[int, str], score: Scores, least_side: int = 0
) -> Tensor:
    """Draw an image's COCO results of at least ``score``; ``names``: class names by category id, in the class order."""
    least = score if isinstance(score, Mapping) else dict.fromkeys(names, score)
    shown = [entry for entry in found if entry["score"] >= least[entry["category_id"]]]
    boxes = torch.tensor([entry["bbox"] for entry in shown]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label_of = {category: label for label, category in enumerate(names)}
    labels = torch.tensor([label_of[entry["category_id"]] for entry in shown], dtype=torch.int64)
    captions = [f"{names[entry['category_id']]} {entry['score']:.2f}" for entry in shown]
    return draw(image, boxes, labels, captions, least_side)


def colour(label: int) -> Colour:
    """Return a saturated colour, unlike those of neighbouring labels: hues step by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def brightness(shade: Colour) -> float:
    """Return the relative luminance as defined by WCAG, 0 to 1; above 0.18, black text is more legible than white."""
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in shade]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def jpeg(image: Tensor) -> bytes:
    """Encode an image, uint8 (3, H, W), RGB, as a JPEG file. Raises OSError or ValueError if JPEG cannot represent it."""
    encoded = io.BytesIO()
    to_pil_image(image).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def contact_sheet(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], side: int = TILE) -> bytes:
    """Return a PNG file with a grid of images, one column per title, each scaled to ``side`` pixels.

    Args:
        rows: each has as many uint8 (3, H, W) images as there are titles.
    """
    gap, header = max(6, side // 48), max(24, side // 10)
    sheet = Image.new("RGB", ((side + gap) * len(titles) + gap, (side + gap) * len(rows) + gap + header), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left, x = gap + column * (side + gap), 0.0
        for text, font in runs(title, round(header * 0.55)) or ():
            pen.text((left + x, header * 0.75), text, fill="black", font=font, anchor="ls")
            x += font.getlength(text)
        for row, images in enumerate(rows):
            tile = ImageOps.contain(to_pil_image(images[column]), (side, side))
            across, down = (side - tile.width) // 2, (side - tile.height) // 2
            sheet.paste(tile, (left + across, header + gap + row * (side + gap) + down))
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()
