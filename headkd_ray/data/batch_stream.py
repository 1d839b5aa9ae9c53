"""Turn windows into batches: the two steps that every stream runs, and the stream that runs in this process.

``load_window`` reads a window's row groups, each once; ``BatchMaker`` decodes, augments and pads the images of one batch. The
Ray stream (``headkd_ray.cluster.ray_stream``) runs the same two functions, so both yield the same batches bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from headkd_ray.data.batch import Batch, Example, collate, idle_batch
from headkd_ray.data.epoch_order import Window
from headkd_ray.data.shards import Sample, ShardSet
from headkd_ray.data.views import View, apply_view, eval_view, train_view, view_number, view_size
from headkd_ray.errors import DataError
from headkd_ray.job import DataSpec
from headkd_ray.soft_targets import PackedTargets, ViewTargets, stack

READERS = 8  # row groups read in parallel: hides a remote filesystem's latency, costs nothing on a local one


class TargetReader(Protocol):
    """A reader of a soft-target cache that has the same layout as the shards."""

    @property
    def budget(self) -> int:
        """RoIs per view."""

    def read_group(self, shard: int, group: int, rows: Sequence[int], view: int) -> list[PackedTargets]:
        """Return the packed targets of ``view`` for the images at ``rows`` of a shard, all within one row group."""

    def unpack(self, packed: PackedTargets, image_id: int, view: int) -> ViewTargets:
        """Decode the targets, which must be those of the given image and view."""

    def nothing(self) -> ViewTargets:
        """Return the targets of the blank image in an idle batch."""


@dataclass(frozen=True)
class PendingBatch:
    """The images of one batch before decoding."""

    epoch: int
    step: int
    samples: tuple[Sample, ...]
    """The images; empty = the rank is idle in this step."""


def load_window(shards: ShardSet, window: Window, maker: BatchMaker) -> list[PendingBatch]:
    """Read the window's images, and their targets if ``maker`` has a cache, still packed, in the order of its batches.

    Raises DataError, CacheError.
    """
    index, rows = shards.index, window.rows
    wanted: dict[tuple[int, int], list[int]] = {}
    for row in rows.tolist():
        wanted.setdefault((int(index.shard[row]), int(index.row[row]) // index.row_group), []).append(row)

    def read(group: tuple[tuple[int, int], list[int]]) -> list[Sample]:
        (shard, number), members = group
        places = [int(index.row[row]) for row in members]
        samples = shards.read_group(shard, number, places)
        if maker.cache is None:
            return samples
        packed = maker.cache.read_group(shard, number, places, view_number(window.epoch, maker.spec))
        return [replace(sample, targets=own) for sample, own in zip(samples, packed, strict=True)]

    with ThreadPoolExecutor(READERS, thread_name_prefix="headkd-read") as pool:
        groups = list(pool.map(read, wanted.items()))
    by_row = dict(zip(chain.from_iterable(wanted.values()), chain.from_iterable(groups), strict=True))
    return [PendingBatch(window.epoch, batch.step, tuple(by_row[row] for row in batch.rows)) for batch in window.batches]


@dataclass(frozen=True)
class BatchMaker:
    """Decodes and augments images, as a function of (image, epoch, seed) alone."""

    spec: DataSpec
    seed: int
    train: bool
    """True = random views of the epoch; False = the evaluation view."""
    cache: TargetReader | None = None
    """Cache with the soft targets of the views."""

    def __call__(self, pending: PendingBatch) -> Batch:
        """Make one batch. Raises DataError naming the image."""
        if not pending.samples:
            idle = idle_batch(pending.step, self.spec.short_side[0], self.spec.pad)
            return idle if self.cache is None else replace(idle, targets=stack([self.cache.nothing()], self.cache.budget))
        number = view_number(pending.epoch, self.spec)
        views = [self.view(sample.image_id, number) for sample in pending.samples]
        sizes = [view_size(*sample.size, view) for sample, view in zip(pending.samples, views, strict=True)]
        examples = (self.example(sample, number, view) for sample, view in zip(pending.samples, views, strict=True))
        return collate(examples, pending.step, self.spec.pad, self.cache.budget if self.cache else 0, sizes)

    def view(self, image_id: int, number: int) -> View:
        """Return the parameters of view ``number`` of the image."""
        return train_view(image_id, number, self.seed, self.spec) if self.train else eval_view(self.spec)

    def pixels(self, pending: PendingBatch) -> int:
        """Return the bytes of the batch's images before padding, without decoding them."""
        number = view_number(pending.epoch, self.spec)
        sizes = (view_size(*sample.size, self.view(sample.image_id, number)) for sample in pending.samples)
        return 3 * sum(height * width for height, width in sizes)

    def example(self, sample: Sample, number: int, view: View) -> Example:
        """Decode view ``number`` of an image, whose parameters are ``view``. Raises DataError, CacheError."""
        try:
            image, boxes = apply_view(sample.pixels(), sample.boxes, view)
        except ValueError as error:
            raise DataError(f"image {sample.image_id} in the prepared shards: {error}; prepare the split again") from error
        targets = None
        if self.cache is not None and sample.targets is not None:
            targets = self.cache.unpack(sample.targets, sample.image_id, number)
        return Example(image, boxes, sample.labels, sample.image_id, sample.size, number if self.train else -1, targets)


def local_stream(
    shards: ShardSet, windows: Iterable[Window], maker: BatchMaker, *, threads: int = 2, ahead: int | None = None
) -> Generator[Batch, None, None]:
    """Yield the batches of ``windows`` in order, read and decoded ahead by threads of this process.

    Decoding and resizing release the GIL, so threads scale. Close the generator (or exhaust it) to end the threads; a thread's
    exception is raised at the batch it belongs to.

    Args:
        threads: decoding threads.
        ahead: batches decoded ahead; None = twice ``threads``. Memory holds these and the encoded images of two windows.
    """
    limit = ahead or 2 * threads
    reader = ThreadPoolExecutor(1, thread_name_prefix="headkd-window")
    decoders = ThreadPoolExecutor(threads, thread_name_prefix="headkd-decode")
    try:
        batches: deque[Future[Batch]] = deque()
        for pending in _read_ahead(shards, windows, maker, reader):
            batches.append(decoders.submit(maker, pending))
            if len(batches) > limit:
                yield batches.popleft().result()
        while batches:
            yield batches.popleft().result()
    finally:
        for pool in (reader, decoders):
            pool.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    shards: ShardSet, windows: Iterable[Window], maker: BatchMaker, reader: ThreadPoolExecutor
) -> Iterator[PendingBatch]:
    """Yield undecoded batches in order, reading one window ahead."""
    coming: deque[Future[list[PendingBatch]]] = deque()
    for window in windows:
        coming.append(reader.submit(load_window, shards, window, maker))
        if len(coming) > 1:
            yield from coming.popleft().result()
    while coming:
        yield from coming.popleft().result()
