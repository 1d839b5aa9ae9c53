"""Pack the images of a checked split into shards.

Images are read, decoded and checked by threads (decoding releases the GIL) and written by one thread in a fixed order, so the
files have the same bytes for any number of workers. A shard gets its final name when it is complete, and meta.json is written
last: after a kill, the same command keeps the finished shards whose image files are unchanged, and makes the rest.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.checking import Checked
from headkd_ray.data.images import MAX_PIXELS
from headkd_ray.data.layout import Layout
from headkd_ray.data.meta import Meta, ShardFile
from headkd_ray.data.photos import Exif, Fault, Photo, PhotoOptions, Photos, Tally
from headkd_ray.data.problems import Problems
from headkd_ray.data.shards import ANNOTATIONS, INDEX, META, SHARD_SCHEMA, ShardSet
from headkd_ray.data.stored import StoredShard, is_sound, read_stored
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder, locked

Progress = Callable[[int, int], None]
"""Called with (images done, images in total) in the calling thread."""


@dataclass(frozen=True)
class Preparation:
    """The inputs, the destination and the workers of one preparation."""

    layout: Layout
    photos: Photos
    out: Folder
    pool: ThreadPoolExecutor
    ahead: int
    """Number of images that are read ahead."""
    progress: Progress


def pack(
    found: Checked,
    out_uri: str,
    *,
    shard_images: int = 512,
    row_group: int = 16,
    workers: int | None = None,
    exif: Exif | None = None,
    value_range: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ShardSet:
    """Check the images of a split and pack it into shards.

    Args:
        found: the split, which has been read with the same ``exif``.
        out_uri: folder to write, a path or URI.
        shard_images: images per shard file.
        row_group: images per row group, the smallest unit that is read.
        value_range: values of 16-bit images that become 0 and 255; None = keep the high byte.
        max_pixels: the largest image that is accepted.
        overwrite: replace a complete split in the folder, whether it is this one or another.

    Raises:
        DataError: the images have problems, all of which are listed; or the folder holds another split, or this one with other
            images, or another process is preparing a split there.
    """
    split, images = found.split, found.folder
    assert images is not None, "the images have not been looked for"
    options = PhotoOptions(exif, value_range, split.upright, split.written_in, max_pixels)
    photos = Photos(split, images, found.hint, options)
    out, layout = Folder.open(out_uri, DataError), Layout(split, shard_images, row_group, options)
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers, thread_name_prefix="headkd-prepare") as pool:
        try:
            work = Preparation(layout, photos, out, pool, 4 * workers + row_group, progress)
            version = photos.version()
            before = None if overwrite else _complete(out, layout)
            unchanged = before is not None and version != "" and before.photos == version
            if before is None or not unchanged or not is_sound(out, layout, before, pool):
                _write(work, version, overwrite)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress(len(split.images), len(split.images))
    return ShardSet.open(out_uri, labelled=bool(split.classes))


def _complete(out: Folder, layout: Layout) -> Meta | None:
    """Return meta.json if this split is complete in the folder, else None. Raises DataError if it holds another split."""
    if out.size(META) is None:
        return None
    meta = Meta.from_json(out.read(META), out.named(META))
    if meta.fingerprint != layout.fingerprint(meta.upright):
        raise DataError(
            f"{out.uri}: holds another prepared split ({meta.images} images, or other options); "
            "choose another --out, or replace it with --overwrite"
        )
    return meta


def _write(work: Preparation, version: str, overwrite: bool) -> None:
    """Make the files that are missing or out of date."""
    out, layout = work.out, work.layout
    busy = DataError(f"{out.uri}: another process is preparing a split there; wait for it, end it, or choose another --out")
    try:
        out.create()
        with locked(out, busy):
            before = None if overwrite else _complete(out, layout)
            stored: list[StoredShard | None] = [None] * len(layout.shards())
            if not overwrite:
                stored = list(
                    work.pool.map(partial(read_stored, out, layout, work.photos), *zip(*layout.shards(), strict=True))
                )
            _check_unchanged(stored, before, out)
            kept = [shard if shard and (before or not shard.missing) and not shard.changed else None for shard in stored]
            out.delete(META)  # From here on the folder counts as incomplete.
            _delete_shards(out, keep={shard.file.name for shard in kept if shard})
            shards, tally = _write_shards(work, kept)
            out.write(INDEX, layout.index())
            out.write(ANNOTATIONS, layout.annotations())
            whole = not any(shard and shard.missing for shard in kept)
            out.write(META, layout.meta(shards, tally, version if whole else "").to_json())
    except OSError as error:  # from the output; reading the images raises none
        raise DataError(f"{out.uri}: cannot be written ({error}); choose another --out, or fix it and run again") from error


def _check_unchanged(stored: list[StoredShard | None], before: Meta | None, out: Folder) -> None:
    """Raise DataError if the image files have changed since a complete split was prepared from them."""
    changed = [name for shard in stored if shard for name in shard.changed]
    if before is None or not changed:
        return
    problems = Problems()
    for name in changed:
        problems.add("has changed since the split was prepared", name)
    raise DataError(
        problems.lines(), f"{out.uri}: image files have changed; replace the split with --overwrite, or choose another --out:"
    )


def _delete_shards(out: Folder, keep: set[str]) -> None:
    """Delete the shards that an earlier run left behind, except ``keep``."""
    for name in out.names():
        if name.startswith("shard-") and name not in keep:
            out.delete(name)


def _write_shards(work: Preparation, kept: list[StoredShard | None]) -> tuple[list[ShardFile], Tally]:
    """Write the shards that are None in ``kept``. Raises DataError if an image cannot be used."""
    problems, tally, shards = Problems(), Tally(), []
    total, done, plan = len(work.layout.split.images), 0, work.layout.shards()
    checked = _checked(work, [i for (_, members), shard in zip(plan, kept, strict=True) if shard is None for i in members])
    for (name, members), stored in zip(plan, kept, strict=True):
        if stored is None:
            stored = _write_shard(work, name, members, checked, problems, partial(_advance, work.progress, done, total))
        if stored is not None:
            shards.append(stored.file)
            tally += stored.tally
        done += len(members)
        work.progress(done, total)
    problems.check(f"{work.photos.folder.uri}: images cannot be used:")
    return shards, tally


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _write_shard(
    work: Preparation,
    name: str,
    members: list[int],
    checked: Iterator[Photo | Fault],
    problems: Problems,
    advance: Callable[[int], None],
) -> StoredShard | None:
    """Write one shard from the next ``len(members)`` entries of ``checked``; None if one of its images has a problem."""
    out, layout = work.out, work.layout
    schema = SHARD_SCHEMA.with_metadata({"recipe": layout.recipe})
    sound, tally = True, Tally()
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
            for image in group:
                match next(checked):
                    case Photo(data, facts):
                        encoded.append(data)
                        tally += Tally.of(facts, layout.split.images[image])
                    case Fault(kind, where):
                        problems.add(kind, where)
                        sound = False
            if sound:
                writer.write_table(layout.rows(group, encoded))
            advance(start + len(group))
    if not sound:
        out.delete(name + ".tmp")
        return None
    out.publish(name)
    return StoredShard(ShardFile(name, len(members), sink.size, sink.digest.hexdigest()), tally)


def _checked(work: Preparation, members: list[int]) -> Iterator[Photo | Fault]:
    """Yield each checked image in order, holding at most ``work.ahead`` of them."""
    coming: deque[Future[Photo | Fault]] = deque()
    for image in members:
        coming.append(work.pool.submit(work.photos.check, image))
        if len(coming) >= work.ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


class _Hashing(io.RawIOBase):
    """A sink that counts and hashes the bytes written through it."""

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
