"""Check whether the shards that an earlier run of prepare left are still what a new run would write."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.images import inspect
from headkd_ray.data.layout import Layout
from headkd_ray.data.meta import Meta, ShardFile
from headkd_ray.data.photos import Fault, Photos, Tally
from headkd_ray.data.shards import ANNOTATIONS, INDEX, SHARD_SCHEMA, check_columns
from headkd_ray.storage import Folder

PIECE = 2**24
"""Bytes of a file that are read at a time."""


@dataclass(frozen=True)
class StoredShard:
    """A valid shard of an earlier run, and the state of its image files."""

    file: ShardFile
    tally: Tally
    changed: tuple[str, ...] = ()
    """Image files whose bytes differ from those in the shard."""
    missing: tuple[str, ...] = ()
    """Image files that can no longer be read."""


def is_sound(out: Folder, layout: Layout, meta: Meta, pool: Executor) -> bool:
    """Return whether all files of a complete split are as they were written."""
    found = pool.map(lambda shard: _sha256(out, shard.name), meta.shards)
    expected = [shard.sha256 for shard in meta.shards]
    annotations = hashlib.sha256()
    for piece in layout.annotations():
        annotations.update(piece)
    own = {INDEX: hashlib.sha256(layout.index()).hexdigest(), ANNOTATIONS: annotations.hexdigest()}
    return list(found) == expected and all(_sha256(out, name) == sha256 for name, sha256 in own.items())


def _sha256(out: Folder, name: str) -> str | None:
    """Return the file's SHA-256; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with out.open_file(name) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        return digest.hexdigest()
    except OSError:
        return None


def read_stored(out: Folder, layout: Layout, photos: Photos, name: str, members: list[int]) -> StoredShard | None:
    """Return the shard if it exists and a new run would write the same, apart from the bytes of changed image files."""
    if out.size(name) is None:
        return None
    content = out.read(name)
    tally = Tally()
    changed: list[str] = []
    missing: list[str] = []
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            check_columns(file, SHARD_SCHEMA)
            metadata = file.metadata.metadata or {}
            if metadata.get(b"recipe") != layout.recipe.encode() or file.metadata.num_rows != len(members):
                return None
            for number, start in enumerate(range(0, len(members), layout.row_group)):
                group = members[start : start + layout.row_group]
                table = file.read_row_group(number, use_threads=False)
                encoded = table["image"].to_pylist()
                if not table.equals(layout.rows(group, encoded)):
                    return None
                for image, data in zip(group, encoded, strict=True):
                    record, now = layout.split.images[image], photos.read(image)
                    tally += Tally.of(inspect(data, max_pixels=None), record)
                    if isinstance(now, Fault):
                        missing.append(record.file_name)
                    elif now != data:
                        changed.append(record.file_name)
    except (OSError, ValueError, IndexError):  # damaged
        return None
    sha256 = hashlib.sha256(content).hexdigest()
    return StoredShard(ShardFile(name, len(members), len(content), sha256), tally, tuple(changed), tuple(missing))
