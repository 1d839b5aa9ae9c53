"""A rank's batches through Ray Data: same windows, same two functions and same batches as ``data.batch_stream.local_stream``.

One Ray Dataset holds all remaining windows of the rank, over all epochs, so Ray's start-up is paid once a run. It has two
stages, or three, each in the order of the windows (``preserve_order``):

1. *read*: one task at a time reads windows and emits chunks of a few batches, images still encoded. It needs no CPU of its own.
2. *decode*: tasks, in parallel, turn a chunk into batches: pixels in one buffer, the rest pickled.

3. *teach*, with teacher.placement pool: teacher processes add soft targets to a chunk's batches. Ray starts a process that was
   lost again and gives it the chunks that it had; nothing else is repeated.

Decoding by chunk instead of by window is what makes the tasks run in parallel although batches leave in order: a whole window
is too much to hold while waiting for its turn. A chunk is one Ray block of about CHUNK_BYTES; a rank holds a few at a time.

A UserError (a damaged shard) travels as a value in its chunk's place, and is raised at the batch it belongs to, as in the local
stream: Ray does not carry an exception's cause from a task to the driver.
"""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from headkd_ray.cluster.decoding import DecodeChunk, ReadWindow, Row, decoded, encode
from headkd_ray.cluster.teacher_actors import teacher_actors, with_teachers
from headkd_ray.cluster.teacher_process import set_up, within_memory
from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker
from headkd_ray.data.epoch_order import Window
from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.streams import Decode
from headkd_ray.errors import UserError
from headkd_ray.job import ClusterSpec, Job
from headkd_ray.teacher import soft_teacher
from headkd_ray.teacher.loading import teacher_of

STORE_BYTES = 512 << 20
"""Shared memory that one rank's Dataset may plan with; less where the cluster has less."""
STEP_SECONDS = 0.02
"""Least time from one step of Ray's scheduling loop to the next."""
WINDOWS_PER_BLOCK = 16
"""Windows one read task goes through: what is read again if its node is lost."""


def decode_on_ray(cluster: ClusterSpec, teacher_job: Job | None = None) -> Decode:
    """A stream maker that decodes in Ray tasks which take at most ``cluster.data_cpus`` CPUs a rank. Needs ``ray.init``.

    With ``teacher_job`` the training batches come with the soft targets of that job's teacher, which runs in processes beside
    the tasks; or, if the student chooses the RoIs, with a handle that asks the teacher about them.
    """

    @contextmanager
    def decode(shards: ShardSet, windows: Iterable[Window], maker: BatchMaker) -> Iterator[Iterator[Batch]]:
        rows = [{"window": pickle.dumps(window)} for window in windows]
        if not rows:
            yield iter(())
            return
        asked = teacher_job if maker.train else None
        chosen_here = asked is not None and asked.distill.rois == "student"
        batches = _batches(_dataset(rows, shards, maker, cluster.data_cpus, None if chosen_here else asked))
        try:
            if asked is None or not chosen_here:
                yield batches
            else:
                with teacher_actors(asked, shards.meta.classes) as actors:
                    assert asked.teacher is not None
                    yield with_teachers(batches, actors, asked.teacher.pool)
        finally:
            batches.close()

    return decode


def _dataset(rows: list[Row], shards: ShardSet, maker: BatchMaker, cpus: float, teacher_job: Job | None) -> ray.data.Dataset:
    pool = teacher_job.teacher.pool if teacher_job is not None and teacher_job.teacher is not None else None
    least, most = pool.actors if pool else (0, 0)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every row, that is every chunk, is a block of its own: decoded by its own task
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Unhurried]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=cpus + (most * pool.cpus if pool else 0.0),
        gpu=most * pool.gpus if pool else 0.0,
        object_store_memory=STORE_BYTES,
    )
    with DataContext.current(context):
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // WINDOWS_PER_BLOCK))
        # num_cpus differ, so that Ray does not fuse the stages: fused, a window would be one task.
        chunks = dataset.flat_map(ReadWindow(shards, maker), compute=TaskPoolStrategy(size=1), num_cpus=0)
        if pool is None or teacher_job is None:
            return chunks.map(DecodeChunk(maker), num_cpus=min(1.0, cpus))
        # A thousandth less than a CPU, or than the teacher's share: stages that ask for the same Ray would fuse.
        decoded = chunks.map(DecodeChunk(maker), num_cpus=min(1.0, cpus) - 0.001)
        return decoded.map(
            Teaching,
            fn_constructor_kwargs={"job": teacher_job.model_dump(mode="json"), "classes": shards.meta.classes},
            compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            resources=pool.resources,
        )


class _Unhurried(ExecutionCallback):
    """Paces Ray's scheduling loop, a thread of the train worker.

    While it waits for training to take batches it spins (Ray 2.60): a core, and worse, the interpreter lock that every torch
    call of the training thread then has to wait for. ``bench/stream_wait.py`` measures the first.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_execution_step(self, executor: object) -> None:
        time.sleep(max(0.0, self.last + STEP_SECONDS - time.monotonic()))
        self.last = time.monotonic()


class Teaching:
    """Batches -> the same with soft targets. Ray Data makes actors of it.

    It asks about one training batch at a time, as a teacher in place does: other views beside would round other bits.
    """

    def __init__(self, job: dict[str, Any], classes: tuple[str, ...]) -> None:
        self.job = Job.model_validate(job)
        device = set_up(self.job)
        self.teacher = soft_teacher(self.job, teacher_of(self.job, tuple(classes)), device)
        self.restarted = uuid.uuid4().hex if ray.get_runtime_context().was_current_actor_reconstructed else ""

    def __call__(self, row: Row) -> Row:
        if row["error"]:
            return {**row, "restarted": self.restarted}
        try:
            with within_memory(self.job):
                batches = [
                    replace(batch, targets=self.teacher(batch.to(self.teacher.device)).map(torch.Tensor.cpu))
                    for batch in decoded(row["head"], row["pixels"])
                ]
        except UserError as error:
            return {"head": b"", "pixels": b"", "error": pickle.dumps(error), "restarted": self.restarted}
        return {**encode(batches), "error": b"", "restarted": self.restarted}


def _batches(dataset: ray.data.Dataset) -> Generator[Batch, None, None]:
    """Run the dataset; closing the generator ends its tasks and threads.

    Blocks are taken as references, not with ``iter_batches``: its helper threads outlive it, and one that still fetches while
    the process leaves Ray makes Ray end the whole process.
    """
    blocks = (block for bundle in dataset.iter_internal_ref_bundles() for block in bundle.block_refs)
    lost: set[str] = set()
    following = next(blocks, None)
    while following is not None:
        current, following = following, next(blocks, None)
        if following is not None:
            ray.wait([following], timeout=0, fetch_local=True)  # starts the transfer if the block is on another machine
        block = ray.get(current)
        del current
        if "restarted" in block.column_names:
            lost |= set(block["restarted"].to_pylist()) - {""}
        for head, pixels, error in zip(block["head"], block["pixels"], block["error"], strict=True):
            if error.as_py():
                raise pickle.loads(error.as_py())
            for batch in decoded(head.as_py(), pixels.as_buffer()):
                yield replace(batch, teacher_restarts=len(lost))
