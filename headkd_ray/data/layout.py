"""Decide which image goes into which shard, and make the content of each file of a prepared split."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.meta import Meta, ShardFile
from headkd_ray.data.photos import PhotoOptions, Tally
from headkd_ray.data.rng import key_permutation
from headkd_ray.data.shards import INDEX_SCHEMA, SHARD_SCHEMA

LAYOUT = 1
"""Version of the shards' content, which invalidates older shards."""


@dataclass(frozen=True)
class Layout:
    """The assignment of a split's images to shards, and the content of its files."""

    split: CheckedSplit
    shard_images: int
    """Images per shard file."""
    row_group: int
    """Images per row group, the smallest unit that is read."""
    options: PhotoOptions
    """How the images are checked and read."""

    @cached_property
    def recipe(self) -> str:
        """SHA-256 of the annotations, the layout and the options; only shards with the same value belong together."""
        parts = [LAYOUT, self.shard_images, self.row_group, self.split.digest()]
        options = {"exif": self.options.exif, "range": self.options.value_range}
        parts += [f"{name}={value}" for name, value in options.items() if value is not None]
        return _sha256("/".join(map(str, parts)))

    def fingerprint(self, upright: bool) -> str:
        """Return the SHA-256 of the recipe and of ``Reading.upright``, which the images themselves decide."""
        return _sha256(f"{self.recipe}/upright") if upright else self.recipe

    def shards(self) -> list[tuple[str, list[int]]]:
        """Return the name and the images of each shard."""
        # Shuffled once, here, so that each row group is a random handful of images.
        order = key_permutation(len(self.split.images), "prepare").tolist()
        starts = range(0, len(order), self.shard_images)
        parts = [order[start : start + self.shard_images] for start in starts]
        return [(f"shard-{number:05d}.parquet", part) for number, part in enumerate(parts)]

    def rows(self, images: Iterable[int], encoded: Iterable[bytes]) -> pa.Table:
        """Return the shard's rows for ``images``, with their ``encoded`` bytes."""
        split, rows = self.split, []
        for image, data in zip(images, encoded, strict=True):
            record, where = split.images[image], slice(split.first[image], split.first[image + 1])
            rows.append(
                {
                    "image_id": record.id,
                    "file_name": record.file_name,
                    "width": record.width,
                    "height": record.height,
                    "image": data,
                    "boxes": split.boxes(image).tolist(),
                    "labels": split.label[where].tolist(),
                    "crowd": split.crowd[where].tolist(),
                    "annotation_ids": split.annotation_id[where].tolist(),
                    "areas": split.area[where].tolist(),
                }
            )
        return pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)

    def index(self) -> bytes:
        """Return the content of index.parquet."""
        parts = [members for _, members in self.shards()]
        order = np.concatenate(parts)
        shard = np.repeat(np.arange(len(parts)), [len(members) for members in parts])
        row = np.concatenate([np.arange(len(members)) for members in parts])
        boxes = np.diff(np.concatenate([[0], np.cumsum(~self.split.crowd)])[self.split.first])
        images = self.split.images.take(order.tolist())
        columns = (images.ids, images.names, images.sizes[:, 0], images.sizes[:, 1], shard, row, boxes[order])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    def annotations(self) -> Iterator[bytes]:
        """Yield the content of annotations.json, in pieces."""
        return self.split.coco_json()

    def meta(self, shards: list[ShardFile], tally: Tally, photos: str) -> Meta:
        """Return the content of meta.json; ``photos`` is ``Photos.version``."""
        crowds, reading = int(self.split.crowd.sum()), tally.reading(self.options)
        return Meta(
            classes=self.split.classes,
            category_ids=self.split.category_ids,
            images=len(self.split.images),
            boxes=len(self.split.crowd) - crowds,
            crowds=crowds,
            row_group=self.row_group,
            shards=tuple(shards),
            fingerprint=self.fingerprint(reading.upright),
            fixes=self.split.fixes,
            upright=reading.upright,
            value_range=reading.value_range if tally.deep else None,
            warnings=(*self.split.warnings, *tally.warnings(self.options)),
            photos=photos,
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
