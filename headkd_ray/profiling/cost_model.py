"""What a run will take, before it is started: steps, hours, money and bytes, from a few measured times and a stated model.

The model, for ``k`` workers that each do what one was measured to do. A batch passes through stages that work at the same time
on different batches, so the slowest sets the pace; gradients meet once an optimizer step, after the last backward pass:

    step       = max(accumulate x max(data, pool, model, traffic) + update + reduce, cpus)
    data       = batch x image_seconds / data CPUs of a worker
    pool       = teacher_seconds / teacher processes of a worker       placement pool; else 0
    model      = student_seconds + teacher_seconds                     placement inline; else student_seconds
    traffic    = bytes between a worker and its pool / bandwidth       placement pool; else 0
    reduce     = 2 (k - 1) / k x 4 bytes x trained parameters / bandwidth     (a ring; really it overlaps the backward pass)
    cpus       = workers of a machine x CPU seconds of a step / (its CPUs - workers x RAY_CPUS)
                 what all that runs on the machine takes of its CPUs: data, and model and update x busy_cpus
    evaluation = images of a rank x max(eval_seconds, image_seconds / data CPUs)

Left out: starting machines and Ray, reading a cache, writing checkpoints, computing the COCO metrics, failures and what they
repeat. The bandwidth is each worker's own; a bucket is taken to be fast enough; a pool's teachers are on other machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headkd_ray.data.epoch_order import steps_per_epoch, train_rows
from headkd_ray.data.shards import ShardSet
from headkd_ray.job import Job
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.cache_recipe import views_of

LOCAL_DATA_THREADS = 2
"""Decoding threads of a run without Ray (``data.batch_stream.local_stream``)."""
RAY_CPUS = 0.2
"""CPUs that Ray takes for each worker: mostly its data scheduling, 0.1 to 0.2 by ``bench/stream_wait.py``."""


@dataclass(frozen=True)
class Costs:
    """What one worker was measured to take, in seconds and bytes; micro-batch = one forward and backward pass."""

    image_seconds: float
    """To read, decode and augment an image, on one CPU."""
    student_seconds: float
    """A micro-batch of the training model, without its teacher."""
    teacher_seconds: float
    """A micro-batch of the teacher; 0 without one."""
    update_seconds: float
    """Clipping, optimizer and moving average, once a step."""
    eval_seconds: float
    """An image at evaluation, decoding aside."""
    pixel_bytes: float
    """Decoded images of a micro-batch."""
    answer_bytes: float
    """What the teacher says about a micro-batch; 0 without one."""
    parameters: int
    """Numbers that are trained, and so have a gradient."""
    busy_cpus: float
    """CPUs that the model's passes and the update keep busy: torch's threads, or the one that feeds a GPU."""


@dataclass(frozen=True)
class Work:
    """What a job asks of each worker and in all."""

    images: int
    """That are trained on, in an epoch."""
    val_images: int
    batch: int
    """Images a micro-batch."""
    accumulate: int
    epochs: int
    evaluations: int
    placement: Literal["inline", "pool", "cache"]
    data_cpus: float
    """Images that a worker decodes at the same time."""
    gpus: float
    """Of a worker."""
    cpus: float
    """Of a worker, its data tasks' included."""
    on_ray: bool
    teachers: int
    """Processes of a worker's pool; of a cache's building."""
    teacher_gpus: float
    """Of a teacher process."""
    teacher_cpus: float
    views: int
    """Of each image, that a cache holds."""


@dataclass(frozen=True)
class Machine:
    """What workers share."""

    cpus: float
    workers: int
    """Most of them on one machine."""


@dataclass(frozen=True)
class Prices:
    """What an hour costs, in any currency."""

    gpu_hour: float = 0.0
    cpu_hour: float = 0.0


Bottleneck = Literal["data", "teacher", "student", "network", "CPUs"]


@dataclass(frozen=True)
class Plan:
    """What the run takes on a number of workers."""

    workers: int
    steps: int
    """Optimizer steps in all."""
    step_seconds: float
    images_per_second: float
    """Of all workers, while they train."""
    hours: float
    """Evaluations and the building of a cache included."""
    build_hours: float
    """Of these, building the cache."""
    gpu_hours: float
    cpu_hours: float
    money: float
    reduce_bytes: float
    """That each worker sends for the gradients, a step."""
    pool_bytes: float
    """Between each worker and its teachers, a step."""
    bottleneck: Bottleneck
    """What would have to be faster, first of all."""


def work_of(job: Job, train: ShardSet, val: ShardSet, on_gpu: bool) -> Work:
    """``on_gpu``: the workers have GPUs where ``cluster.gpus_per_worker`` leaves it open."""
    cluster, teacher = job.cluster, job.teacher
    pool = teacher.pool if teacher is not None else None
    placement = teacher.placement if teacher is not None else "inline"
    alone = cluster.workers == 0
    # Less than a CPU is one task at a time all the same.
    data_cpus = LOCAL_DATA_THREADS if alone else max(1.0, cluster.data_cpus)
    # Ray starts more while batches wait, but not where the student chooses the RoIs.
    teachers = 1 if pool is None or alone else pool.actors[1 if placement == "cache" or job.distill.rois == "teacher" else 0]
    every = job.eval.every_epochs
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(on_gpu)
    return Work(
        images=len(train_rows(train.index, job.data.keep_empty)),
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
    )


def plan(work: Work, costs: Costs, prices: Prices, workers: int, bandwidth: float, machine: Machine) -> Plan:
    """The model above, for ``workers`` of at least 1, on as many such machines as they need, and a ``bandwidth`` in bytes a
    second."""
    pooled, cached = work.placement == "pool", work.placement == "cache"
    in_place = 0.0 if pooled or cached else costs.teacher_seconds
    # Out to the teacher, and back with the answers; who chooses the RoIs makes no great difference.
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
    # However many workers, Ray leaves them half of the machine.
    free = max(machine.cpus - together * RAY_CPUS * work.on_ray, machine.cpus / 2)
    sharing = together * cpu_seconds / free
    step_seconds = max(passing, sharing)

    per_epoch = steps_per_epoch(work.images, work.batch, workers, work.accumulate) // work.accumulate
    steps = per_epoch * work.epochs
    eval_seconds = max(costs.eval_seconds, costs.image_seconds / work.data_cpus) * -(-work.val_images // workers)
    train_hours = (steps * step_seconds + work.evaluations * eval_seconds) / 3600
    asked = work.images * work.views if cached else 0
    build_hours = asked * costs.teacher_seconds / work.batch / work.teachers / 3600
    # Those who ask for a cache are a pool of its own; those of a pool are each worker's.
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
    """Of the model's two, the slower; the network also where gradients take longer than all else."""
    if slowest == "network" or reduce > seconds:
        return "network"
    if slowest == "data":
        return "data"
    return "teacher" if slowest == "teacher" or teacher > student else "student"


def cache_bytes(images: int, views: int, budget: int, codec: Codec) -> int:
    """Most bytes that a cache of soft targets takes, before compression: ``budget`` RoIs a view, of each a box (four float32),
    a byte, the features, and 16-bit logits with their classes. (int8's scales and Parquet's own bytes are left out.)"""
    features = codec.layers * codec.width * (2 if codec.dtype == "fp16" else 1)
    return images * views * budget * (16 + 1 + features + 4 * codec.logits)
