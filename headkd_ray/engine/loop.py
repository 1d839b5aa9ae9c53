"""The training loop, top to bottom: what one process of a run does, with or without Ray."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import headkd_ray
from headkd_ray.data.class_weights import class_weights_of, described
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import split_fingerprints
from headkd_ray.detectors import weigh_classes
from headkd_ray.detectors.weights.native import save_detector
from headkd_ray.distill import build_training_model, load_start
from headkd_ray.engine.checkpoint import (
    METRICS_FILE,
    SCORE,
    STUDENT_FOLDER,
    UNSCORED,
    Checkpoints,
    load_state,
    save_state,
    scores_of,
    seal,
)
from headkd_ray.engine.coco_metrics import CocoMetrics
from headkd_ray.engine.compiling import Compilations, compile_modules
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation_queue import EvaluationQueue
from headkd_ray.engine.evaluations import Evaluations
from headkd_ray.engine.files import writing
from headkd_ray.engine.log import Record, Sink, StepWindow
from headkd_ray.engine.optim import reset_lr
from headkd_ray.engine.run import teacher_key
from headkd_ray.engine.step import Learner, build_learner, train_step
from headkd_ray.engine.stored_detections import Store
from headkd_ray.engine.streams import Streams, in_order, on_device
from headkd_ray.errors import CheckpointError, StoppedError, TrainingError
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory
from headkd_ray.teacher import AnyTeacher, Cache, TeacherSource, open_cache, soft_teacher
from headkd_ray.teacher.loading import load_teacher
from headkd_ray.text import masked

WAIT_SECONDS = 0.5
"""Seconds between looks at the evaluations that a run which has trained to its end waits for."""


def fit(
    job: Job,
    distributed: Distributed,
    streams: Streams,
    checkpoints: Checkpoints,
    open_sink: Callable[[int], Sink],
    asked_to_stop: Callable[[], bool] = lambda: False,
    store: Store | None = None,
    observe: Sink = lambda record: None,
    interrupted: Callable[[], bool] = lambda: False,
    queue: EvaluationQueue | None = None,
) -> Record:
    """Train to the end, resuming from the latest checkpoint if any; return the last evaluation's metrics. Collective.

    On the CPU a run that was killed and resumed ends with the same weights, bit for bit, as one that was not: batches are a
    function of (seed, step), and so is every random number drawn in a step.

    An evaluation that was due when training had to stop is made up when it resumes.

    Args:
        open_sink: called on rank 0 with the step from which training resumes (0 = new run); the sink receives the log records.
        asked_to_stop: polled at every step; if it is True on any rank, training ends with that step and a checkpoint of it.
        store: called on rank 0 with the detections of each evaluation, before its record.
        observe: called on every rank with the log records of steps and evaluations, in which images_per_second, data_wait and
            memory_mib are those of the rank alone.
        interrupted: as ``asked_to_stop``, but polled during an evaluation, by each rank at its own pace; if it is True on any,
            the evaluation is given up, and training ends with a checkpoint.
        queue: on rank 0, where students wait for their evaluation with eval.placement: task.

    Raises:
        TrainingError: the loss is not finite, or torch.compile does not work here.
        CheckpointError: the checkpoint, the teacher or student.checkpoint does not fit this job.
        DataError: a shard cannot be read.
        DiskError: a checkpoint or the log cannot be written.
        DeviceMemoryError: a step or an evaluation needs more memory than is available.
        StoppedError: the run was asked to stop before the end.
    """
    classes = streams.train_set.meta.classes
    accumulate = job.optim.accumulate
    steps_per_epoch = streams.micro_batches_per_epoch // accumulate
    torch.manual_seed(job.run.seed)  # the weights of classes that the teacher does not know are drawn at random
    teacher = load_teacher(job, classes)
    global_batch = job.data.batch_size * streams.ranks_in_all * accumulate
    total_steps = steps_per_epoch * job.optim.epochs
    last: Record = {}
    notes: list[str] = []
    with checkpoints.latest() as folder:
        start = load_start(job, classes) if folder is None else None
        torch.manual_seed(job.run.seed)  # again, so that initial weights do not depend on what was loaded
        model = build_training_model(job, len(classes), teacher.detector if teacher else None, steps_per_epoch, start)
        weights = class_weights_of(job, streams.train_set)
        if weights is not None:
            weigh_classes(model, weights)
        state = build_learner(job, model, distributed.device, global_batch, steps_per_epoch)
        if job.teacher is not None and teacher is not None:
            key, address = job.teacher.source
            state.teacher = {key.removeprefix("teacher."): masked(address), "fingerprint": teacher.fingerprint}
        if folder is not None:
            restore(state, folder, fixed_facts(state, streams))
            last = scores_of(folder)
        elif start is not None:
            state.start = {"checkpoint": masked(str(job.student.checkpoint)), "fingerprint": start.fingerprint}
            notes.append(masked(start.note))
        del start  # its weights are not needed any more
    compiled = None
    if job.optim.compile is not None:
        compile_modules(model, job.optim.compile)
        compiled = Compilations()
    state.soft_teacher, cache = soft_targets(job, streams.train_set, teacher.detector if teacher else None, distributed.device)
    sink = open_sink(state.step) if distributed.rank == 0 else _nowhere
    notes = [*checkpoints.notes, *notes]
    if teacher is not None and teacher.note is not None and state.step == 0:
        notes.append(teacher.note)
    if weights is not None and state.step == 0:
        notes.append(described(weights, classes))
    if state.step == 0:
        notes += [*map(masked, streams.notes), *(f"warning: {warning}" for warning in streams.scoring.warnings)]

    def tell(note: str) -> None:
        sink({"step": state.step, "steps": total_steps, "epoch": state.step / steps_per_epoch, "note": note})

    def stopped() -> StoppedError:
        return StoppedError(
            f"run {job.run.name}: stopped as requested at step {state.step} of {total_steps}, with a checkpoint; the "
            "same command resumes from there"
        )

    for note in notes:
        tell(note)

    sinks = (sink, observe)
    evaluations = Evaluations(job, distributed, streams, state, steps_per_epoch, sinks, store, interrupted, queue, last)
    if queue is not None:
        evaluations.last = queue.resume(state.step, distributed.size)
    elif evaluations.due_here and not last:
        scored = evaluations.here()
        if scored is None:
            raise stopped()
        keep(state, job, distributed, streams, checkpoints, scored, "_evaluated")  # Ray takes each name once

    state.ddp = DistributedDataParallel(model) if distributed.size > 1 else None
    ranks = [rank for _ in range(accumulate) for rank in streams.ranks]
    share = distributed.size / (accumulate * streams.ranks_in_all)
    window = StepWindow(distributed)
    first = state.step * accumulate
    within_memory = enough_memory(f"run {job.run.name}, training", smaller_steps(job))
    with within_memory, streams.train(first, cache) as stream:
        batches = in_order(window.timed(on_device(stream, distributed.device)), first, len(streams.ranks))
        while state.step < total_steps and not state.patience.exhausted:
            stopping = distributed.vote(asked_to_stop())
            lr = state.optimizer.param_groups[0]["lr"]
            train_step(state, job, batches, ranks, share, note=window.add)
            if compiled is not None and (news := compiled.note(state.step)) is not None:
                tell(news)

            evaluations.take_finished()
            within_epoch = state.step % steps_per_epoch
            every = job.checkpoint.every_steps
            last_one = stopping()
            checkpoint_due = within_epoch == 0 or (every is not None and state.step % every == 0) or last_one
            if checkpoint_due or state.step % job.log.every_steps == 0:
                place = {"step": state.step, "steps": total_steps, "epoch": state.step / steps_per_epoch}
                record = {**place, "workers": distributed.size, "lr": lr, **window.record()}
                check_finite(record)
                sink(record)
                observe({**record, **window.own})
            if not checkpoint_due:
                continue
            scored = evaluations.here() if evaluations.due_here and not last_one else None
            keep(state, job, distributed, streams, checkpoints, scored, waits=queue if evaluations.due else None)
            unfinished = state.step < total_steps and not state.patience.exhausted
            if (evaluations.due_here and scored is None) or (last_one and unfinished):
                raise stopped()
            window.reset()  # do not count evaluation as training time
    while evaluations.outstanding():
        if distributed.vote(asked_to_stop())():
            raise stopped()
        time.sleep(WAIT_SECONDS)
        evaluations.take_finished()
    if state.step < total_steps:
        place = {"step": state.step, "steps": total_steps, "epoch": state.step / steps_per_epoch}
        sink({**place, "note": f"ended early, at step {state.step} of {total_steps} (eval.patience): {state.patience}"})
    return evaluations.last


def save(state: Learner, folder: Path, fixed: dict[str, Any]) -> None:
    """Write the training state that a resumed run needs."""
    members = {name: getattr(state, name) for name in ("model", "optimizer", "scheduler", "ema", "patience")}
    tensors = {name: None if member is None else member.state_dict() for name, member in members.items()}
    save_state(folder, {"step": state.step, "order": fixed, "start": state.start, **tensors})


def restore(state: Learner, folder: Path, fixed: dict[str, Any]) -> None:
    """Load the training state that ``save`` wrote.

    Raises:
        CheckpointError: it is damaged, or was written by an older headkd_ray, with other data or another teacher, or with
            another number of workers (of a range: the maximum), which would change the epoch's order and the schedule's steps.
    """
    saved = load_state(folder)
    if "model" not in saved or _shapes(saved["model"]) != _shapes(state.model.state_dict()):
        raise CheckpointError(
            f"the checkpoint at step {saved['step']} was written by an older headkd_ray, whose training state this one cannot "
            "resume (its student folder can be used); choose another run.name, or finish the run with the older version"
        )
    before = {**fixed, **saved["order"]}  # older versions did not record all
    changed = [key for key in fixed if before[key] != fixed[key]]
    if changed:
        raise CheckpointError(
            [
                f"{key}: the checkpoint at step {saved['step']} was written with {before[key]!r}, this run has "
                f"{fixed[key]!r}; resume with the former, or choose another run.name"
                for key in changed
            ]
        )
    state.step = saved["step"]
    state.start = saved.get("start")
    state.model.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scheduler.load_state_dict(saved["scheduler"])
    reset_lr(state.optimizer, state.scheduler)
    if state.ema is not None:
        state.ema.load_state_dict(saved["ema"])
    if "patience" in saved:  # not in checkpoints of earlier versions
        state.patience.load_state_dict(saved["patience"])


def _shapes(tensors: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def fixed_facts(state: Learner, streams: Streams) -> dict[str, Any]:
    """Return what determines how a run goes on and which checkpoint is best, besides the keys that it cannot change."""
    teacher = {} if state.teacher is None else {teacher_key(state.teacher): state.teacher["fingerprint"]}
    return {"cluster.workers": streams.ranks_in_all, **data_fingerprints(streams), **teacher}


def data_fingerprints(streams: Streams) -> dict[str, str]:
    """Return the fingerprint of each split, by its job key."""
    return {**split_fingerprints(streams.train_set), "data.val": streams.val_set.meta.fingerprint}


def smaller_steps(job: Job) -> str:
    """Return, for an error message, what would make a training step of the job need less memory."""
    data, optim = job.data, job.optim
    ways = [f"lower data.short_side ({max(data.short_side)}) and data.long_side ({data.long_side})"]
    if data.batch_size > 1:
        fewer = f"lower data.batch_size ({data.batch_size}) and raise optim.accumulate ({optim.accumulate}) as much"
        ways.insert(0, f"{fewer}, which keeps the global batch")
    if optim.precision == "fp32":
        ways.append("set optim.precision to bf16")
    return "; or ".join(ways)


def soft_targets(
    job: Job, shards: ShardSet, teacher: AnyTeacher | None, device: torch.device
) -> tuple[TeacherSource | None, Cache | None]:
    """Return a teacher in this process that chooses its own RoIs, or the cache of one; neither if the student chooses the RoIs
    or if a pool adds the soft targets to the batches.

    Raises CacheError if the cache is missing, incomplete or does not fit the job.
    """
    if job.teacher is None or teacher is None or job.distill.rois == "student":
        return None, None
    if job.teacher.placement == "inline":
        return soft_teacher(job, teacher, device), None
    if job.teacher.placement == "pool":
        return None, None
    cache = open_cache(job, shards, teacher)
    cache.check()
    return None, cache


def check_finite(record: Record) -> None:
    """Raise TrainingError, on all ranks alike, if the losses (means over ranks) are not finite."""
    losses = {name: value for name, value in record["losses"].items() if not math.isfinite(value)}
    if losses:
        raise TrainingError(
            f"step {record['step']}: not finite: {losses}; lower optim.lr or optim.clip_norm, or raise optim.warmup_steps"
        )


def keep(
    state: Learner,
    job: Job,
    distributed: Distributed,
    streams: Streams,
    checkpoints: Checkpoints,
    scored: CocoMetrics | None,
    suffix: str = "",
    waits: EvaluationQueue | None = None,
) -> None:
    """Write a checkpoint (rank 0) of the training state, the student and its metrics, and report it (all ranks).

    Args:
        suffix: end of its name, which otherwise is that of its step.
        waits: also put the student into this queue, before a run could resume from the checkpoint.

    Raises DiskError if there is no space for it.
    """
    name = f"step_{state.step:08d}{suffix}"
    metrics = {SCORE: UNSCORED if scored is None or math.isnan(scored.AP) else scored.AP, "step": state.step}
    if distributed.rank != 0:
        checkpoints.report(name, metrics, None)
        return
    folder = checkpoints.draft()
    save(state, folder, fixed_facts(state, streams))
    meta = {
        "method": job.method,
        "run": job.run.name,
        "step": state.step,
        **({} if state.start is None else {"start": state.start}),
        **({} if state.teacher is None else {"teacher": state.teacher}),
        "data": job.data.model_dump(mode="json", include={"eval_short_side", "long_side", "pad"}),
        "max_detections": job.eval.max_detections,
        "eval_batch_size": job.eval.batch_size,
        "category_ids": list(streams.train_set.meta.category_ids),
        "value_range": streams.train_set.meta.value_range,
        "metrics": None if scored is None else scored.as_dict(),
        "versions": {
            "headkd_ray": headkd_ray.__version__,
            **{name: version(name) for name in ("torch", "torchvision", "timm")},
        },
    }
    with writing(str(folder), "TMPDIR"):
        save_detector(folder / STUDENT_FOLDER, state.student, streams.train_set.meta.classes, meta)
        if scored is not None:
            (folder / METRICS_FILE).write_text(json.dumps({"step": state.step, **scored.as_dict()}))
    seal(folder)
    if waits is not None:
        waits.add(state.step, folder / STUDENT_FOLDER)
    checkpoints.report(name, metrics, folder)


def _nowhere(record: Record) -> None:
    """Discard a record: only rank 0 keeps a log."""
