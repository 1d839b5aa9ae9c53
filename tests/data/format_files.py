"""Write small data sets in YOLO's and Pascal VOC's formats to disk, sound unless a test damages them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.data.coco_files import encoded, pixels

SIZES = ((40, 30), (24, 36), (32, 32))
"""Width and height of the photos, in turn."""


def write_photo(path: Path, number: int, data: bytes | None = None) -> tuple[int, int]:
    """Write photo ``number``, or ``data``, and return the photo's width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or encoded(pixels(number, *SIZES[number % 3])))
    return SIZES[number % 3]


def make_yolo(
    folder: Path, labels: Sequence[str | bytes | None], *, yaml: str = "train: images/train\nnames: [ant, bee]\n"
) -> str:
    """Write a data.yaml, and a photo ``images/train/{number}.jpg`` for each text of a label file; None = there is none.

    Returns the path of the data.yaml.
    """
    (folder / "labels" / "train").mkdir(parents=True)
    for number, text in enumerate(labels):
        write_photo(folder / "images" / "train" / f"{number}.jpg", number)
        if text is not None:
            content = text if isinstance(text, bytes) else text.encode()
            (folder / "labels" / "train" / f"{number}.txt").write_bytes(content)
    (folder / "data.yaml").write_text(yaml)
    return str(folder / "data.yaml")


def voc_object(name: str, *corners: float, **tags: Any) -> str:
    """Return the XML of an object with a box xmin, ymin, xmax, ymax."""
    box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    flags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags.items())
    return f"<object><name>{name}</name><pose>Unspecified</pose>{flags}<bndbox>{box}</bndbox></object>"


def voc_xml(number: int, *objects: str, file_name: str | None = None, size: tuple[int, int] | None = None) -> str:
    """Return the XML of photo ``number``."""
    width, height = size or SIZES[number % 3]
    sides = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    name = f"{number}.jpg" if file_name is None else file_name
    return f"<annotation><folder>x</folder><filename>{name}</filename>{sides}{''.join(objects)}</annotation>"


def make_voc(folder: Path, xml: Sequence[str]) -> str:
    """Write ``JPEGImages/{number}.jpg`` and ``Annotations/{number}.xml`` for each text, and return the folder's path."""
    (folder / "Annotations").mkdir(parents=True)
    for number, text in enumerate(xml):
        write_photo(folder / "JPEGImages" / f"{number}.jpg", number)
        (folder / "Annotations" / f"{number}.xml").write_text(text)
    return str(folder)


def yolo_of_coco(folder: Path, splits: Mapping[str, tuple[Path, Path]]) -> str:
    """Write COCO splits, each a JSON and the folder of its images, as Roboflow lays YOLO out; return the data.yaml's path."""
    keys: dict[str, Any] = {}
    for name, (source, photos) in splits.items():
        coco = json.loads(source.read_text())
        images, labels = (folder / {"val": "valid"}.get(name, name) / part for part in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir()
        numbers = {category["id"]: number for number, category in enumerate(coco["categories"])}
        for image in coco["images"]:
            lines = [
                f"{numbers[each['category_id']]} {(x + w / 2) / image['width']} {(y + h / 2) / image['height']} "
                f"{w / image['width']} {h / image['height']}"
                for each in coco["annotations"]
                if each["image_id"] == image["id"]
                for x, y, w, h in [each["bbox"]]
            ]
            shutil.copy(photos / image["file_name"], images)
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
        keys[name] = f"{images.parent.name}/images"
        keys["names"] = [category["name"] for category in coco["categories"]]
    (folder / "data.yaml").write_text(yaml.safe_dump(keys))
    return str(folder / "data.yaml")
