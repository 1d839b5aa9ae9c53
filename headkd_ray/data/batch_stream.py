"""Turn windows into batches: the two steps that every stream runs, and the stream that runs in this process.

``load_window`` reads a window's row groups, each once; ``BatchMaker`` decodes, augments and pads the images of one batch. The
Ray stream (``headkd_ray.cluster.ray_stream``) runs the same two functions, so both yield the same batches bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Protocol

import numpy as np

from headkd_ray.data.batch import Batch, Example, collate, idle_batch
from headkd_ray.data.epoch_order import Window, train_rows
from headkd_ray.data.partners import Partners
from headkd_ray.data.sample import Sample
from headkd_ray.data.shards import READERS, ShardIndex, ShardSet
from headkd_ray.data.views import View, eval_view, show, train_view, view_number, view_size
from headkd_ray.errors import DataError
from headkd_ray.job import DataSpec
from headkd_ray.soft_targets import PackedTargets, ViewTargets, stack


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

    step: int
    samples: tuple[Sample, ...]
    """The images; empty = the rank is idle in this step."""
    numbers: tuple[int, ...]
    """The number of each image's view."""


def load_window(shards: ShardSet, window: Window, maker: BatchMaker) -> list[PendingBatch]:
    """Read the window's images, and their targets if ``maker`` has a cache, still packed, in the order of its batches.

    Raises DataError, CacheError.
    """
    numbers = [tuple(view_number(window.epoch, maker.spec, copy) for copy in batch.copies) for batch in window.batches]
    rows = [batch.rows for batch in window.batches]
    samples = iter(load_samples(shards, list(chain(*rows)), list(chain(*numbers)), maker))
    return [
        PendingBatch(batch.step, tuple(islice(samples, len(batch.rows))), views)
        for batch, views in zip(window.batches, numbers, strict=True)
    ]


def load_samples(shards: ShardSet, rows: Sequence[int], numbers: Sequence[int], maker: BatchMaker) -> list[Sample]:
    """Read the images at ``rows`` of the index, with what views ``numbers`` of them show besides, each row group once.

    Raises DataError, CacheError.
    """
    index, cache = shards.index, maker.cache
    partners = _partners(shards, rows, numbers, maker)

    def read(place: tuple[int, int], own: list[int]) -> list[Sample]:
        return shards.read_group(*place, rows=index.row[own].tolist())

    def read_targets(number: int, place: tuple[int, int], own: list[int]) -> list[PackedTargets]:
        assert cache is not None
        return cache.read_group(*place, rows=index.row[own].tolist(), view=number)

    with ThreadPoolExecutor(READERS, thread_name_prefix="headkd-read") as pool:
        groups = _by_group(index, {*rows, *chain(*partners)})
        found = dict(zip(chain(*groups.values()), chain(*pool.map(read, groups, groups.values())), strict=True))
        targets: dict[tuple[int, int], PackedTargets] = {}
        for number in sorted(set(numbers)) if cache is not None else ():
            groups = _by_group(index, {row for row, own in zip(rows, numbers, strict=True) if own == number})
            packed = chain(*pool.map(partial(read_targets, number), groups, groups.values()))
            targets |= {(row, number): each for row, each in zip(chain(*groups.values()), packed, strict=True)}
    return [
        replace(found[row], targets=targets.get((row, number)), partners=tuple(found[other] for other in others))
        for row, number, others in zip(rows, numbers, partners, strict=True)
    ]


def _partners(shards: ShardSet, rows: Sequence[int], numbers: Sequence[int], maker: BatchMaker) -> list[list[int]]:
    """Return the rows of the other images that each view shows, mostly none."""
    index = shards.index
    others: list[list[int]] = [[] for _ in rows]
    if not maker.train or not maker.spec.augment.mosaic:
        return others
    trained = train_rows(index, maker.spec.keep_empty)
    # Labelled images are joined with labelled ones, and others with others: of a view, either all is known or nothing is.
    sources = [Partners(index, trained[index.has_truth[trained] == labelled], maker.seed) for labelled in (False, True)]
    known = np.isin(rows, trained)
    for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        count = maker.view(int(index.image_id[row]), number).partners
        if count and known[place]:
            others[place] = sources[int(index.has_truth[row])].of(row, number, count)
    return others


def _by_group(index: ShardIndex, rows: set[int]) -> dict[tuple[int, int], list[int]]:
    """Return the rows by (shard, row group in it), in ascending order."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row in sorted(rows):
        groups.setdefault((int(index.shard[row]), int(index.row[row]) // index.row_group), []).append(row)
    return groups


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
        views = self.views(pending)
        sizes = [view_size(*sample.size, view) for sample, view in zip(pending.samples, views, strict=True)]
        examples = map(self.example, pending.samples, pending.numbers, views)
        return collate(examples, pending.step, self.spec.pad, self.cache.budget if self.cache else 0, sizes)

    def view(self, image_id: int, number: int) -> View:
        """Return the parameters of view ``number`` of the image."""
        return train_view(image_id, number, self.seed, self.spec) if self.train else eval_view(self.spec)

    def views(self, pending: PendingBatch) -> list[View]:
        """Return the parameters of the batch's views."""
        return [self.view(sample.image_id, number) for sample, number in zip(pending.samples, pending.numbers, strict=True)]

    def pixels(self, pending: PendingBatch) -> int:
        """Return the bytes of the batch's images before padding, without decoding them."""
        shown = zip(pending.samples, self.views(pending), strict=True)
        return 3 * sum(math.prod(view_size(*sample.size, view)) for sample, view in shown)

    def example(self, sample: Sample, number: int, view: View) -> Example:
        """Decode view ``number`` of an image, whose parameters are ``view``. Raises DataError, CacheError."""
        images = (sample, *sample.partners)
        try:
            shown = show(images, view)
        except ValueError as error:
            raise DataError(f"{_named(images)} in the prepared shards: {error}; prepare the split again") from error
        targets = None
        if self.cache is not None and sample.targets is not None:
            targets = self.cache.unpack(sample.targets, sample.image_id, number)
        return Example(
            image=shown.pixels,
            boxes=shown.boxes,
            labels=shown.labels,
            image_id=sample.image_id,
            original_size=sample.size,
            view=number if self.train else -1,
            targets=targets,
            weights=shown.weights,
            background=sample.labelled or bool((shown.weights > 0).any()),
        )


def _named(images: Sequence[Sample]) -> str:
    ids = ", ".join(str(image.image_id) for image in images)
    return f"image {ids}" if len(images) == 1 else f"one of images {ids}"


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
