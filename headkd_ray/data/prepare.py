"""COCO JSON + image folder -> prepared split.

Images are read, decoded and checked by threads (decoding releases the GIL) and written by one thread in a fixed order, so the
files are the same bytes whatever the number of workers. A shard gets its final name when it is complete, meta.json comes last:
after a kill, the same command keeps the finished shards and makes the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.coco import CocoSplit, read_coco
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.images import decode
from headkd_ray.data.layout import Layout
from headkd_ray.data.problems import Problems
from headkd_ray.data.shards import (
    ANNOTATIONS,
    INDEX,
    META,
    SHARD_SCHEMA,
    Meta,
    ShardFile,
    ShardSet,
)
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

Progress = Callable[[int, int], None]
"""Called with (images done, images in all), in the calling thread."""


MISSING = "no such file; check IMAGES_DIR and 'file_name'"
DAMAGED = "damaged, or not a JPEG, PNG or WebP; replace the file, or remove the image from the JSON"
WRONG_SIZE = (
    "stored size differs from the JSON; correct the JSON or the file (EXIF orientation is ignored: boxes must be drawn on the "
    "stored pixels)"
)


def prepare_split(
    json_uri: str,
    images_uri: str,
    out_uri: str,
    *,
    shard_images: int = 512,
    row_group: int = 16,
    workers: int | None = None,
    fix_boxes: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ShardSet:
    """Prepare a split; all three places are paths or URIs.

    Args:
        shard_images: images a shard file.
        row_group: images a row group, the smallest unit that is read.
        workers: threads that read and check images; None = one a CPU.
        fix_boxes: clip or drop unusable boxes instead of refusing the split.
        overwrite: replace another split, or this one, that is complete in the folder.

    Returns:
        The split, opened. If the folder holds this very split already, nothing is done.

    Raises:
        DataError: every problem of the JSON at once; or every problem of the images at once.
    """
    images, out = Folder.open(images_uri, DataError), Folder.open(out_uri, DataError)
    names = FileNames(images)
    split = read_coco(json_uri, fix_boxes=fix_boxes, names=names)
    layout = Layout(split, shard_images, row_group)
    if out.size(META) is not None and not overwrite:
        existing = Meta.from_json(out.read(META), out.named(META))
        if existing.fingerprint != layout.recipe:
            raise DataError(
                f"{out_uri}: holds another prepared split ({existing.images} images, or other options); "
                "choose another --out, or replace it with --overwrite"
            )
        opened = ShardSet.open(out_uri)
        progress(len(split.images), len(split.images))
        return opened
    try:
        out.create()
        out.delete(META)  # From here on the folder is incomplete, and says so.
        _delete_shards(out, keep=set() if overwrite else {name for name, _ in layout.shards()})
        shards = _write_shards(layout, images, names, out, workers or os.cpu_count() or 1, progress)
        out.write(INDEX, layout.index())
        out.write(ANNOTATIONS, json.dumps(split.ground_truth(), separators=(",", ":")).encode())
        out.write(META, layout.meta(shards).to_json())
    except OSError as error:  # of the output: reading the images raises none
        raise DataError(f"{out_uri}: cannot be written ({error}); choose another --out, or mend it and run again") from error
    return ShardSet.open(out_uri)


def _delete_shards(out: Folder, keep: set[str]) -> None:
    """Delete what an earlier run left behind, but for ``keep``."""
    for name in out.names():
        if name.startswith("shard-") and name not in keep:
            out.delete(name)


def _write_shards(
    layout: Layout, images: Folder, names: FileNames, out: Folder, workers: int, progress: Progress
) -> list[ShardFile]:
    problems = Problems()
    total, done, shards = len(layout.split.images), 0, []
    with ThreadPoolExecutor(workers, thread_name_prefix="headkd-prepare") as pool:
        try:
            plan = layout.shards()
            kept = list(pool.map(lambda shard: _kept(out, shard[0], layout, len(shard[1])), plan))
            todo = [image for (_, members), shard in zip(plan, kept, strict=True) if shard is None for image in members]
            checked = _checked(layout.split, todo, images, names, pool, ahead=4 * workers + layout.row_group)
            for (name, members), shard in zip(plan, kept, strict=True):
                if shard is None:
                    advance = partial(_advance, progress, done, total)
                    shard = _write_shard(name, members, layout, checked, out, problems, advance)
                if shard is not None:
                    shards.append(shard)
                done += len(members)
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    problems.check(f"{images.uri}: images cannot be used:")
    return shards


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _write_shard(
    name: str,
    members: list[int],
    layout: Layout,
    checked: Iterator[bytes | tuple[str, str]],
    out: Folder,
    problems: Problems,
    advance: Callable[[int], None],
) -> ShardFile | None:
    """Write one shard from the next ``len(members)`` entries of ``checked``; None if one of its images has a problem."""
    schema = SHARD_SCHEMA.with_metadata({"recipe": layout.recipe})
    sound = True
    with (
        out.fs.open_output_stream(out.at(name + ".tmp")) as stream,
        _Hashing(stream) as sink,
        pq.ParquetWriter(
            sink, schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        ) as writer,
    ):
        for start in range(0, len(members), layout.row_group):
            group = members[start : start + layout.row_group]
            encoded: list[bytes] = []
            for _ in group:
                match next(checked):
                    case bytes() as data:
                        encoded.append(data)
                    case (kind, where):
                        problems.add(kind, where)
                        sound = False
            if sound:
                writer.write_table(layout.rows(group, encoded))
            advance(start + len(group))
    if not sound:
        out.delete(name + ".tmp")
        return None
    out.publish(name)
    return ShardFile(name, len(members), sink.size, sink.digest.hexdigest())


def _checked(
    split: CocoSplit, members: list[int], images: Folder, names: FileNames, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[bytes | tuple[str, str]]:
    """Bytes, or (kind, where) of the problem, of each image in order; at most ``ahead`` are held."""
    coming: deque[Future[bytes | tuple[str, str]]] = deque()
    for image in members:
        coming.append(pool.submit(_check, split, image, images, names))
        if len(coming) >= ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _check(split: CocoSplit, image: int, images: Folder, names: FileNames) -> bytes | tuple[str, str]:
    record = split.images[image]
    where = f"{images.named(record.file_name)} (image {record.id})"
    try:
        data = images.read(record.file_name)
    except FileNotFoundError:
        return MISSING, f"{images.named(record.file_name)} (image {record.id}{names.hint(record.file_name)})"
    except (OSError, ValueError) as error:  # ValueError: a name that the filesystem does not allow
        return "cannot be read; check access", f"{where}, {error}"
    try:
        height, width = decode(data).shape[1:]
    except ValueError as error:
        return DAMAGED, f"{where}, {error}"
    if (height, width) != (record.height, record.width):
        return WRONG_SIZE, f"{where}, stored {width} x {height}, JSON {record.width} x {record.height}"
    return data


def _kept(out: Folder, name: str, layout: Layout, images: int) -> ShardFile | None:
    """The shard, if an earlier run of the same recipe completed it."""
    if out.size(name) is None:
        return None
    content = out.read(name)
    try:
        metadata = pq.read_metadata(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid):
        return None
    if (metadata.metadata or {}).get(b"recipe") != layout.recipe.encode() or metadata.num_rows != images:
        return None
    return ShardFile(name, images, len(content), hashlib.sha256(content).hexdigest())


class _Hashing(io.RawIOBase):
    """Counts and hashes what is written through it."""

    def __init__(self, sink: pa.NativeFile) -> None:
        self._sink = sink
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._sink.write(view)
        self.digest.update(view)
        self.size += view.nbytes
        return view.nbytes
