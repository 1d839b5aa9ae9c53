"""A checked split: its images and annotations in columns, so that 25 million boxes fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

PIECE = 10_000
"""Records that are written at a time."""


@dataclass(frozen=True)
class ImageRecord:
    """An image of a split."""

    id: int
    file_name: str
    """Path relative to the images folder, and inside it."""
    width: int
    """Width in pixels, as the annotations have it: of the stored or, if an EXIF orientation turns it, of the upright image."""
    height: int


class Images(Sequence[ImageRecord]):
    """Image records, stored in columns."""

    def __init__(self, ids: NDArray[np.int64], names: list[str], sizes: NDArray[np.int32]) -> None:
        """``sizes``: int32 (n, 2), width and height in pixels; 0 where they are not known yet."""
        assert len(ids) == len(names) == len(sizes)
        self.ids, self.names, self.sizes = ids, names, sizes

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, at: slice) -> Images: ...
    def __getitem__(self, at: int | slice) -> ImageRecord | Images:
        """Return one record; a slice gives several."""
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        width, height = self.sizes[at].tolist()
        return ImageRecord(int(self.ids[at]), self.names[at], width, height)

    def take(self, rows: Iterable[int]) -> Images:
        """Return the records at ``rows``, in that order."""
        rows = np.fromiter(rows, dtype=np.int64)
        return Images(self.ids[rows], [self.names[row] for row in rows.tolist()], self.sizes[rows])


@dataclass(frozen=True, eq=False)
class CheckedSplit:
    """A checked split: images by ascending id, annotations by image, then by annotation id, categories by ascending id."""

    images: Images
    category_ids: tuple[int, ...]
    """COCO category id of each contiguous label."""
    classes: tuple[str, ...]
    """Name of each contiguous label."""
    first: NDArray[np.int64]
    """int64 (images + 1,): annotations of image i are first[i] : first[i + 1]."""
    annotation_id: NDArray[np.int64]
    label: NDArray[np.int32]
    """Contiguous label of each annotation, int32 (n,)."""
    bbox: NDArray[np.float64]
    """float64 (n, 4): x, y, width, height as in the source (or as repaired by --fix-boxes), pixels."""
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    """Crowds and ignored annotations: not trained on; in evaluation a detection there is neither right nor wrong."""
    fixes: tuple[str, ...] = ()
    """What --fix-boxes changed, one line each."""
    warnings: tuple[str, ...] = ()
    """Interpretations of the source that the user should know about, one sentence each."""
    upright: bool = False
    """Whether boxes are of the upright image where sizes do not show it."""
    written_in: str = "JSON"
    """What holds the annotations, for messages: remove the image from the JSON."""

    def boxes(self, image: int) -> NDArray[np.float32]:
        """Return the image's boxes, clipped to the image: float32 (n, 4), x1 y1 x2 y2 in pixels."""
        bbox = self.bbox[self.first[image] : self.first[image + 1]]
        corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
        return np.clip(corners, 0, np.tile(self.images.sizes[image], 2)).astype(np.float32)

    def digest(self) -> str:
        """Return the SHA-256 of everything that enters the shards except the images' bytes."""
        digest = hashlib.sha256()
        digest.update(b"((")
        for number, record in enumerate(self.images):  # in this form since the first version, when it was the repr of a tuple
            comma = ", " if number else ""
            size = f"width={record.width}, height={record.height}"
            digest.update(f"{comma}CocoImage(id={record.id}, file_name={record.file_name!r}, {size})".encode())
        digest.update(b",), " if len(self.images) == 1 else b"), ")
        digest.update(f"{self.category_ids!r}, {self.classes!r})".encode())
        for column in (self.first, self.annotation_id, self.label, self.bbox, self.area, self.crowd):
            for start in range(0, len(column), PIECE):
                piece = column[start : start + PIECE]
                digest.update((piece.astype(np.int64) if column is self.label else np.ascontiguousarray(piece)).tobytes())
        return digest.hexdigest()

    def subset(self, rows: NDArray[np.int64]) -> CheckedSplit:
        """Return the split of the images at ``rows``, ascending, with the same classes."""
        counts = np.diff(self.first)[rows]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        own = np.repeat(self.first[:-1][rows] - first[:-1], counts) + np.arange(first[-1])
        columns = {name: getattr(self, name)[own] for name in ("annotation_id", "label", "bbox", "area", "crowd")}
        return replace(self, images=self.images.take(rows.tolist()), first=first, **columns)

    def coco_json(self) -> Iterator[bytes]:
        """Yield the COCO JSON, in pieces: with original ids, and without segmentations."""
        images = ({"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in self.images)
        categories = ({"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True))
        lists = {"images": images, "categories": categories, "annotations": self._annotations()}
        for number, (name, records) in enumerate(lists.items()):
            yield f'{"," if number else "{"}"{name}":['.encode()
            yield from _joined(records)
            yield b"]"
        yield b"}"

    def _annotations(self) -> Iterator[dict[str, Any]]:
        """Yield the COCO record of each annotation."""
        image_of = np.repeat(self.images.ids, np.diff(self.first))
        for start in range(0, len(self.label), PIECE):
            piece = slice(start, start + PIECE)
            columns = (self.annotation_id, image_of, self.label, self.bbox, self.area, self.crowd)
            for id_, image, label, bbox, area, crowd in zip(*(column[piece].tolist() for column in columns), strict=True):
                yield {
                    "id": id_,
                    "image_id": image,
                    "category_id": self.category_ids[label],
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(crowd),
                }

    def ground_truth(self) -> dict[str, Any]:
        """Return the COCO dictionary for evaluation, with original ids and without segmentations."""
        truth: dict[str, Any] = json.loads(b"".join(self.coco_json()))
        return truth


def _joined(records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Yield the records as JSON, with commas between them, many at a time."""
    some: list[dict[str, Any]] = []
    comma = b""
    for record in records:
        some.append(record)
        if len(some) == PIECE:
            yield comma + json.dumps(some, separators=(",", ":"))[1:-1].encode()
            some, comma = [], b","
    if some:
        yield comma + json.dumps(some, separators=(",", ":"))[1:-1].encode()
