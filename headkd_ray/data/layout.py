"""Which image goes into which shard, and the content of each file of a prepared split."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.coco import CocoSplit
from headkd_ray.data.keyed import key_permutation
from headkd_ray.data.shards import INDEX_SCHEMA, SHARD_SCHEMA, VERSION, Meta, ShardFile


@dataclass(frozen=True)
class Layout:
    """What goes where."""

    split: CocoSplit
    shard_images: int
    """Images a shard file."""
    row_group: int
    """Images a row group, the smallest unit that is read."""

    @cached_property
    def recipe(self) -> str:
        """SHA-256 of the annotations and the layout: shards of the same recipe may stand side by side."""
        return hashlib.sha256(f"{VERSION}/{self.shard_images}/{self.row_group}/{self.split.digest()}".encode()).hexdigest()

    def shards(self) -> list[tuple[str, list[int]]]:
        """Name and images of each shard."""
        # Mixed once, here, so that a row group is a random handful of images.
        order = key_permutation(len(self.split.images), "prepare").tolist()
        starts = range(0, len(order), self.shard_images)
        parts = [order[start : start + self.shard_images] for start in starts]
        return [(f"shard-{number:05d}.parquet", part) for number, part in enumerate(parts)]

    def rows(self, images: Iterable[int], encoded: Iterable[bytes]) -> pa.Table:
        """Rows of a shard."""
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
        """index.parquet."""
        split, rows = self.split, []
        for number, (_, members) in enumerate(self.shards()):
            for row, image in enumerate(members):
                record = split.images[image]
                boxes = int((~split.crowd[split.first[image] : split.first[image + 1]]).sum())
                rows.append((record.id, record.file_name, record.width, record.height, number, row, boxes))
        columns = zip(*rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    def meta(self, shards: list[ShardFile]) -> Meta:
        """meta.json."""
        crowds = int(self.split.crowd.sum())
        return Meta(
            classes=self.split.classes,
            category_ids=self.split.category_ids,
            images=len(self.split.images),
            boxes=len(self.split.crowd) - crowds,
            crowds=crowds,
            row_group=self.row_group,
            shards=tuple(shards),
            fingerprint=self.recipe,
            fixes=self.split.fixes,
            warnings=self.split.warnings,
        )
