"""One image of a split as it is read from a shard, and reading those of a row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from headkd_ray.data.images import Reading, decode
from headkd_ray.soft_targets import PackedTargets

COLUMNS = ["image_id", "image", "boxes", "labels", "crowd", "height", "width"]
"""The columns of a shard that training reads."""


@dataclass(frozen=True)
class Sample:
    """A stored image and its boxes."""

    image_id: int
    image: bytes
    """Encoded bytes of the image file."""
    boxes: NDArray[np.float32]
    """float32 (n, 4): x1 y1 x2 y2 in pixels, without crowds."""
    labels: NDArray[np.int64]
    """int64 (n,), contiguous."""
    size: tuple[int, int]
    """Height and width in pixels, of the upright image if EXIF orientation is applied."""
    reading: Reading
    """How the image becomes pixels."""
    targets: PackedTargets | None = None
    """Soft targets of the requested view, from a cache."""
    partners: tuple[Sample, ...] = ()
    """The other images that the requested view shows: three if it is a mosaic."""
    scores: NDArray[np.float32] | None = None
    """float32 (n,): loss weight of each box, 1 for ground truth and the score of a pseudo label, 0 for one that is ignored;
    None = all are ground truth."""
    labelled: bool = True
    """Whether the image has ground truth, so that what no box covers is background."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """The loss weights of the boxes, float32 (n,)."""
        return np.ones(len(self.labels), dtype=np.float32) if self.scores is None else self.scores

    def pixels(self, least: tuple[int, int] | None = None) -> Tensor:
        """Decode the image to uint8 (3, H, W), RGB, or smaller if ``least`` says so (see ``decode``).

        Raises ValueError if the bytes are not an image of this size.
        """
        return decode(self.image, self.reading, self.size, None, least)  # prepare has checked the size


@dataclass(frozen=True)
class Expected:
    """What the index says about the images of a row group, in their order."""

    image_id: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    boxes: NDArray[np.int32]
    """Number of boxes that are not crowds."""


def samples_of(table: pa.Table, wanted: Sequence[int], expected: Expected, classes: int, reading: Reading) -> Iterator[Sample]:
    """Yield images of a row group, whose ``COLUMNS`` are in ``table``.

    Columns are read as arrays; only the bytes of wanted images become Python objects.

    Args:
        wanted: numbers of their rows in the group.

    Raises:
        ValueError: a row contradicts the index or itself, which checksums do not reveal if another program wrote the shard.
    """
    if table.num_rows != len(expected.image_id):
        raise ValueError(f"{table.num_rows} rows in a row group, the index has {len(expected.image_id)}")
    lists = {name: _filled(table[name]) for name in ("boxes", "labels", "crowd")}
    lengths = {name: np.asarray(column.value_lengths(), dtype=np.int64) for name, column in lists.items()}
    boxes = _filled(_filled(lists["boxes"].flatten()).flatten()).to_numpy().reshape(-1, 4)
    labels = _filled(lists["labels"].flatten()).to_numpy().astype(np.int64)
    crowd = _filled(lists["crowd"].flatten()).to_numpy(zero_copy_only=False)
    ids = {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in ("image_id", "height", "width")}
    _check_rows(ids, lengths, expected)
    first = np.concatenate([[0], np.cumsum(lengths["boxes"])])
    _check_boxes(boxes, labels, crowd, first, expected, classes)
    images, whole = _filled(table["image"]), ~crowd
    for row in wanted:
        mine = np.arange(first[row], first[row + 1])
        mine = mine[whole[mine]]
        size = (int(expected.height[row]), int(expected.width[row]))
        yield Sample(int(expected.image_id[row]), images[row].as_py(), boxes[mine], labels[mine], size, reading)


class Annotations(NamedTuple):
    """Boxes of several images that are not crowds."""

    rows: NDArray[np.int64]
    """Row of the index of each box's image, int64 (n,), ascending."""
    labels: NDArray[np.int64]
    """int64 (n,), contiguous."""
    boxes: NDArray[np.float32]
    """float32 (n, 4): x1 y1 x2 y2 in pixels of the stored image."""


def annotations_of(table: pa.Table, expected: Expected, classes: int, start: int) -> Annotations:
    """Return the boxes of a shard that are not crowds.

    Args:
        table: the columns ``boxes``, ``labels`` and ``crowd``.
        expected: what the index says about the images.
        start: number of the first row.

    Raises:
        ValueError: a row contradicts the index or itself.
    """
    column = _filled(table["boxes"])
    lengths = np.asarray(column.value_lengths(), dtype=np.int64)
    boxes = _filled(_filled(column.flatten()).flatten()).to_numpy().reshape(-1, 4)
    labels = _filled(_filled(table["labels"]).flatten()).to_numpy().astype(np.int64)
    crowd = _filled(_filled(table["crowd"]).flatten()).to_numpy(zero_copy_only=False)
    if table.num_rows != len(expected.image_id) or not len(boxes) == len(labels) == len(crowd):
        raise ValueError("its boxes are not those that the index counts")
    first = np.concatenate([[0], np.cumsum(lengths)])
    _check_boxes(boxes, labels, crowd, first, expected, classes)
    rows, whole = np.repeat(np.arange(table.num_rows), lengths), ~crowd
    return Annotations(start + rows[whole], labels[whole], boxes[whole])


def labels_of(
    table: pa.Table, expected: NDArray[np.int32], classes: int, start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row and the label of each box of a shard that is not a crowd, both int64 (n,).

    Args:
        table: the columns ``labels`` and ``crowd``.
        expected: number of such boxes in each row.
        start: number of the first row.

    Raises:
        ValueError: a row has another number of them, or a label is none of the ``classes``.
    """
    column = _filled(table["labels"])
    labels = _filled(column.flatten()).to_numpy().astype(np.int64)
    whole = ~_filled(_filled(table["crowd"]).flatten()).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(table.num_rows), np.asarray(column.value_lengths()))
    if len(whole) != len(rows) or not np.array_equal(np.bincount(rows[whole], minlength=len(expected)), expected):
        raise ValueError("its labels are not those that the index counts")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()}, of {classes} classes")
    return start + rows[whole], labels[whole]


def _check_rows(ids: dict[str, NDArray[Any]], lengths: dict[str, NDArray[np.int64]], expected: Expected) -> None:
    """Raise ValueError for the first row that is another image than the index has, or whose columns differ in length."""
    same = np.all([values == getattr(expected, name) for name, values in ids.items()], axis=0)
    if not same.all():
        raise ValueError(f"image {expected.image_id[np.argmin(same)]}: id or size differs from the index")
    equal = np.all([counts == lengths["boxes"] for counts in lengths.values()], axis=0)
    if not equal.all():
        row = int(np.argmin(equal))
        found = ", ".join(f"{counts[row]} {name}" for name, counts in lengths.items())
        raise ValueError(f"image {expected.image_id[row]}: {found} flags")


def _check_boxes(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    crowd: NDArray[np.bool_],
    first: NDArray[np.int64],
    expected: Expected,
    classes: int,
) -> None:
    """Raise ValueError for the first row with another number of boxes than the index has, or with impossible boxes or labels.

    Args:
        boxes, labels, crowd: those of all rows, end to end.
        first: where each row's boxes begin, and where the last row's end.
    """
    whole = np.concatenate([[0], np.cumsum(~crowd)])
    counted = whole[first[1:]] - whole[first[:-1]]
    differing = np.flatnonzero(counted != expected.boxes)
    if len(differing):
        row = int(differing[0])
        raise ValueError(f"image {expected.image_id[row]}: {counted[row]} boxes; the index counts {expected.boxes[row]}")
    row_of = np.repeat(np.arange(len(expected.image_id)), np.diff(first))
    strange = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(strange):
        box = int(strange[0])
        raise ValueError(f"image {expected.image_id[row_of[box]]}: label {labels[box]}, of {classes} classes")
    limits = np.stack([expected.width, expected.height] * 2, axis=1)[row_of]
    fit = ((boxes >= 0) & (boxes <= limits)).all(axis=1) & (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
    if not fit.all():
        raise ValueError(f"image {expected.image_id[row_of[np.argmin(fit)]]}: a box is not x1 y1 x2 y2 inside the image")


def _filled(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array. Raises ValueError if an entry is missing."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError("an entry is missing")
    return array
