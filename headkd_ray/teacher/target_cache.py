"""A cache of soft targets: one Parquet file for each shard and view, with the same rows and row groups as the shard.

Layout of the folder::

    cache.json                             the recipe, written first
    view-00000-shard-00000.parquet ...     one row per image of the shard (SCHEMA), with 0 RoIs if it is not trained on

A file appears whole or not at all and carries the recipe's digest, so a build that was killed can go on where it stopped; every
Parquet page has a checksum, so damage is noticed wherever a file is read.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import CacheError
from headkd_ray.soft_targets import PackedTargets, ViewTargets
from headkd_ray.storage import Folder
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.cache_recipe import Recipe, digest

CARD = "cache.json"
VERSION = 1
BUILD = "run: python -m headkd_ray.cache build JOB"

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("view", pa.int32()),
        pa.field("rois", pa.int32()),  # k, at most the budget
        pa.field("boxes", pa.binary()),  # (k, 4) float32, little-endian: x1 y1 x2 y2, pixels of the view
        pa.field("truth", pa.binary()),  # (k,) uint8: 1 = ground-truth box
        pa.field("taps", pa.binary()),  # the features, as the codec packs them
        pa.field("logits", pa.binary()),  # (k, M) float16: the greatest class logits, greatest first; M is the recipe's
        pa.field("classes", pa.binary()),  # (k, M) uint16: their classes, the last = background
        pa.field("scales", pa.binary()),  # (L, D) float32 of the row group, in its first row; null in the others
    ]
)


@dataclass(frozen=True)
class Cache:
    """A cache folder and what belongs in it; implements TargetReader."""

    folder: Folder
    recipe: Recipe
    shards: ShardSet
    views: int
    codec: Codec
    budget: int

    @property
    def digest(self) -> str:
        """Digest of the recipe."""
        return digest(self.recipe)

    def file(self, shard: int, view: int) -> str:
        """Return the file name of one shard and view."""
        return f"view-{view:05d}-shard-{shard:05d}.parquet"

    def units(self) -> list[tuple[int, int]]:
        """Return the (shard, view) of every file of a complete cache, view by view."""
        return [(shard, view) for view in range(self.views) for shard in range(len(self.shards.meta.shards))]

    def missing(self) -> list[tuple[int, int]]:
        """Return the units that have no file."""
        there = set(self.folder.names())
        return [unit for unit in self.units() if self.file(*unit) not in there]

    def check(self) -> None:
        """Check that the cache has this recipe and is complete. Raises CacheError naming what differs or is missing."""
        self.check_recipe()
        missing = self.missing()
        if missing:
            total = len(self.units())
            raise CacheError(
                f"{self.folder.uri}: {total - len(missing)} of {total} files are there ({self.views} views of "
                f"{len(self.shards.meta.shards)} shards), first missing: {self.file(*missing[0])}; {BUILD}"
            )

    def check_recipe(self) -> None:
        """Raise CacheError if there is no cache, or one of another recipe (all differing fields are named)."""
        card = self.folder.named(CARD)
        try:
            found = json.loads(self.folder.read(CARD))
            theirs, version = dict(found["recipe"]), found["version"]
        except FileNotFoundError as error:
            raise CacheError(f"{self.folder.uri}: there is no cache; {BUILD}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{card}: cannot be read ({error!r}); delete the folder and {BUILD}") from error
        if version != VERSION:
            raise CacheError(f"{card}: version {version}, this headkd_ray reads {VERSION}; delete the folder and {BUILD}")
        differing = [key for key in sorted(theirs.keys() | self.recipe.keys()) if theirs.get(key) != self.recipe.get(key)]
        if differing:
            raise CacheError(
                [
                    f"{key}: the cache was built with {theirs.get(key)!r}, the job has {self.recipe.get(key)!r}"
                    for key in differing
                ],
                headline=f"{self.folder.uri}: built with other settings or data; use another teacher.cache.path, "
                f"or delete the folder and {BUILD}",
            )

    def begin(self) -> None:
        """Write ``cache.json`` into an empty folder. Raises CacheError for a cache of another recipe, or if writing fails."""
        try:
            self.folder.create()
            if self.folder.has(CARD):
                self.check_recipe()
            else:
                card = {"format": "headkd_ray soft targets", "version": VERSION, "recipe": self.recipe}
                self.folder.write(CARD, (json.dumps(card, indent=1) + "\n").encode())
        except OSError as error:
            raise CacheError(f"{self.folder.uri}: cannot be written ({error}); choose another teacher.cache.path") from error

    def check_room(self, size: int) -> None:
        """Raise CacheError if the cache's disk is known to have less than ``size`` bytes left."""
        room = self.folder.room()
        if room is not None and room < size:
            raise CacheError(
                f"{self.folder.uri}: about {size / 1e9:.2f} GB are still to be written, the disk has {room / 1e9:.2f} GB left; "
                "make room, lower distill.roi_budget or data.views, use teacher.cache.dtype int8, or choose another "
                "teacher.cache.path (what is built so far stays valid)"
            )

    def write(self, shard: int, view: int, groups: Iterable[Sequence[tuple[int, ViewTargets]]]) -> int:
        """Write one file from its row groups of (image id, targets), and return its size in bytes.

        Raises CacheError if the disk is full or read-only, or a feature cannot be stored; existing files stay valid.
        """
        name = self.file(shard, view)
        draft = f"{name}.{uuid.uuid4().hex[:8]}.tmp"  # unique, because other processes may build the same cache
        schema = SCHEMA.with_metadata({"recipe": self.digest})
        try:
            with (
                self.folder.fs.open_output_stream(self.folder.at(draft)) as stream,
                pq.ParquetWriter(
                    stream, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
                ) as writer,
            ):
                for group in groups:
                    writer.write_table(self._rows(view, group), row_group_size=max(len(group), 1))
            self.folder.fs.move(self.folder.at(draft), self.folder.at(name))
            return self.folder.size(name) or 0
        except OSError as error:
            raise CacheError(
                f"{self.folder.named(name)}: cannot be written ({error}); make room or choose another teacher.cache.path, "
                "and run the build again: it keeps the files that are complete"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                self.folder.delete(draft)

    def sweep(self) -> None:
        """Delete the partial files of killed builds. Call it only when all files are complete."""
        for name in self.folder.names():
            if name.endswith(".tmp"):
                self.folder.delete(name)

    def _rows(self, view: int, group: Sequence[tuple[int, ViewTargets]]) -> pa.Table:
        for image_id, targets in group:
            most = np.abs(targets.taps).max(initial=0.0)
            if not most <= self.codec.limit:  # also if it is NaN
                raise CacheError(
                    f"image {image_id}, view {view}: a feature of the teacher is {most}, but teacher.cache.dtype "
                    f"{self.codec.dtype} holds up to {self.codec.limit:g}; use int8, teacher.precision fp32 or another teacher"
                )
            if not np.abs(targets.top.logits).max(initial=0) <= np.finfo(np.float16).max:
                raise CacheError(
                    f"image {image_id}, view {view}: a class logit of the teacher does not fit 16 bits; "
                    "set teacher.cache.logits to 0"
                )
        scales = self.codec.scales([targets for _, targets in group])
        tops = [self.codec.pack_top(targets.top) for _, targets in group]
        rows = [
            {
                "image_id": image_id,
                "view": view,
                "rois": len(targets.boxes),
                "boxes": targets.boxes.astype("<f4").tobytes(),
                "truth": targets.truth.astype(np.uint8).tobytes(),
                "taps": self.codec.pack(targets, scales),
                "logits": logits,
                "classes": classes,
                "scales": scales.astype("<f4").tobytes() if first == 0 else None,
            }
            for first, ((image_id, targets), (logits, classes)) in enumerate(zip(group, tops, strict=True))
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def read_group(self, shard: int, group: int, rows: Sequence[int], view: int) -> list[PackedTargets]:
        """Read a row group; see TargetReader. Raises CacheError if the file is damaged or of another recipe."""
        table = self._table(shard, view, group)
        first = group * self.shards.meta.row_group
        scales = table["scales"][0].as_py()
        names = [name for name in PackedTargets._fields if name != "scales"]
        cells = ({name: table[name][row - first].as_py() for name in names} for row in rows)
        return [PackedTargets(**own, scales=scales) for own in cells]

    def _table(self, shard: int, view: int, group: int) -> pa.Table:
        name = self.file(shard, view)
        try:
            source = self.folder.fs.open_input_file(self.folder.at(name))
            with pq.ParquetFile(source, pre_buffer=self.folder.remote, page_checksum_verification=True) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    raise pa.ArrowInvalid("unexpected columns")
                if (file.schema_arrow.metadata or {}).get(b"recipe") != self.digest.encode():
                    raise CacheError(f"{self.folder.named(name)}: built with other settings or data; delete it and {BUILD}")
                return file.read_row_group(group, use_threads=False)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last if column names are damaged
            raise CacheError(
                f"{self.folder.named(name)}: damaged ({error}); {BUILD}, which rebuilds this file alone"
            ) from error

    def sound(self, shard: int, view: int) -> bool:
        """Return whether the file exists, is complete, undamaged and of this recipe, by reading it."""
        groups = -(-self.shards.meta.shards[shard].images // self.shards.meta.row_group)
        try:
            rows = sum(self._table(shard, view, group).num_rows for group in range(groups))
        except CacheError:
            return False
        return rows == self.shards.meta.shards[shard].images

    def unpack(self, packed: PackedTargets, image_id: int, view: int) -> ViewTargets:
        """Decode one image's targets; see TargetReader. Raises CacheError if they are another view's."""
        if (packed.image_id, packed.view) != (image_id, view):
            raise CacheError(
                f"{self.folder.uri}: has image {packed.image_id}, view {packed.view} where image {image_id}, view {view} "
                f"should be; delete the folder and {BUILD}"
            )
        count = packed.rois
        steps = np.frombuffer(packed.scales, dtype="<f4").reshape(self.codec.layers, self.codec.width)
        return ViewTargets(
            boxes=np.frombuffer(packed.boxes, dtype="<f4").reshape(count, 4).copy(),
            truth=np.frombuffer(packed.truth, dtype=np.uint8).astype(bool),
            taps=self.codec.unpack(packed.taps, count, steps),
            top=self.codec.unpack_top(packed.logits, packed.classes, count),
        )

    def nothing(self) -> ViewTargets:
        """Return empty targets; see TargetReader."""
        return ViewTargets(
            np.zeros((0, 4), np.float32),
            np.zeros(0, bool),
            np.zeros((self.codec.layers, 0, self.codec.width), np.float32),
            self.codec.unpack_top(b"", b"", 0),
        )
