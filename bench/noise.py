"""Write prepared splits of noise for measurements in which only sizes matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headkd_ray.data.packing import prepare_split

CLASSES = 80


def write_split(folder: Path, name: str, images: int, side: int) -> str:
    """Write a prepared split of noise images with 8 random boxes each, and return its folder."""
    rng = np.random.default_rng(0)
    photos = folder / f"{name}_images"
    photos.mkdir()
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(photos / f"{i}.jpg")
        for _ in range(8):
            w, h = rng.integers(side // 16, side // 2, 2).tolist()
            x, y = int(rng.integers(0, side - w)), int(rng.integers(0, side - h))
            box = {"id": len(annotations) + 1, "image_id": i, "category_id": int(rng.integers(1, CLASSES + 1))}
            annotations.append({**box, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": side, "height": side} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, CLASSES + 1)],
    }
    (folder / f"{name}.json").write_text(json.dumps(coco))
    prepare_split(str(folder / f"{name}.json"), str(photos), str(folder / name))
    return str(folder / name)
