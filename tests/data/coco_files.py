"""Write a small COCO data set to disk, sound unless a test damages it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 7, "name": "ant"}, {"id": 31, "name": "moth"}]
"""Categories with sparse ids, not in order."""


def pixels(number: int, width: int, height: int) -> Image.Image:
    """Return a smooth random image."""
    small = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """Encode the image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(image, kind, exif=exif.tobytes())


def png16(values: NDArray[np.uint16]) -> bytes:
    """Encode 16-bit values (H, W, channels) as a PNG; Pillow can only write grey ones."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@dataclass
class CocoFiles:
    """A data set whose JSON content is ``data``; change it, then call ``save``."""

    folder: Path
    data: dict[str, Any]

    @property
    def json(self) -> str:
        return str(self.folder / "annotations.json")

    @property
    def images(self) -> str:
        return str(self.folder / "images")

    @property
    def out(self) -> str:
        return str(self.folder / "out")

    def save(self) -> CocoFiles:
        (self.folder / "annotations.json").write_text(json.dumps(self.data))
        return self


def make_coco(folder: Path, images: int = 12) -> CocoFiles:
    """Write images of mixed aspect in three formats; image i has i % 3 boxes and, every fourth, a crowd."""
    (folder / "images" / "deep").mkdir(parents=True)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": [dict(category) for category in CATEGORIES]}
    for number in range(images):
        width, height = ((40, 30), (24, 36), (33, 33))[number % 3]
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
        name = f"deep/{number}.{suffix}" if number % 2 else f"{number}.{suffix}"
        (folder / "images" / name).write_bytes(encoded(pixels(number, width, height), kind))
        image_id = 500 - 7 * number
        data["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for k in range(number % 3 + (number % 4 == 0)):
            data["annotations"].append(
                {
                    "id": 1000 - len(data["annotations"]),
                    "image_id": image_id,
                    "category_id": CATEGORIES[(number + k) % 3]["id"],
                    "bbox": [2.5 + k, 3.0, 10.25, 8.0],
                    "area": 60.0,
                    "iscrowd": int(k == number % 3),
                    "segmentation": [[1, 2, 3, 4, 5, 6]],
                }
            )
    return CocoFiles(folder, data).save()


def spread_boxes(data: dict[str, Any]) -> None:
    """Give every annotation a box somewhere in its image, instead of one near the corner."""
    images = {image["id"]: image for image in data["images"]}
    random = np.random.default_rng(1)
    for annotation in data["annotations"]:
        image = images[annotation["image_id"]]
        size = np.array([image["width"], image["height"]])
        box = random.uniform(4, 12, 2)
        annotation.update(bbox=np.concatenate([random.uniform(0, size - box), box]).round(3).tolist(), area=10)


def exif_photo(files: CocoFiles, number: int, orientation: int, *, upright: bool = False) -> Image.Image:
    """Give image ``number`` an EXIF orientation and return the upright image.

    With ``upright`` the JSON has the upright image's size.
    """
    record = files.data["images"][number]
    suffix = record["file_name"].rsplit(".")[1]
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
    data = oriented(pixels(number, record["width"], record["height"]), orientation, kind)
    (Path(files.images) / record["file_name"]).write_bytes(data)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if upright:
        record.update(width=shown.width, height=shown.height)
        for annotation in files.data["annotations"]:
            if annotation["image_id"] == record["id"]:
                annotation["bbox"] = [2, 3, 10, 8]
    files.save()
    return shown


def spoil_images(shard: Path, row_group: int) -> None:
    """Replace a row group's images by other bytes, in a sound Parquet file."""
    table = pq.read_table(shard)
    field = table.schema.field("image")
    images = pa.array([image.as_py()[::-1] for image in table["image"]], field.type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), field, images), shard, row_group_size=row_group)
