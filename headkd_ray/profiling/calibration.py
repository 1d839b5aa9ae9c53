"""Measure what the parts of a job cost on this machine: a few real training steps, and decoding and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from statistics import median

import torch
from torch import Tensor

from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, load_window
from headkd_ray.data.epoch_order import Window
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import PyramidDetector, RoIs
from headkd_ray.distill import FrozenTeacher, HeadFeatures, build_training_model, load_start
from headkd_ray.distill.start import with_architecture
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import predict
from headkd_ray.engine.loop import smaller_steps
from headkd_ray.engine.step import build_learner, train_step
from headkd_ray.engine.streams import Streams
from headkd_ray.job import METHODS, Job
from headkd_ray.memory import enough_memory
from headkd_ray.profiling.cost_model import Costs
from headkd_ray.teacher import codec_of, soft_teacher
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.loading import load_teacher
from headkd_ray.teacher.source import can_choose_rois

WARM_UP = 2
"""Number of first steps that are not counted."""


@dataclass(frozen=True)
class Calibration:
    """Measurements of one worker."""

    costs: Costs
    device: torch.device
    codec: Codec | None
    """How a cache would store the teacher's soft targets; None if they cannot be cached."""


def calibrate(job: Job, train: ShardSet, val: ShardSet, steps: int) -> Calibration:
    """Time ``steps`` micro-batches of the job's own data, training model and teacher, one after another, in this process.

    A fitnet teacher, whose features are part of the model's forward pass, is counted with the model.

    Raises:
        DeviceMemoryError: a step needs more memory than is available.
        CheckpointError, DataError, JobError: the teacher, the data or the student cannot be loaded.
    """
    cluster = job.cluster
    if cluster.workers != 0 and cluster.threads_per_worker is None:  # the default of a worker on Ray
        cluster = cluster.replace({"threads_per_worker": max(1, int(cluster.cpus_per_worker))})
    distributed = Distributed.here(cluster)
    count = WARM_UP + steps
    # With one rank and one window, only images that are used are read.
    window = count * job.data.batch_size
    sample = job.replace({"cluster": cluster, "cluster.workers": 0, "data.shuffle_window": window})
    streams = Streams(sample, distributed, train, val, _one_by_one)
    with _Watch(distributed) as decoding, streams.train(first=0) as stream:
        batches = [batch for batch in islice(stream, count) if not batch.idle]
    timed = _TimedLearner(job, train.meta.classes, distributed)
    with enough_memory("timing training steps", smaller_steps(job)):
        for batch in islice(cycle(batches), count):
            timed.step(batch.to(distributed.device))
    with streams.val() as stream:
        shown = list(islice(stream, steps))
    with _Watch(distributed) as evaluation:
        predict(timed.learner.student, shown, distributed.device, streams.scoring.category_ids, job.optim.precision)
    trained = [parameter for parameter in timed.learner.model.parameters() if parameter.requires_grad]
    return Calibration(
        Costs(
            image_seconds=decoding.seconds / _images(batches),
            student_seconds=median(timed.student[WARM_UP:]),
            teacher_seconds=median(timed.teacher[WARM_UP:]),
            update_seconds=median(timed.update[WARM_UP:]),
            eval_seconds=evaluation.seconds / _images(shown),
            pixel_bytes=sum(batch.images.nbytes for batch in batches) / len(batches),
            answer_bytes=timed.answer_bytes,
            parameters=sum(parameter.numel() for parameter in trained),
            busy_cpus=1 if distributed.device.type == "cuda" else torch.get_num_threads(),
        ),
        distributed.device,
        timed.codec,
    )


class _TimedLearner:
    """The job's learner and, timed separately, its teacher.

    ``student``, ``teacher`` and ``update`` collect the seconds of each step.
    """

    def __init__(self, job: Job, classes: tuple[str, ...], distributed: Distributed) -> None:
        job = with_architecture(job)
        loaded = load_teacher(job, classes)
        detector = None if loaded is None else loaded.detector
        # A tiny learning rate costs the same work, and the loss cannot diverge.
        self.job, self.distributed = job.replace({"optim.lr": 1e-9, "optim.accumulate": 1}), distributed
        apart = job
        if detector is not None:  # with a pool, the training model has no teacher of its own
            apart = job.replace({"teacher.placement": "pool"})
        model = build_training_model(apart, len(classes), detector, steps_per_epoch=1, start=load_start(job, classes))
        self.learner = build_learner(self.job, model, distributed.device, job.data.batch_size, steps_per_epoch=1)
        self.frozen = self.soft = None
        if detector is not None and "akd" in METHODS[job.method].terms:
            if job.distill.rois == "teacher":
                self.soft = soft_teacher(job, detector, distributed.device)
            else:
                assert isinstance(detector, PyramidDetector)  # the job's own checks
                self.frozen = FrozenTeacher(detector.to(distributed.device).to(memory_format=torch.channels_last))
        self.codec = codec_of(job, detector) if detector is not None and can_choose_rois(detector) else None
        self.answer_bytes = 0
        self.student: list[float] = []
        self.teacher: list[float] = []
        self.update: list[float] = []

    def step(self, batch: Batch) -> None:
        """Take one optimizer step on one micro-batch."""
        self.teacher.append(0.0)
        times = [_now(self.distributed)]
        train_step(
            self.learner, self.job, iter([self.with_teacher(batch)]), note=lambda *_: times.append(_now(self.distributed))
        )
        started, passed, ended = (*times, _now(self.distributed))
        self.student.append(passed - started - self.teacher[-1])
        self.update.append(ended - passed)

    def with_teacher(self, batch: Batch) -> Batch:
        """Return the batch with the teacher's soft targets, or with a timed function that computes the teacher's features."""
        if self.soft is not None:
            with self.asking():
                targets = self.soft(batch)
            self.answer_bytes = sum(tensor.nbytes for tensor in targets)
            return replace(batch, targets=targets)
        frozen = self.frozen
        if frozen is None:
            return batch

        def ask(rois: Sequence[RoIs], device: torch.device) -> HeadFeatures:
            with self.asking():
                pyramid = frozen.pyramid(frozen.detector.normalise(batch.images, batch.sizes))
                found = frozen.head_features(pyramid, rois)
            self.answer_bytes = sum(
                tensor.nbytes for tap in found.taps for tensor in ([tap] if isinstance(tap, Tensor) else tap)
            )
            return found

        return replace(batch, ask=ask)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Add the time spent within to the teacher's time of this step."""
        with _Watch(self.distributed) as watch:
            yield
        self.teacher[-1] += watch.seconds


class _Watch:
    """Measures the seconds spent in a ``with`` block, including the device's work."""

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed

    def __enter__(self) -> _Watch:
        self.started = _now(self.distributed)
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds = _now(self.distributed) - self.started


def _now(distributed: Distributed) -> float:
    """Wait for the device to finish its work, and return the time in seconds."""
    if distributed.device.type == "cuda":
        torch.cuda.synchronize(distributed.device)
    return time.perf_counter()


def _one_by_one(shards: ShardSet, windows: Iterable[Window], maker: BatchMaker) -> AbstractContextManager[Iterator[Batch]]:
    """Decode in this thread alone, to measure one CPU."""
    return closing(maker(pending) for window in windows for pending in load_window(shards, window, maker))


def _images(batches: Iterable[Batch]) -> int:
    return sum(len(batch.images) for batch in batches)
