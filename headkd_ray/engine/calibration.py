"""What a job's parts take on this machine: a few real training steps, and the decoding and the evaluation around them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from headkd_ray.data.batch import Batch
from headkd_ray.data.plan import Window
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.stream import BatchMaker, load_window
from headkd_ray.detectors import FasterRCNN, RoIs
from headkd_ray.distill import Guest, Insight, build_trainee
from headkd_ray.engine.evaluate import predict
from headkd_ray.engine.loop import build_ema, smaller_steps
from headkd_ray.engine.optim import build_optimizer
from headkd_ray.engine.planning import Costs
from headkd_ray.engine.streams import Streams
from headkd_ray.engine.teacher import load_teacher
from headkd_ray.engine.world import World
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory
from headkd_ray.teacher import codec_of, soft_teacher
from headkd_ray.teacher.codec import Codec

WARM_UP = 2
"""Steps that are not counted."""


@dataclass(frozen=True)
class Calibration:
    """Of one worker."""

    costs: Costs
    device: torch.device
    codec: Codec | None
    """How a cache would keep what the teacher says; None if it can keep nothing of it."""


def calibrate(job: Job, train: ShardSet, val: ShardSet, steps: int) -> Calibration:
    """Time ``steps`` micro-batches of the job's own data, trainee and teacher in this process, one after another.

    A fitnet teacher, whose features are part of the trainee's forward pass, is counted with the trainee.

    Raises:
        DeviceMemoryError: a step needs more memory than there is.
        CheckpointError, DataError, JobError: as the teacher's, the data's and the trainee's readers do.
    """
    cluster = job.cluster
    if cluster.workers != 0 and cluster.threads_per_worker is None:  # as a worker on Ray takes it
        cluster = cluster.replace({"threads_per_worker": max(1, int(cluster.cpus_per_worker))})
    world = World.here(cluster)
    count = WARM_UP + steps
    # One rank and one window, so that no image is read that is not shown.
    window = count * job.data.batch_size
    sample = job.replace({"cluster": cluster, "cluster.workers": 0, "data.shuffle_window": window})
    streams = Streams(sample, world, train, val, _one_by_one)
    with _Watch(world) as decoding, streams.train(first=0) as stream:
        batches = [batch for batch in islice(stream, count) if not batch.idle]
    learner = _Learner(job, train.meta.classes, world)
    with enough_memory("timing training steps", smaller_steps(job)):
        for batch in islice(cycle(batches), count):
            learner.step(batch.to(world.device))
    with streams.val() as stream:
        shown = list(islice(stream, steps))
    with _Watch(world) as evaluation:
        predict(learner.trainee.student, shown, world.device, streams.scoring.category_ids, job.optim.precision)
    trained = [parameter for parameter in learner.trainee.parameters() if parameter.requires_grad]
    return Calibration(
        Costs(
            image_seconds=decoding.seconds / _images(batches),
            student_seconds=median(learner.student[WARM_UP:]),
            teacher_seconds=median(learner.teacher[WARM_UP:]),
            update_seconds=median(learner.update[WARM_UP:]),
            eval_seconds=evaluation.seconds / _images(shown),
            pixel_bytes=sum(batch.images.nbytes for batch in batches) / len(batches),
            answer_bytes=learner.answer_bytes,
            parameters=sum(parameter.numel() for parameter in trained),
            busy_cpus=1 if world.device.type == "cuda" else torch.get_num_threads(),
        ),
        world.device,
        learner.codec,
    )


class _Learner:
    """The job's trainee and, apart from it, its teacher; ``student``, ``teacher``, ``update`` collect seconds, a step each."""

    def __init__(self, job: Job, classes: tuple[str, ...], world: World) -> None:
        self.job, self.world = job, world
        loaded = load_teacher(job, classes)
        detector = None if loaded is None else loaded.detector
        apart = job
        if job.teacher is not None:  # placed in a pool, the teacher is not the trainee's
            apart = job.replace({"teacher.placement": "pool"})
        self.trainee = build_trainee(apart, len(classes), detector, steps_per_epoch=1)
        self.trainee.to(world.device).to(memory_format=torch.channels_last).train()
        still = job.optim.replace({"lr": 1e-9})  # as much work as any rate, and no loss explodes
        self.optimizer, _ = build_optimizer(still, self.trainee.parameters(), job.data.batch_size, steps_per_epoch=1)
        self.ema = build_ema(job, self.trainee.student)
        self.guest = self.soft = None
        if detector is not None and job.method in ("akd", "head"):
            if job.distill.rois == "teacher":
                self.soft = soft_teacher(job, detector, world.device)
            else:
                self.guest = Guest(detector.to(world.device).to(memory_format=torch.channels_last))
        self.codec = codec_of(job, detector) if isinstance(detector, FasterRCNN) else None
        self.answer_bytes = 0
        self.student: list[float] = []
        self.teacher: list[float] = []
        self.update: list[float] = []

    def step(self, batch: Batch) -> None:
        """One micro-batch and the optimizer's step after it."""
        self.teacher.append(0.0)
        with _Watch(self.world) as passes:
            given = self.answers(batch)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.job.optim.precision == "bf16"):
                losses = self.trainee(batch.images, batch.sizes, batch.boxes, batch.labels, len(self.student), **given)
            torch.stack(list(losses.values())).sum().backward()
        with _Watch(self.world) as update:
            if self.job.optim.clip_norm is not None:
                clip_grad_norm_(self.trainee.parameters(), self.job.optim.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update_parameters(self.trainee.student)
        self.student.append(passes.seconds - self.teacher[-1])
        self.update.append(update.seconds)

    def answers(self, batch: Batch) -> dict[str, Any]:
        """What the trainee is given of its teacher: targets, or whom to ask, and the time that takes is noted."""
        if self.soft is not None:
            with self.asking():
                targets = self.soft(batch)
            self.answer_bytes = sum(tensor.nbytes for tensor in targets)
            return {"targets": targets}
        guest = self.guest
        if guest is None:
            return {}

        def ask(rois: Sequence[RoIs], device: torch.device) -> Insight:
            with self.asking():
                found = guest.insight(guest.detector.normalise(batch.images, batch.sizes), rois)
            self.answer_bytes = sum(
                tensor.nbytes for tap in found.taps for tensor in ([tap] if isinstance(tap, Tensor) else tap)
            )
            return found

        return {"ask": ask}

    @contextmanager
    def asking(self) -> Iterator[None]:
        with _Watch(self.world) as watch:
            yield
        self.teacher[-1] += watch.seconds


class _Watch:
    """Seconds spent in a ``with`` block, the device's work included."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> _Watch:
        self._finish()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self._finish()
        self.seconds = time.perf_counter() - self.started

    def _finish(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def _one_by_one(shards: ShardSet, windows: Iterable[Window], maker: BatchMaker) -> AbstractContextManager[Iterator[Batch]]:
    """Decode in this thread alone: what one CPU can."""
    return closing(maker(pending) for window in windows for pending in load_window(shards, window, maker))


def _images(batches: Iterable[Batch]) -> int:
    return sum(len(batch.images) for batch in batches)
