"""Measure what each placement of the teacher costs on this machine, in short, alternating stretches of real training steps."""

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
from headkd_ray.distill import build_training_model, load_start
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.loop import smaller_steps
from headkd_ray.engine.step import build_learner, train_step
from headkd_ray.engine.streams import Decode, Streams, on_device
from headkd_ray.errors import DataError
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory
from headkd_ray.teacher import Builder, Cache, TeacherSource, builder_of, soft_teacher
from headkd_ray.teacher.loading import teacher_of

WARM_UP = 2
"""Number of first steps of every stretch that are not counted."""


BARE_VIEWS = 64
"""Number of views on which the teacher alone is timed."""


@dataclass
class Placement:
    """A way to get the teacher's outputs, and its measured cost."""

    name: str
    job: Job
    decode: Decode
    asked: TeacherSource | None = None
    cache: Cache | None = None
    teacher: bool = True
    """Whether a teacher is used; without one the assistant learns from labels alone."""
    seconds: list[float] = field(default_factory=list)
    """Duration of each stretch, in seconds."""
    waited: list[float] = field(default_factory=list)
    """Seconds of each stretch that were spent waiting for batches."""
    rates: list[float] = field(default_factory=list)
    """Images per second of each stretch."""


@dataclass(frozen=True)
class Building:
    """The measured cost of filling a cache."""

    views: int
    seconds: float
    bytes: int
    read_seconds: float
    """Seconds to read the whole cache."""
    asked_seconds: float
    """Seconds that the teacher alone takes for as many views that are already decoded."""


def some_shards(shards: ShardSet, images: int) -> ShardSet:
    """Return the first shards of a split that together hold at least ``images`` images, or all if there are fewer."""
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
    """Train ``rounds`` stretches of ``steps`` steps with each placement in turn, and record their durations."""
    distributed = Distributed.here(placements[0].job.cluster)
    for _ in range(rounds):
        for placement in placements:
            with enough_memory(f"teacher {placement.name}", smaller_steps(placement.job)):
                _stretch(placement, shards, steps, distributed)


def _stretch(placement: Placement, shards: ShardSet, steps: int, distributed: Distributed) -> None:
    job = placement.job
    classes = shards.meta.classes
    teacher = teacher_of(job, classes)
    model = build_training_model(job, len(classes), teacher, steps_per_epoch=1, start=load_start(job, classes))
    if not placement.teacher:
        model = model.without_teacher()
    job = job.replace({"optim.lr": 1e-9})  # costs the same work, and the loss cannot diverge
    learner = build_learner(job, model, distributed.device, job.data.batch_size, steps_per_epoch=1)
    learner.soft_teacher = placement.asked
    alone = job.replace({"cluster.workers": 1})  # so that this process runs one rank only
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
    """Yield each batch with the seconds spent waiting for it."""
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
    """Return the images per second of the median stretch."""
    return median(placement.rates)


def fill(job: Job, shards: ShardSet, distributed: Distributed) -> tuple[Builder, Building]:
    """Fill the job's cache for all its views of ``shards``, read it back, and time the teacher alone on one file's views."""
    teacher = teacher_of(job, shards.meta.classes)
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
    """Return the teacher's seconds per view, at the builder's batch size, for views that are already decoded in memory."""
    meta = builder.cache.shards.meta
    starts = range(0, min(BARE_VIEWS, meta.shards[0].images), meta.row_group)
    groups = [builder.shown(0, 0, range(start, min(start + meta.row_group, meta.shards[0].images))) for start in starts]
    builder.ask(groups[0])  # warms up
    started = time.perf_counter()
    for group in groups:
        builder.ask(group)
    return (time.perf_counter() - started) / max(1, sum(example is not None for group in groups for _, example in group))


def inline(job: Job, shards: ShardSet, distributed: Distributed) -> TeacherSource:
    """Load the job's teacher as a soft teacher in this process."""
    teacher = teacher_of(job, shards.meta.classes)
    return soft_teacher(job, teacher, distributed.device)
