"""Draw the quickstart's synthetic data set: real JPEGs and COCO JSON, determined by the seed, in a few seconds.

Images show shapes of eight classes (``drawn_shapes.py``) with log-uniform sizes, tilted, of any colour, overlapping, cut off
at the border, on textured backgrounds with distractors, and crossed by thin lines. Boxes are tight around the visible part.

Category ids have gaps on purpose: code that forgets to map them gets an AP of 0 instead of a plausible one.
"""

from __future__ import annotations

import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from headkd_ray.data.drawn_shapes import SHAPES, Pen
from headkd_ray.data.rng import key_bits
from headkd_ray.storage import Folder

Colour = tuple[int, int, int]

CATEGORY_IDS = tuple(7 * label + 3 for label in range(len(SHAPES)))
SIDES = (120, 152)
"""Range of an image's sides, in pixels."""
OBJECTS = (3, 6)
"""Range of the number of objects per image."""
DIAMETERS = (32.0, 140.0)
"""Range of an object's diameter, in pixels."""
VISIBLE = 0.75
"""Smallest share of an object that stays visible."""
TILT = math.pi / 18
"""Largest rotation of an object in either direction, in radians."""
OVERSAMPLE = 4
"""Masks are drawn this many times larger and averaged down."""
CONTRAST = 120
"""Smallest difference, in at least one of R, G, B, between an object's colour and the background beneath it."""
NOISE = 5
"""Amplitude of the pixel noise."""
HAZE = 0.5
"""Share of a uniform grey in the background, so that objects stand out."""
QUALITY = 90
"""JPEG quality."""


@dataclass(frozen=True)
class Drawn:
    """The paths of a data set."""

    images: Path
    train: Path
    """COCO JSON of the training split."""
    val: Path
    """COCO JSON of the validation split."""


def draw_dataset(folder: str | Path, *, train: int = 800, val: int = 200, seed: int = 0) -> Drawn:
    """Draw ``train`` + ``val`` images into ``folder``/images, with ``folder``/train.json and val.json.

    A data set that is already complete in the folder, with the same arguments, is kept.
    """
    draw_splits(Folder.open(folder), train=train, val=val, seed=seed)
    folder = Path(folder)
    return Drawn(folder / "images", folder / "train.json", folder / "val.json")


def draw_splits(folder: Folder, *, train: int = 800, val: int = 200, seed: int = 0) -> None:
    """Draw the same data set as ``draw_dataset`` into a folder on any filesystem."""
    for name, count, first_id in (("train", train, 1), ("val", val, 1_000_001)):
        info = {"description": f"drawn by headkd_ray.data.synthetic, split {name}, {count} images, seed {seed}, version 3"}
        if _info(folder, f"{name}.json") != info:
            _draw_split(folder, name, count, first_id, seed, info)


def _info(folder: Folder, file: str) -> Any:
    """Return the ``info`` of a COCO JSON; None if the file is missing or damaged."""
    try:
        content = json.loads(folder.read(file))
    except (FileNotFoundError, ValueError):
        return None
    return content.get("info") if isinstance(content, dict) else None


def _draw_split(folder: Folder, name: str, count: int, first_id: int, seed: int, info: dict[str, str]) -> None:
    images = folder / "images"
    images.create()

    def drawn(index: int) -> tuple[str, Scene]:
        scene, file_name = draw_scene(seed, name, index), f"{name}_{index:05d}.jpg"
        images.write(file_name, scene.jpeg)
        return file_name, scene

    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and NumPy release the GIL in most of the work
        for index, (file_name, scene) in enumerate(pool.map(drawn, range(count))):
            image_id = first_id + 3 * index
            records.append({"id": image_id, "file_name": file_name, "width": scene.width, "height": scene.height})
            for label, (x, y, width, height) in scene.objects:
                annotations.append(
                    {
                        "id": len(annotations) + first_id,
                        "image_id": image_id,
                        "category_id": CATEGORY_IDS[label],
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": id_, "name": name} for id_, name in zip(CATEGORY_IDS, SHAPES, strict=True)]
    content = {"info": info, "images": records, "annotations": annotations, "categories": categories}
    folder.write(f"{name}.json", json.dumps(content).encode())  # last: a split without its JSON is not finished


@dataclass(frozen=True)
class Scene:
    """A drawn image and its objects."""

    jpeg: bytes
    width: int
    height: int
    objects: tuple[tuple[int, tuple[int, int, int, int]], ...]
    """(label, (x, y, width, height)) of each object, in pixels."""


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draw image ``index`` of a split, as a function of the arguments (and of the versions of NumPy and Pillow)."""
    rng = np.random.Generator(np.random.Philox(key=key_bits("scene", seed, split, index)))
    width, height = (int(rng.integers(SIDES[0], SIDES[1] + 1)) for _ in range(2))
    canvas = _background(rng, width, height)
    _distractors(rng, canvas)
    owner = np.full((height, width), -1, dtype=np.int64)  # number of the object that each pixel shows
    pixels: list[int] = []  # area of each object before anything covered it
    labels: list[int] = []
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        for _ in range(8):  # attempts to find a place where enough of every object stays visible
            label = int(rng.integers(len(SHAPES)))
            mask = _mask(rng, label)
            left, top = (int(rng.integers(-mask.width // 3, side - 2 * mask.width // 3)) for side in (width, height))
            inside = np.asarray(mask) > 127
            candidate = _cover(owner, inside, left, top, len(labels))
            whole = np.array([*pixels, inside.sum()])
            visible = np.bincount(candidate[candidate >= 0], minlength=len(whole))
            if (visible >= VISIBLE * whole).all():
                _paint(rng, canvas, mask, left, top)
                owner = candidate
                pixels.append(int(inside.sum()))
                labels.append(label)
                break
    _wires(rng, canvas)
    noisy = np.asarray(canvas, dtype=np.int16) + rng.integers(-NOISE, NOISE + 1, (height, width, 1), dtype=np.int16)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=QUALITY)
    objects = tuple((label, _extent(owner == number)) for number, label in enumerate(labels))
    return Scene(encoded.getvalue(), width, height, objects)


def _mask(rng: np.random.Generator, label: int) -> Image.Image:
    """Draw a shape at a random size and angle, slightly squeezed, as a mask of 8-bit coverage."""
    low, high = DIAMETERS
    diameter = low * (high / low) ** rng.random()
    pen = Pen(int(OVERSAMPLE * diameter), rng.uniform(-TILT, TILT))
    list(SHAPES.values())[label](pen)
    squeeze = rng.uniform(0.8, 1.0)
    return pen.mask.resize((max(8, round(diameter * squeeze)), max(8, round(diameter))), Image.Resampling.BOX)


def _cover(owner: NDArray[np.int64], inside: NDArray[np.bool_], left: int, top: int, number: int) -> NDArray[np.int64]:
    """Return ``owner`` after object ``number`` has been placed on top."""
    result = owner.copy()
    height, width = owner.shape
    y, x = max(top, 0), max(left, 0)
    seen = inside[y - top : height - top, x - left : width - left]
    result[y : y + seen.shape[0], x : x + seen.shape[1]][seen] = number
    return result


def _extent(shown: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the tight (x, y, width, height) around the true pixels."""
    columns, rows = np.flatnonzero(shown.any(axis=0)), np.flatnonzero(shown.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _texture(rng: np.random.Generator, width: int, height: int, cells: int) -> Image.Image:
    """Draw a smooth texture by interpolating ``cells`` x ``cells`` random colours."""
    small = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a hazy background with blotches at two scales and often stripes."""
    coarse = _texture(rng, width, height, int(rng.integers(2, 5)))
    fine = _texture(rng, width, height, int(rng.integers(8, 40)))
    canvas = Image.blend(coarse, fine, rng.uniform(0.15, 0.5))
    if rng.random() < 0.5:
        y, x = np.mgrid[:height, :width]
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 24)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
        stripes = Image.fromarray((127 + 127 * wave).astype(np.uint8)).convert("RGB")
        canvas = Image.blend(canvas, stripes, rng.uniform(0.1, 0.3))
    shade = int(rng.integers(60, 196))
    return Image.blend(canvas, Image.new("RGB", canvas.size, (shade, shade, shade)), HAZE)


def _distractors(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Draw irregular polygons, bars and arcs that belong to no class, beneath the objects."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        radius = rng.uniform(5, 30)
        kind = rng.integers(3)
        if kind == 0:
            angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(5, 9))))
            radii = radius * rng.uniform(0.4, 1.0, len(angles))
            draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)], _colour(rng))
        elif kind == 1:
            a = rng.uniform(0, math.pi)
            end = (x + 2 * radius * math.cos(a), y + 2 * radius * math.sin(a))
            draw.line([(x, y), end], _colour(rng), int(rng.integers(2, 10)))
        else:
            start = rng.uniform(0, 360)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + rng.uniform(60, 200), _colour(rng), int(rng.integers(2, 6)))


def _paint(rng: np.random.Generator, canvas: Image.Image, mask: Image.Image, left: int, top: int) -> None:
    """Fill the mask with a texture whose main colour differs from the background beneath it."""
    box = (left, top, left + mask.width, top + mask.height)
    beneath = np.asarray(canvas.crop(box)).reshape(-1, 3).mean(axis=0)
    colour = _colour(rng)
    while np.abs(beneath - colour).max() < CONTRAST:
        colour = _colour(rng)
    fill = Image.blend(
        Image.new("RGB", mask.size, colour), _texture(rng, *mask.size, int(rng.integers(2, 6))), rng.uniform(0, 0.3)
    )
    canvas.paste(fill, (left, top), mask)


def _wires(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Draw thin lines over everything."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4))):
        ends = [(rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)) for _ in range(2)]
        draw.line(ends, _colour(rng), int(rng.integers(1, 3)))
