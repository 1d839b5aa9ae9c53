"""Take a few real training steps on the largest batch that a job can meet, and see what they need."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, load_samples
from headkd_ray.data.epoch_order import steps_per_epoch, train_rows
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardIndex, ShardSet
from headkd_ray.data.views import View, eval_view
from headkd_ray.distill import build_training_model, load_start
from headkd_ray.distill.start import with_architecture
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import predict
from headkd_ray.engine.loop import smaller_steps, soft_targets
from headkd_ray.engine.scoring import scoring_of_job
from headkd_ray.engine.step import Learner, build_learner, train_step
from headkd_ray.errors import DataError
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory
from headkd_ray.profiling.peak_memory import PeakMemory, total_memory
from headkd_ray.teacher import soft_teacher
from headkd_ray.teacher.cache_recipe import view_seed
from headkd_ray.teacher.loading import load_teacher

STEPS = 2
"""Optimizer steps of a trial: the second one has the optimizer's moments in memory, too."""


@dataclass(frozen=True)
class StepTrial:
    """What training steps and a batch of evaluation needed."""

    device: torch.device
    size: tuple[int, int]
    """Height and width of the batch in pixels, with padding."""
    images: int
    boxes: int
    """Largest number of boxes of an image in the batch."""
    seconds: float
    """Seconds of the last step."""
    peak_bytes: int
    """Peak memory of the steps: of the GPU, or of this process."""
    eval_peak_bytes: int
    """Peak memory of a batch of evaluation."""
    total_bytes: int
    """Memory of the GPU, or of this machine."""
    losses: tuple[dict[str, float], ...]
    """Losses by name of each forward pass, with their total."""
    state_bytes: int
    """Size of a checkpoint: the training state, and the student beside it."""
    teacher_inside: bool
    """Whether the peak has the teacher in it, though the job has it in processes of its own."""


def try_steps(job: Job, train: ShardSet, val: ShardSet, steps: int = STEPS) -> StepTrial:
    """Train ``steps`` optimizer steps in this process on the largest batch of the job, and evaluate its largest one.

    Modules are not compiled, and gradients are not reduced: neither needs less memory.

    Raises:
        DeviceMemoryError: a step or the evaluation needs more memory than is available.
        CheckpointError, DataError, JobError: the teacher, the data or the student cannot be loaded.
    """
    cluster = job.cluster
    if cluster.workers != 0 and cluster.threads_per_worker is None:  # the default of a worker on Ray
        cluster = cluster.replace({"threads_per_worker": max(1, int(cluster.cpus_per_worker))})
    distributed = Distributed.here(cluster)
    job = with_architecture(job)
    moved = job.teacher is not None and job.teacher.placement == "pool" and job.distill.rois == "student"
    if moved:  # it would answer from another process
        job = job.replace({"teacher.placement": "inline"})
    with enough_memory("trying training steps", smaller_steps(job)):
        batch = largest_batch(job, train).to(distributed.device)
        learner, batch = _learner(job, train, batch, distributed.device)
        losses: list[dict[str, float]] = []
        passes = min(2, job.optim.accumulate)  # in the second one the gradients of the first are in memory
        with PeakMemory(distributed.device) as peak:
            for _ in range(steps):
                started = time.perf_counter()
                train_step(
                    learner,
                    job,
                    iter([batch] * passes),
                    ranks=(0,) * passes,
                    share=1 / passes,
                    note=lambda found, _: losses.append({name: float(value.detach()) for name, value in found.items()}),
                )
                if distributed.device.type == "cuda":
                    torch.cuda.synchronize(distributed.device)
                seconds = time.perf_counter() - started
    data = job.data
    smaller = f"lower eval.batch_size ({job.eval.batch_size}), data.eval_short_side ({data.eval_short_side}) or data.long_side"
    scoring = scoring_of_job(job, train, val)
    with enough_memory("trying an evaluation", smaller), PeakMemory(distributed.device) as eval_peak:
        shown = largest_batch(job, val, training=False).to(distributed.device)
        predict(learner.student, [shown], distributed.device, scoring.category_ids, job.optim.precision)
    return StepTrial(
        device=distributed.device,
        size=(batch.images.shape[2], batch.images.shape[3]),
        images=len(batch.images),
        boxes=batch.boxes.shape[1],
        seconds=seconds,
        peak_bytes=peak.bytes,
        eval_peak_bytes=eval_peak.bytes,
        total_bytes=total_memory(distributed.device),
        losses=tuple(losses),
        state_bytes=_state_bytes(learner),
        teacher_inside=moved,
    )


def _learner(job: Job, train: ShardSet, batch: Batch, device: torch.device) -> tuple[Learner, Batch]:
    """Return the job's learner, and the batch with the soft targets that would come with it."""
    classes = train.meta.classes
    torch.manual_seed(job.run.seed)
    loaded = load_teacher(job, classes)
    detector = None if loaded is None else loaded.detector
    ranks, accumulate = max(1, job.cluster.most_workers), job.optim.accumulate
    per_epoch = steps_per_epoch(sampling_of(train, job.data).images, job.data.batch_size, ranks, accumulate) // accumulate
    model = build_training_model(job, len(classes), detector, max(1, per_epoch), load_start(job, classes))
    learner = build_learner(job, model, device, job.data.batch_size * ranks * accumulate, max(1, per_epoch))
    if job.teacher is not None and detector is not None and job.distill.rois == "teacher":
        if job.teacher.placement == "inline":
            learner.soft_teacher, _ = soft_targets(job, train, detector, device)
        else:
            batch = replace(batch, targets=soft_teacher(job, detector, device)(batch))
    return learner, batch


def largest_batch(job: Job, shards: ShardSet, training: bool = True) -> Batch:
    """Return the largest batch of training views, or of evaluation, on the CPU.

    It has the tallest and the widest view, at the largest size, and otherwise the images with most boxes.

    Raises:
        DataError: a shard cannot be read, or there is nothing to train on.
    """
    side = max(job.data.short_side)
    spec = job.data.replace({"short_side": (side, side)})
    view = View(side, job.data.long_side) if training else eval_view(job.data)
    size = job.data.batch_size if training else job.eval.batch_size
    shown = train_rows(shards.index, job.data.keep_empty) if training else np.arange(len(shards.index))
    if not len(shown):
        raise DataError(f"{shards.folder.uri}: no image has a box to train on")
    rows = largest_rows(shards.index, shown, view, size).tolist()
    maker = BatchMaker(spec, view_seed(job) if training else job.run.seed, training)
    numbers = (0,) * len(rows)
    return maker(PendingBatch(0, tuple(load_samples(shards, rows, numbers, maker)), numbers))


def largest_rows(index: ShardIndex, rows: NDArray[np.int64], view: View, size: int) -> NDArray[np.int64]:
    """Return ``size`` of the ``rows`` whose batch is the largest that the order of an epoch could make.

    Rows are repeated if there are fewer.
    """
    heights, widths = ((side * view_scales(index, view))[rows] for side in (index.height, index.width))
    if size == 1:
        return rows[[int(np.argmax(heights * widths))]]
    crowded = np.argsort(-index.boxes[rows], kind="stable")[:size]
    chosen = dict.fromkeys([int(np.argmax(heights)), int(np.argmax(widths)), *crowded.tolist()])
    return np.resize(rows[[*chosen]], size)


def view_scales(index: ShardIndex, view: View) -> NDArray[np.float64]:
    """Return how many pixels of ``view`` each image's pixel becomes, float64 (images,); views' sides are then rounded."""
    short, long = np.minimum(index.height, index.width), np.maximum(index.height, index.width)
    return np.minimum(view.short_side / short, view.long_side / long)


def _state_bytes(learner: Learner) -> int:
    """Return the bytes of the tensors in a checkpoint."""
    model = sum(tensor.nbytes for tensor in learner.model.state_dict().values())
    moments = sum(
        value.nbytes
        for state in learner.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    student = sum(tensor.nbytes for tensor in learner.student.state_dict().values())
    return model + moments + student * (1 if learner.ema is None else 2)
