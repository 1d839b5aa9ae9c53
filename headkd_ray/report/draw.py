"""Detections drawn on images."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

TILE = 384
"""Side of a picture in a contact sheet, pixels."""


def draw(image: Tensor, boxes: Tensor, labels: Tensor, captions: Sequence[str], least_side: int = 0) -> Tensor:
    """Boxes with captions on an image, each class in its own colour.

    Args:
        image: uint8 (3, H, W), RGB.
        boxes: float (N, 4), xyxy, pixels of ``image``.
        labels: int64 (N,).
        captions: N strings.
        least_side: enlarge the image first until its longer side has this many pixels: captions do not shrink with an image.
    Returns:
        uint8 (3, H', W'); H, W unless enlarged.
    """
    factor = max(1.0, least_side / max(image.shape[-2:]))
    if factor > 1:
        image, boxes = resize(image, [round(side * factor) for side in image.shape[-2:]]), boxes * factor
    if not len(boxes):
        return image
    thickness = max(1, round(max(image.shape[-2:]) / 300))
    colours = [colour(label) for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes, labels=list(captions), colors=colours, width=thickness)


def draw_found(
    image: Tensor, found: Sequence[Mapping[str, Any]], names: Mapping[int, str], score: float, least_side: int = 0
) -> Tensor:
    """``draw`` for one image's COCO results of at least ``score``; ``names``: class name by category id, in the class order."""
    shown = [entry for entry in found if entry["score"] >= score]
    boxes = torch.tensor([entry["bbox"] for entry in shown]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label_of = {category: label for label, category in enumerate(names)}
    labels = torch.tensor([label_of[entry["category_id"]] for entry in shown], dtype=torch.int64)
    captions = [f"{names[entry['category_id']]} {entry['score']:.2f}" for entry in shown]
    return draw(image, boxes, labels, captions, least_side)


def colour(label: int) -> tuple[int, int, int]:
    """A saturated colour, far from its neighbours': hues step by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def contact_sheet(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], path: Path, side: int = TILE) -> None:
    """Save a grid of images, a column a title, each scaled to ``side`` pixels, as a picture.

    Args:
        rows: each as many uint8 (3, H, W) images as there are titles.
    """
    gap, header = 6, 24
    sheet = Image.new("RGB", ((side + gap) * len(titles) + gap, (side + gap) * len(rows) + gap + header), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (side + gap), gap), title, fill="black")
        for row, images in enumerate(rows):
            tile = ImageOps.contain(to_pil_image(images[column]), (side, side))
            sheet.paste(tile, (gap + column * (side + gap), header + gap + row * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
