"""What each placement of the teacher costs on this machine: short stretches of real training steps, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median

import torch

from headkd_ray.data.batch import Batch
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.two_stage import answers_about_rois
from headkd_ray.distill import build_training_model
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.loop import smaller_steps
from headkd_ray.engine.step import build_learner, train_step
from headkd_ray.engine.streams import Decode, Streams, on_device
from headkd_ray.errors import DataError, JobError
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory
from headkd_ray.teacher import Builder, Cache, SoftTeacher, builder_of, soft_teacher
from headkd_ray.teacher.loading import teacher_of

WARM_UP = 2
"""Steps of every stretch that are not counted."""


BARE_VIEWS = 64
"""Views that the teacher alone is asked about."""


@dataclass
class Placement:
    """A way to get the teacher's answers, and what it was measured to cost."""

    name: str
    job: Job
    decode: Decode
    asked: SoftTeacher | None = None
    cache: Cache | None = None
    teacher: bool = True
    """False: the assistant learns from labels alone."""
    seconds: list[float] = field(default_factory=list)
    """Of the stretches."""
    waited: list[float] = field(default_factory=list)
    """Of these, spent waiting for batches."""
    rates: list[float] = field(default_factory=list)
    """Images a second of the stretches."""


@dataclass(frozen=True)
class Building:
    """What filling a cache was measured to cost."""

    views: int
    seconds: float
    bytes: int
    read_seconds: float
    """To read it all again."""
    asked_seconds: float
    """That the teacher alone takes for as many views, already decoded."""


def some_shards(shards: ShardSet, images: int) -> ShardSet:
    """The first shards of a split that together hold at least ``images`` images; all if there are fewer."""
    count = kept = 0
    while kept < len(shards.meta.shards) and count < images:
        count += shards.meta.shards[kept].images
        kept += 1
    index, inside = shards.index, shards.index.shard < kept
    names = ("image_id", "width", "height", "shard", "row", "boxes")
    fewer = replace(index, **{name: getattr(index, name)[inside] for name in names})
    meta = replace(shards.meta, shards=shards.meta.shards[:kept], images=count, fingerprint=f"{shards.meta.fingerprint}/{kept}")
    return ShardSet(shards.folder, meta, fewer)


def measure(placements: list[Placement], shards: ShardSet, steps: int, rounds: int) -> None:
    """Train ``rounds`` stretches of ``steps`` steps in each placement, in turns, and note how long they took."""
    distributed = Distributed.here(placements[0].job.cluster)
    for _ in range(rounds):
        for placement in placements:
            with enough_memory(f"teacher {placement.name}", smaller_steps(placement.job)):
                _stretch(placement, shards, steps, distributed)


def _stretch(placement: Placement, shards: ShardSet, steps: int, distributed: Distributed) -> None:
    job = placement.job
    teacher = teacher_of(job, shards.meta.classes)
    model = build_training_model(job, len(shards.meta.classes), teacher, steps_per_epoch=1)
    if not placement.teacher:
        model = model.without_teacher()
    job = job.replace({"optim.lr": 1e-9})  # as much work as any rate, and no loss explodes
    learner = build_learner(job, model, distributed.device, job.data.batch_size, steps_per_epoch=1)
    learner.soft_teacher = placement.asked
    alone = job.replace({"cluster.workers": 1})  # plays its own rank only
    streams = Streams(alone, distributed, shards, shards, placement.decode)
    waited = started = 0.0
    images = 0
    with ExitStack() as stack:
        stream = stack.enter_context(streams.train(first=0, cache=placement.cache))
        batches = _timed(islice(on_device(stream, distributed.device), WARM_UP + steps))
        for number, (batch, seconds) in enumerate(batches):
            if number == WARM_UP:
                _finish(distributed)
                started, waited, images = time.perf_counter() - seconds, 0.0, 0
            waited += seconds
            images += len(batch.images)
            train_step(learner, job, iter([batch]))
        _finish(distributed)
        if not started:
            raise DataError(
                f"{job.data.train}: too few images for {WARM_UP + 1} steps of data.batch_size {job.data.batch_size}"
            )
        placement.seconds.append(time.perf_counter() - started)
        placement.rates.append(images / placement.seconds[-1])
        placement.waited.append(waited)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that it was waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _finish(distributed: Distributed) -> None:
    if distributed.device.type == "cuda":
        torch.cuda.synchronize(distributed.device)


def images_per_second(placement: Placement) -> float:
    """Of the median stretch."""
    return median(placement.rates)


def fill(job: Job, shards: ShardSet, distributed: Distributed) -> tuple[Builder, Building]:
    """Fill the job's cache for all its views of ``shards``, read it again, and ask the bare teacher about one file's views."""
    teacher = teacher_of(job, shards.meta.classes)
    if not answers_about_rois(teacher):
        kind = teacher.spec.kind
        raise JobError(
            f"teacher.checkpoint: only a faster_rcnn chooses RoIs for others, so there is nothing to compare; got a {kind}"
        )
    builder = builder_of(job, shards, teacher, distributed.device)
    cache = builder.cache
    cache.begin()
    started = time.perf_counter()
    size = sum(builder.build(*unit) for unit in cache.units())
    built = time.perf_counter()
    assert all(cache.sound(*unit) for unit in cache.units())
    read = time.perf_counter()
    views = cache.views * int((shards.index.boxes > 0).sum())
    return builder, Building(views, built - started, size, read - built, views * _bare(builder))


def _bare(builder: Builder) -> float:
    """Seconds a view of the teacher alone, at the builder's batch size, on views that lie decoded in memory."""
    meta = builder.cache.shards.meta
    starts = range(0, min(BARE_VIEWS, meta.shards[0].images), meta.row_group)
    groups = [
        builder.shown(0, start // meta.row_group, 0, range(start, min(start + meta.row_group, meta.shards[0].images)))
        for start in starts
    ]
    builder.ask(groups[0])  # warms up
    started = time.perf_counter()
    for group in groups:
        builder.ask(group)
    return (time.perf_counter() - started) / max(1, sum(example is not None for group in groups for _, example in group))


def inline(job: Job, shards: ShardSet, distributed: Distributed) -> SoftTeacher:
    """The job's teacher, to be asked in place."""
    teacher = teacher_of(job, shards.meta.classes)
    return soft_teacher(job, teacher, distributed.device)
