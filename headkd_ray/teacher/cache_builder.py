"""Filling a cache with soft targets, one (shard, view) unit at a time, in any order, on any machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from headkd_ray.data.batch import Batch, Example, collate
from headkd_ray.data.batch_stream import BatchMaker, load_samples
from headkd_ray.data.sample import Sample
from headkd_ray.memory import enough_memory
from headkd_ray.soft_targets import TopLogits, ViewTargets
from headkd_ray.teacher.source import TeacherSource
from headkd_ray.teacher.target_cache import Cache

AHEAD = 2
"""Number of row groups in progress besides the one that is being written."""


@dataclass(frozen=True)
class Builder:
    """Computes the soft targets of ``teacher`` for views and writes them to ``cache``."""

    cache: Cache
    teacher: TeacherSource
    maker: BatchMaker
    batch_size: int
    """Number of views per forward pass."""
    threads: int = 2
    """Number of decoding threads."""

    def build(self, shard: int, view: int) -> int:
        """Write the file of one unit, unless it exists and is sound.

        Returns the bytes written, 0 if the file existed. Raises DataError if a shard cannot be read, CacheError if the cache
        cannot be written.
        """
        if self.cache.sound(shard, view):
            return 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="headkd-decode") as pool:
            return self.cache.write(shard, view, self._groups(shard, view, pool))

    def shown(self, shard: int, view: int, rows: Sequence[int]) -> list[tuple[Sample, Example | None]]:
        """Read the images at ``rows`` of a shard, each with its ``view``, or None if not trained on."""
        return [(sample, self._show(sample, view)) for sample in self._samples(shard, rows, view)]

    def _samples(self, shard: int, rows: Sequence[int], view: int) -> list[Sample]:
        """Read rows of a shard, with the other images that ``view`` shows of them."""
        first = int(np.searchsorted(self.cache.shards.index.shard, shard))
        return load_samples(self.cache.shards, [first + row for row in rows], [view] * len(rows), self.maker)

    def _groups(self, shard: int, view: int, pool: ThreadPoolExecutor) -> Iterator[list[tuple[int, ViewTargets]]]:
        """Yield row groups in order. While one is written, the teacher runs on the next and the one after is decoded."""
        meta = self.cache.shards.meta
        starts = range(0, meta.shards[shard].images, meta.row_group)

        def show(start: int) -> list[tuple[Sample, Future[Example | None]]]:
            rows = range(start, min(start + meta.row_group, meta.shards[shard].images))
            return [(sample, pool.submit(self._show, sample, view)) for sample in self._samples(shard, rows, view)]

        def ask(read: Future[list[tuple[Sample, Future[Example | None]]]]) -> list[tuple[int, ViewTargets]]:
            return self.ask([(sample, shown.result()) for sample, shown in read.result()])

        with (
            ThreadPoolExecutor(1, thread_name_prefix="headkd-read") as reader,
            ThreadPoolExecutor(1, thread_name_prefix="headkd-ask") as asker,
        ):
            coming: deque[Future[list[tuple[int, ViewTargets]]]] = deque()
            for start in starts:
                coming.append(asker.submit(ask, reader.submit(show, start)))
                if len(coming) > AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _show(self, sample: Sample, view: int) -> Example | None:
        """Make the view, or return None for an image that is not trained on."""
        if sample.labelled and not len(sample.labels) and not self.maker.spec.keep_empty:
            return None
        return self.maker.example(sample, view, self.maker.view(sample.image_id, view))

    def ask(self, shown: Sequence[tuple[Sample, Example | None]]) -> list[tuple[int, ViewTargets]]:
        """Compute the teacher's targets, with views of one padded size in one batch."""
        pad = self.maker.spec.pad
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, (_, example) in enumerate(shown):
            if example is not None:
                alike.setdefault(tuple(-(-side // pad) for side in example.image.shape[1:]), []).append(place)
        answers = [(sample.image_id, self.cache.nothing()) for sample, _ in shown]
        for places in alike.values():
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                batch = collate([example for place in some if (example := shown[place][1]) is not None], 0, pad)
                for place, own in zip(some, self.answer(batch), strict=True):
                    answers[place] = (answers[place][0], own)
        return answers

    def answer(self, batch: Batch) -> list[ViewTargets]:
        """Compute the teacher's targets for each view of a batch, without padding."""
        with enough_memory("asking the teacher", f"lower teacher.batch_size ({self.batch_size})"):
            targets, *top = self.teacher.with_logits(batch.to(self.teacher.device), self.cache.codec.logits)
        views = zip(*(tensor.cpu() for tensor in (*targets, *top)), strict=True)
        return [
            ViewTargets(
                boxes[valid].numpy(),
                truth[valid].numpy(),
                taps[:, valid].numpy(),
                TopLogits(logits[valid].numpy(), classes[valid].numpy()),
            )
            for boxes, truth, valid, taps, logits, classes in views
        ]
