"""Predict the steps, hours, money and bytes of a run before it is started, from a few measured times and the model below.

The model assumes ``k`` workers that are each as fast as the one that was measured. The stages of a step work at the same time
on different batches, so the slowest sets the pace; gradients are reduced once per optimizer step, after the last backward pass:

    step       = max(accumulate x max(data, pool, model, traffic) + update + reduce, cpus)
    data       = batch x image_seconds / data CPUs of a worker
    pool       = teacher_seconds / teacher processes of a worker       placement pool; else 0
    model      = student_seconds + teacher_seconds                     placement inline; else student_seconds
    traffic    = bytes between a worker and its pool / bandwidth       placement pool; else 0
    reduce     = 2 (k - 1) / k x 4 bytes x trained parameters / bandwidth     (a ring; really it overlaps the backward pass)
    cpus       = workers of a machine x CPU seconds of a step / (its CPUs - workers x RAY_CPUS)
                 CPU seconds: decoding the data, and (model + update) x busy_cpus
    evaluation = images of a rank x max(eval_seconds, image_seconds / data CPUs)

Not modelled: starting machines and Ray, reading a cache, writing checkpoints, computing the COCO metrics, failures and the
steps repeated after them. Each worker has its own bandwidth; object storage is assumed to be fast enough; a pool's teachers are
on other machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headkd_ray.data.epoch_order import steps_per_epoch
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.job import Job
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.cache_recipe import views_of

LOCAL_DATA_THREADS = 2
"""Number of decoding threads in a run without Ray (``data.batch_stream.local_stream``)."""
RAY_CPUS = 0.2
"""CPUs that Ray itself uses per worker, mostly for data scheduling: 0.1 to 0.2 as measured by ``bench/stream_wait.py``."""


@dataclass(frozen=True)
class Costs:
    """Measured costs of one worker, in seconds and bytes; a micro-batch is one forward and backward pass."""

    image_seconds: float
    """Seconds to read, decode and augment an image on one CPU."""
    student_seconds: float
    """Seconds of the training model, without its teacher, per micro-batch."""
    teacher_seconds: float
    """Seconds of the teacher per micro-batch; 0 without one."""
    update_seconds: float
    """Seconds of gradient clipping, optimizer and moving average per optimizer step."""
    eval_seconds: float
    """Seconds per image at evaluation, without decoding."""
    pixel_bytes: float
    """Bytes of the decoded images of a micro-batch."""
    answer_bytes: float
    """Bytes of the teacher's outputs for a micro-batch; 0 without a teacher."""
    parameters: int
    """Number of trained parameters, which is also the size of the gradient."""
    busy_cpus: float
    """CPUs kept busy by the model and the update: torch's threads, or the one that feeds a GPU."""


@dataclass(frozen=True)
class Work:
    """The amount of work in a job, and the resources that its processes ask for."""

    images: int
    """Training images per epoch, with repeated ones."""
    val_images: int
    batch: int
    """Images per micro-batch."""
    accumulate: int
    epochs: int
    evaluations: int
    placement: Literal["inline", "pool", "cache"]
    data_cpus: float
    """Number of images that a worker decodes at the same time."""
    gpus: float
    """GPUs per worker."""
    cpus: float
    """CPUs per worker, including its data tasks."""
    on_ray: bool
    teachers: int
    """Teacher processes: of each worker's pool, or in all while a cache is built."""
    teacher_gpus: float
    """GPUs per teacher process."""
    teacher_cpus: float
    """CPUs per teacher process."""
    views: int
    """Views of each image in a cache."""
    distinct: int
    """Training images, each counted once."""


@dataclass(frozen=True)
class Machine:
    """A machine whose CPUs several workers share."""

    cpus: float
    workers: int
    """Maximum number of workers on the machine."""


@dataclass(frozen=True)
class Prices:
    """Prices of a GPU hour and a CPU hour, in any currency."""

    gpu_hour: float = 0.0
    cpu_hour: float = 0.0


Bottleneck = Literal["data", "teacher", "student", "network", "CPUs"]


@dataclass(frozen=True)
class Plan:
    """The predicted duration and cost of a run on a given number of workers."""

    workers: int
    steps: int
    """Total number of optimizer steps."""
    step_seconds: float
    images_per_second: float
    """Training throughput of all workers together."""
    hours: float
    """Duration, including evaluations and building a cache."""
    build_hours: float
    """The part of ``hours`` spent on building the cache."""
    gpu_hours: float
    cpu_hours: float
    money: float
    reduce_bytes: float
    """Bytes that each worker sends per step to reduce the gradients."""
    pool_bytes: float
    """Bytes exchanged per step between each worker and its teachers."""
    bottleneck: Bottleneck
    """The part that limits the speed."""


def work_of(job: Job, train: ShardSet, val: ShardSet, on_gpu: bool) -> Work:
    """Return the work of a job; ``on_gpu`` tells whether workers have GPUs if ``cluster.gpus_per_worker`` leaves it open."""
    cluster, teacher = job.cluster, job.teacher if job.teacher is not None and job.teacher.is_network else None
    pool = teacher.pool if teacher is not None else None
    placement = teacher.placement if teacher is not None else "inline"
    alone = cluster.workers == 0
    # With less than one CPU, one task still runs at a time.
    data_cpus = LOCAL_DATA_THREADS if alone else max(1.0, cluster.data_cpus)
    # Ray adds teachers while batches wait, except if the student chooses the RoIs.
    teachers = 1 if pool is None or alone else pool.actors[1 if placement == "cache" or job.distill.rois == "teacher" else 0]
    every, sampling = job.eval.every_epochs, sampling_of(train, job.data)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(on_gpu)
    return Work(
        images=sampling.images,
        val_images=len(val.index),
        batch=job.data.batch_size,
        accumulate=job.optim.accumulate,
        epochs=job.optim.epochs,
        evaluations=-(-job.optim.epochs // every),
        placement=placement,
        data_cpus=data_cpus,
        gpus=gpus,
        cpus=cluster.cpus_per_worker + (data_cpus if alone else cluster.data_cpus),
        teachers=teachers,
        teacher_gpus=0.0 if pool is None else gpus if alone else pool.gpus,
        teacher_cpus=0.0 if pool is None else pool.cpus,
        on_ray=not alone,
        views=views_of(job),
        distinct=len(sampling.rows),
    )


def plan(work: Work, costs: Costs, prices: Prices, workers: int, bandwidth: float, machine: Machine) -> Plan:
    """Evaluate the model above for a number of ``workers`` (at least 1), on as many such machines as they need.

    ``bandwidth`` is in bytes per second.
    """
    pooled, cached = work.placement == "pool", work.placement == "cache"
    in_place = 0.0 if pooled or cached else costs.teacher_seconds
    # Images go to the teacher and its outputs come back; which side chooses the RoIs makes little difference.
    pool_bytes = work.accumulate * (costs.pixel_bytes + costs.answer_bytes) if pooled else 0.0
    reduce_bytes = 2 * (workers - 1) / workers * 4 * costs.parameters
    stages = {
        "data": work.accumulate * work.batch * costs.image_seconds / work.data_cpus,
        "teacher": work.accumulate * costs.teacher_seconds / work.teachers if pooled else 0.0,
        "model": work.accumulate * (costs.student_seconds + in_place),
        "network": pool_bytes / bandwidth,
    }
    slowest = max(stages, key=lambda name: stages[name])
    reduce_seconds = reduce_bytes / bandwidth
    passing = stages[slowest] + costs.update_seconds + reduce_seconds
    busy = work.accumulate * (costs.student_seconds + in_place) + costs.update_seconds
    cpu_seconds = work.accumulate * work.batch * costs.image_seconds + costs.busy_cpus * busy
    together = min(workers, machine.workers)
    # Ray is assumed to take at most half of the machine.
    free = max(machine.cpus - together * RAY_CPUS * work.on_ray, machine.cpus / 2)
    sharing = together * cpu_seconds / free
    step_seconds = max(passing, sharing)

    per_epoch = steps_per_epoch(work.images, work.batch, workers, work.accumulate) // work.accumulate
    steps = per_epoch * work.epochs
    eval_seconds = max(costs.eval_seconds, costs.image_seconds / work.data_cpus) * -(-work.val_images // workers)
    train_hours = (steps * step_seconds + work.evaluations * eval_seconds) / 3600
    asked = work.distinct * work.views if cached else 0
    build_hours = asked * costs.teacher_seconds / work.batch / work.teachers / 3600
    # One pool builds a cache, whereas with placement pool each worker has its own.
    pool_hours = work.teachers * (workers * train_hours * pooled + build_hours)
    gpu_hours = workers * work.gpus * train_hours + work.teacher_gpus * pool_hours
    cpu_hours = workers * work.cpus * train_hours + work.teacher_cpus * pool_hours
    return Plan(
        workers=workers,
        steps=steps,
        step_seconds=step_seconds,
        images_per_second=work.images / (per_epoch * step_seconds),
        hours=train_hours + build_hours,
        build_hours=build_hours,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        money=gpu_hours * prices.gpu_hour + cpu_hours * prices.cpu_hour,
        reduce_bytes=reduce_bytes,
        pool_bytes=pool_bytes,
        bottleneck="CPUs"
        if sharing > passing
        else _bottleneck(slowest, stages[slowest], costs.student_seconds, in_place, reduce_seconds),
    )


def _bottleneck(slowest: str, seconds: float, student: float, teacher: float, reduce: float) -> Bottleneck:
    """Name the slowest part; the model is split into teacher and student, and reducing gradients counts as network."""
    if slowest == "network" or reduce > seconds:
        return "network"
    if slowest == "data":
        return "data"
    return "teacher" if slowest == "teacher" or teacher > student else "student"


def cache_bytes(images: int, views: int, budget: int, codec: Codec) -> int:
    """Return the maximum size in bytes of a cache of soft targets before compression.

    A view has ``budget`` RoIs; each is a box (four float32), a byte, the features, and 16-bit logits with their classes.
    (int8's scales and Parquet's own bytes are not counted.)
    """
    features = codec.layers * codec.width * (2 if codec.dtype == "fp16" else 1)
    return images * views * budget * (16 + 1 + features + 4 * codec.logits)
