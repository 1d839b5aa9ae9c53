"""Read a prepared split from disk.

Layout of the folder::

    shard-00000.parquet ...   images in a fixed random order: original encoded bytes, boxes, labels (SHARD_SCHEMA)
    index.parquet             one small row per image, in the order of the shards (INDEX_SCHEMA)
    annotations.json          the COCO ground truth without segmentations, for evaluation
    meta.json                 classes, counts, list of shards; written last: a folder without it is not complete
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headkd_ray.data.meta import Meta
from headkd_ray.data.sample import COLUMNS, Annotations, Expected, Sample, annotations_of, labels_of, samples_of
from headkd_ray.data.truth import read_truth
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

META, INDEX, ANNOTATIONS = "meta.json", "index.parquet", "annotations.json"

SHARD_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("file_name", pa.string()),
        pa.field("width", pa.int32()),  # pixels; of the upright image, if EXIF orientation is applied
        pa.field("height", pa.int32()),
        pa.field("image", pa.binary()),  # the file's bytes
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # x1 y1 x2 y2, pixels, inside width and height
        pa.field("labels", pa.list_(pa.int32())),  # contiguous, 0..C-1
        pa.field("crowd", pa.list_(pa.bool_())),
        pa.field("annotation_ids", pa.list_(pa.int64())),
        pa.field("areas", pa.list_(pa.float32())),  # the JSON's area (of the segmentation, if it had one), square pixels
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("file_name", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int32()),  # within the shard
        pa.field("boxes", pa.int32()),  # number of boxes that are not crowds
    ]
)

READERS = 8
"""Files or row groups that are read at a time, which hides a remote filesystem's latency and costs nothing on a local one."""
PREPARE = "python -m headkd_ray.prepare COCO.json IMAGES_DIR --out"


class Unlabelled(NamedTuple):
    """The images of a training set that have no ground truth."""

    rows: NDArray[np.bool_]
    """Which images these are, bool (n,)."""
    taught: NDArray[np.bool_]
    """Which of them a teacher has something to say about, and are trained on, bool (n,)."""


@dataclass(frozen=True)
class ShardIndex:
    """The index of a split: NumPy arrays with one entry per image, in the order of the shards."""

    image_id: NDArray[np.int64]
    width: NDArray[np.int32]
    """Width in pixels, as ``Sample.size`` has it."""
    height: NDArray[np.int32]
    shard: NDArray[np.int32]
    """Position of the shard in ``Meta.shards``."""
    row: NDArray[np.int32]
    """Row within the shard."""
    boxes: NDArray[np.int32]
    """Number of boxes that are not crowds."""
    row_group: int
    """Images per row group."""
    without_truth: Unlabelled | None = None
    """The images without ground truth, if a training set has any."""

    def __len__(self) -> int:
        return len(self.image_id)

    @cached_property
    def has_truth(self) -> NDArray[np.bool_]:
        """Which images have ground truth, bool."""
        return np.ones(len(self), dtype=bool) if self.without_truth is None else ~self.without_truth.rows

    @cached_property
    def portrait(self) -> NDArray[np.bool_]:
        """Which images are taller than wide, bool."""
        return self.height > self.width

    @cached_property
    def group(self) -> NDArray[np.int64]:
        """Number of each image's row group, counted over all shards: ascending, with gaps."""
        return self.shard.astype(np.int64) * (int(self.row.max(initial=0)) // self.row_group + 1) + self.row // self.row_group


@dataclass(frozen=True)
class ShardSet:
    """An opened prepared split."""

    folder: Folder
    meta: Meta
    index: ShardIndex

    @classmethod
    def open(cls, uri: str, labelled: bool = True) -> ShardSet:
        """Open the split at ``uri`` (path or URI).

        Args:
            labelled: whether it must have been prepared with labels.

        Raises:
            DataError: the split is missing, not completely prepared, damaged or in a newer format, or has no labels.
        """
        folder = Folder.open(uri, DataError)
        remedy = f"run: {PREPARE} {uri}"
        try:
            meta = Meta.from_json(folder.read(META), folder.named(META))
            index = _read_index(folder, meta.row_group)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(_unprepared(folder, uri)) from error
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{uri}: cannot be read ({error}); check access, or {remedy} --overwrite") from error
        problems = []
        for shard, size in zip(meta.shards, folder.sizes([shard.name for shard in meta.shards]), strict=True):
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, should have {shard.bytes}"
                problems.append(f"{folder.named(shard.name)}: {found}; copy it again, or {remedy} --overwrite")
        problems += [f"{folder.named(INDEX)}: {problem}; {remedy} --overwrite" for problem in _check_index(index, meta)]
        if labelled and not meta.classes:
            problems.append(
                f"{uri}: was prepared with --unlabelled and can only be used as data.unlabelled; prepare a split with labels"
            )
        if problems:
            raise DataError(problems)
        return cls(folder, meta, index)

    def file_names(self) -> Iterator[str]:
        """Yield the file name of each image, relative to the folder that it was prepared from, in the order of the index.

        Raises DataError if the index cannot be read.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(self.folder.read(INDEX)), page_checksum_verification=True)
            check_columns(file, INDEX_SCHEMA)
            yield from file.read(columns=["file_name"], use_threads=False)["file_name"].to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder.named(INDEX)}: cannot be read ({error}); copy it again") from error

    def names_at(self, rows: Iterable[int]) -> dict[int, str]:
        """Return the file names of the images at some rows of the index, by row. Raises DataError as ``file_names`` does."""
        wanted = set(rows)
        return {row: name for row, name in enumerate(self.file_names()) if row in wanted} if wanted else {}

    def ground_truth(self) -> dict[str, Any]:
        """Return the COCO ground truth: ``images``, ``annotations`` (original category ids, no segmentation), ``categories``.

        Raises DataError if it is damaged or belongs to another split.
        """
        return read_truth(self.folder, ANNOTATIONS, self.meta, self.index.image_id.tolist())

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Yield the first ``limit`` samples in the order of the shards; None = all. Raises DataError as ``read_group`` does."""
        size = self.index.row_group
        places = list(zip(self.index.shard.tolist(), self.index.row.tolist(), strict=True))[:limit]
        for (shard, group), members in groupby(places, lambda place: (place[0], place[1] // size)):
            yield from self.read_group(shard, group, [row for _, row in members])

    def read_group(self, shard: int, group: int, rows: Sequence[int]) -> list[Sample]:
        """Return samples from one row group of one shard.

        Args:
            shard: number of the shard.
            group: number of the row group within it.
            rows: requested rows of the shard, all within the group.

        Raises DataError if the file is missing or has changed; checksums show it, because JPEG decoders accept damaged bytes.
        """
        try:
            with self._open(shard) as file:
                table = file.read_row_group(group, columns=COLUMNS, use_threads=False)
            first = group * self.meta.row_group
            expected = self._expected(shard, first, self.meta.row_group)
            wanted = [row - first for row in rows]
            return list(samples_of(table, wanted, expected, len(self.meta.classes), self.meta.reading))
        except (OSError, ValueError, IndexError, TypeError) as error:
            raise self._unreadable(shard, error) from error

    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the row of the index and the label of every box that is not a crowd, both int64 (n,).

        Reads nothing else of the shards, but these columns of all. Raises DataError as ``read_group`` does.
        """
        with ThreadPoolExecutor(READERS, thread_name_prefix="headkd-read") as pool:
            found = list(pool.map(self._labels_of, range(len(self.meta.shards))))
        rows, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows, labels

    def annotations(self) -> Iterator[Annotations]:
        """Yield the boxes of each shard, in the order of the shards, without reading its images.

        Raises DataError as ``read_group`` does.
        """
        for shard in range(len(self.meta.shards)):
            try:
                with self._open(shard) as file:
                    table = file.read(columns=["boxes", "labels", "crowd"], use_threads=False)
                start = int(np.searchsorted(self.index.shard, shard))
                expected = self._expected(shard, 0, self.meta.shards[shard].images)
                yield annotations_of(table, expected, len(self.meta.classes), start)
            except (OSError, ValueError, TypeError) as error:
                raise self._unreadable(shard, error) from error

    def sample_at(self, row: int) -> Sample:
        """Return the image at a row of the index. Raises DataError as ``read_group`` does."""
        shard, place = int(self.index.shard[row]), int(self.index.row[row])
        (sample,) = self.read_group(shard, place // self.index.row_group, [place])
        return sample

    def _labels_of(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        try:
            with self._open(shard) as file:
                table = file.read(columns=["labels", "crowd"], use_threads=False)
            start = int(np.searchsorted(self.index.shard, shard))
            expected = self._expected(shard, 0, self.meta.shards[shard].images)
            return labels_of(table, expected.boxes, len(self.meta.classes), start)
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(shard, error) from error

    @contextmanager
    def _open(self, shard: int) -> Iterator[pq.ParquetFile]:
        source = self.folder.fs.open_input_file(self.folder.at(self.meta.shards[shard].name))
        with pq.ParquetFile(source, pre_buffer=self.folder.remote, page_checksum_verification=True) as file:
            check_columns(file, SHARD_SCHEMA)
            yield file

    def _unreadable(self, shard: int, error: Exception) -> DataError:
        name = self.folder.named(self.meta.shards[shard].name)
        return DataError(f"{name}: cannot be read ({error}); copy or prepare it again")

    def _expected(self, shard: int, first: int, count: int) -> Expected:
        """Return what the index says about ``count`` rows of a shard from row ``first`` on, fewer where the shard ends."""
        start, end = np.searchsorted(self.index.shard, (shard, shard + 1))
        where = slice(start + first, min(start + first + count, end))
        index = self.index
        return Expected(index.image_id[where], index.height[where], index.width[where], index.boxes[where])


def _unprepared(folder: Folder, uri: str) -> str:
    """Describe what is at ``uri`` instead of a prepared split, and suggest a command that overwrites nothing."""
    command = PREPARE
    parent, name = Folder.of_file(uri, DataError)
    if parent.has(name):
        command = command.replace("COCO.json", uri if name.endswith(".json") else "COCO.json")
        found = "is a file, not the folder of a prepared split"
        return f"{uri}: {found}; prepare it first: {command} OUT_DIR, and give OUT_DIR here"
    names = folder.names()
    state = "is not completely prepared" if names else "is missing or empty"
    message = f"{uri}: the data set {state} (no {META} or {INDEX})"
    if names and not any(name == INDEX or name.startswith("shard-") for name in names):
        return f"{message}, and the folder has other files; prepare it first: {command} OUT_DIR, and give OUT_DIR here"
    return f"{message}; run: {command} {uri}"


def _read_index(folder: Folder, row_group: int) -> ShardIndex:
    # No Arrow threads: next to torch's, its CPU pool can abort the process at exit (apache/arrow#34314).
    file = pq.ParquetFile(pa.BufferReader(folder.read(INDEX)), page_checksum_verification=True)
    check_columns(file, INDEX_SCHEMA)
    table = file.read(use_threads=False)
    empty = [name for name in table.column_names if table[name].null_count]
    if empty:
        raise ValueError(f"{INDEX}: entries without {', '.join(empty)}")
    names = ("image_id", "width", "height", "shard", "row", "boxes")
    return ShardIndex(**{name: table[name].to_numpy() for name in names}, row_group=row_group)


def _check_index(index: ShardIndex, meta: Meta) -> Iterator[str]:
    if len(index) != meta.images:
        yield f"{len(index)} rows, but {META} counts {meta.images} images"
        return
    images = [shard.images for shard in meta.shards]
    shard, row = np.repeat(np.arange(len(images)), images), np.concatenate([np.arange(count) for count in images])
    if not (np.array_equal(index.shard, shard) and np.array_equal(index.row, row)):
        yield f"its rows are not in the order of the shards that {META} lists"
    if len(np.unique(index.image_id)) != len(index):
        yield "an image is listed twice"
    if min(index.width.min(), index.height.min()) < 1 or index.boxes.min() < 0 or index.boxes.sum(dtype=np.int64) != meta.boxes:
        yield f"sizes below 1, or not the {meta.boxes} boxes that {META} counts"


def check_columns(file: pq.ParquetFile, schema: pa.Schema) -> None:
    """Raise ArrowInvalid if the file has other columns than ``schema``.

    This is also a security check: where Ray Data is imported, reading a column of its type for Python objects unpickles it, and
    a pickle may run any code.
    """
    if not file.schema_arrow.equals(schema):
        raise pa.ArrowInvalid("it has other columns than python -m headkd_ray.prepare writes")
