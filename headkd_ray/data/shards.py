"""A prepared split on disk, and its reader.

Layout of the folder::

    shard-00000.parquet ...   images in a fixed random order: encoded bytes untouched, boxes, labels (SHARD_SCHEMA)
    index.parquet             one small row an image, in the order of the shards (INDEX_SCHEMA)
    annotations.json          the COCO ground truth without segmentations, for evaluation
    meta.json                 classes, counts, list of shards; written last: a folder without it is not complete
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headkd_ray.errors import DataError
from headkd_ray.storage import Folder
from headkd_ray.targets import PackedTargets

VERSION = 1
META, INDEX, ANNOTATIONS = "meta.json", "index.parquet", "annotations.json"

SHARD_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("file_name", pa.string()),
        pa.field("width", pa.int32()),  # pixels
        pa.field("height", pa.int32()),
        pa.field("image", pa.binary()),  # the file's bytes
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # x1 y1 x2 y2, pixels of the stored image, inside it
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


@dataclass(frozen=True)
class ShardFile:
    """One shard, as meta.json lists it."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Meta:
    """meta.json."""

    classes: tuple[str, ...]
    """Class names; the position is the contiguous label."""
    category_ids: tuple[int, ...]
    """COCO category id of each label: sparse, as in the source."""
    images: int
    boxes: int
    """Boxes that are not crowds."""
    crowds: int
    row_group: int
    """Images a row group (fewer at the end of a shard)."""
    shards: tuple[ShardFile, ...]
    fingerprint: str
    """SHA-256 of the annotations and of how they were laid out."""
    fixes: tuple[str, ...] = ()
    """What --fix-boxes changed, one line each."""
    warnings: tuple[str, ...] = ()
    """What was understood in a way that the user should know of, one sentence each."""

    def to_json(self) -> bytes:
        """The file's content."""
        return (json.dumps({"format": "headkd_ray shards", "version": VERSION, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Meta:
        """Read it back; ``name`` is how errors call the file. Raises DataError."""
        try:
            fields: dict[str, Any] = json.loads(content)
            kind, version = fields.pop("format"), fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{name}: not written by headkd_ray.prepare ({error!r}); prepare the split again, with --overwrite"
            ) from error
        if kind != "headkd_ray shards" or not isinstance(version, int) or version > VERSION:
            raise DataError(f"{name}: format {kind!r} version {version}; this headkd_ray reads up to {VERSION}, upgrade it")
        try:
            shards = tuple(ShardFile(**shard) for shard in fields.pop("shards"))
            values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            return cls(shards=shards, **values)
        except TypeError as error:
            raise DataError(f"{name}: damaged ({error}); prepare the split again, with --overwrite") from error


@dataclass(frozen=True)
class ShardIndex:
    """One entry an image, in the order of the shards; NumPy arrays of one length."""

    image_id: NDArray[np.int64]
    width: NDArray[np.int32]
    """Pixels."""
    height: NDArray[np.int32]
    shard: NDArray[np.int32]
    """Number of the shard in ``Meta.shards``."""
    row: NDArray[np.int32]
    """Row within the shard."""
    boxes: NDArray[np.int32]
    """Boxes that are not crowds."""
    row_group: int
    """Images a row group."""

    def __len__(self) -> int:
        return len(self.image_id)

    @cached_property
    def portrait(self) -> NDArray[np.bool_]:
        """Taller than wide."""
        return self.height > self.width

    @cached_property
    def group(self) -> NDArray[np.int64]:
        """Number of the row group over all shards: ascending, with gaps."""
        return self.shard.astype(np.int64) * (int(self.row.max(initial=0)) // self.row_group + 1) + self.row // self.row_group


@dataclass(frozen=True)
class Sample:
    """One stored image and its boxes."""

    image_id: int
    image: bytes
    """Encoded."""
    boxes: NDArray[np.float32]
    """float32 (n, 4): x1 y1 x2 y2, pixels of the stored image. No crowds."""
    labels: NDArray[np.int64]
    """int64 (n,), contiguous."""
    size: tuple[int, int]
    """Stored height and width, pixels."""
    targets: PackedTargets | None = None
    """Soft targets of the view that is wanted, from a cache."""


@dataclass(frozen=True)
class ShardSet:
    """A prepared split, opened."""

    folder: Folder
    meta: Meta
    index: ShardIndex

    @classmethod
    def open(cls, uri: str) -> ShardSet:
        """Open the split at ``uri`` (path or URI).

        Raises:
            DataError: it is missing, not completely prepared, damaged or of a newer format.
        """
        folder = Folder.open(uri, DataError)
        mend = "run: python -m headkd_ray.prepare COCO.json IMAGES_DIR --out " + uri
        try:
            meta = Meta.from_json(folder.read(META), folder.named(META))
            index = _read_index(folder, meta.row_group)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(_unprepared(folder, uri)) from error
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{uri}: cannot be read ({error}); check access, or {mend} --overwrite") from error
        problems = []
        for shard, size in zip(meta.shards, folder.sizes([shard.name for shard in meta.shards]), strict=True):
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, should have {shard.bytes}"
                problems.append(f"{folder.named(shard.name)}: {found}; copy it again, or {mend} --overwrite")
        if len(index) != meta.images:
            problems.append(f"{folder.named(INDEX)}: {len(index)} rows, {META} counts {meta.images} images; {mend} --overwrite")
        if problems:
            raise DataError(problems)
        return cls(folder, meta, index)

    def ground_truth(self) -> dict[str, Any]:
        """The COCO ground truth: ``images``, ``annotations`` (original category ids, no segmentation), ``categories``."""
        try:
            return json.loads(self.folder.read(ANNOTATIONS))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder.named(ANNOTATIONS)}: {error}; prepare the split again, with --overwrite") from error

    def read_group(self, shard: int, group: int, rows: Sequence[int]) -> list[Sample]:
        """Samples of one row group of one shard.

        Args:
            shard: number of the shard.
            group: number of the row group within it.
            rows: wanted rows of the shard, all within the group.

        Raises DataError if the file is not there or not as it was written: JPEG decoders make an image of damaged bytes, too.
        """
        columns = ["image_id", "image", "boxes", "labels", "crowd", "height", "width"]
        name = self.meta.shards[shard].name
        try:
            source = self.folder.fs.open_input_file(self.folder.at(name))
            with pq.ParquetFile(source, pre_buffer=self.folder.remote, page_checksum_verification=True) as file:
                _check_columns(file, SHARD_SCHEMA)
                table = file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder.named(name)}: cannot be read ({error}); copy or prepare it again") from error
        return [_sample(table, row - group * self.meta.row_group) for row in rows]


def _unprepared(folder: Folder, uri: str) -> str:
    """What is at ``uri``, if no prepared split, and what to do, which leaves alone what is there."""
    command = "python -m headkd_ray.prepare COCO.json IMAGES_DIR --out"
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


def _sample(table: pa.Table, row: int) -> Sample:
    cell = {name: table[name][row] for name in table.column_names}
    crowd = np.array(cell["crowd"].as_py(), dtype=bool)
    boxes = np.array(cell["boxes"].as_py(), dtype=np.float32).reshape(-1, 4)
    labels = np.array(cell["labels"].as_py(), dtype=np.int64)
    return Sample(
        image_id=cell["image_id"].as_py(),
        image=cell["image"].as_py(),
        boxes=boxes[~crowd],
        labels=labels[~crowd],
        size=(cell["height"].as_py(), cell["width"].as_py()),
    )


def _read_index(folder: Folder, row_group: int) -> ShardIndex:
    # No Arrow threads: beside torch's, its CPU pool can abort the process at exit (apache/arrow#34314).
    file = pq.ParquetFile(pa.BufferReader(folder.read(INDEX)), page_checksum_verification=True)
    _check_columns(file, INDEX_SCHEMA)
    table = file.read(use_threads=False)
    names = ("image_id", "width", "height", "shard", "row", "boxes")
    return ShardIndex(**{name: table[name].to_numpy() for name in names}, row_group=row_group)


def _check_columns(file: pq.ParquetFile, schema: pa.Schema) -> None:
    """Raises ArrowInvalid for other columns. Not for a clear error alone: where Ray Data is imported, a column of its type for
    Python objects is unpickled when it is read, and a pickle may run any code."""
    if not file.schema_arrow.equals(schema):
        raise pa.ArrowInvalid("it has other columns than python -m headkd_ray.prepare writes")
