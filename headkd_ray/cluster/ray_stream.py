"""A rank's batches through Ray Data, with the same windows, functions and batches as ``data.batch_stream.local_stream``.

A Ray Dataset holds many windows, over many epochs, so that Ray's start-up is seldom paid; but not all of a run, since a driver
of a long run on a large data set would then hold them all. It has two or three stages, each in the order of the windows
(``preserve_order``):

1. *read*: one task at a time reads windows and emits chunks of a few batches, whose images are still encoded. It reserves no
   CPU.
2. *decode*: parallel tasks turn a chunk into batches: pixels in one buffer, the rest pickled.
3. *teach*, with teacher.placement pool: teacher processes add soft targets to a chunk's batches. Ray restarts a lost process
   and gives it its chunks again; nothing else is repeated.

Decoding by chunk instead of by window lets tasks run in parallel although batches leave in order: a whole window is too large
to hold while it waits for its turn. A chunk is one Ray block of about CHUNK_BYTES; a rank holds a few at a time.

A UserError (a damaged shard) travels as a value in place of its chunk and is raised at the batch that it belongs to, as in the
local stream, because Ray does not carry an exception's cause from a task to the driver.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, TaskPoolStrategy

from headkd_ray.cluster.decoding import DecodeChunk, ReadWindow, Row, decoded, encode
from headkd_ray.cluster.resources import resources_of
from headkd_ray.cluster.teacher_actors import teacher_actors, with_teachers
from headkd_ray.cluster.teacher_process import set_up, within_memory
from headkd_ray.cluster.unhurried import slow_down
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
"""Limit on the object store memory of one rank's Dataset; lower if the cluster has less."""
WINDOWS_PER_DATASET = 4096
"""Windows of one Dataset: a million images at the usual 256 per window, whose plan is 10 MB."""
WINDOWS_PER_BLOCK = 16
"""Windows per read task: if its node is lost, this many are read again."""


def decode_on_ray(cluster: ClusterSpec, teacher_job: Job | None = None, run: str = "headkd") -> Decode:
    """Return a ``Decode`` function that uses Ray tasks with at most ``cluster.data_cpus`` CPUs per rank. Needs ``ray.init``.

    With ``teacher_job`` the training batches have the soft targets of that job's teacher, which runs in separate processes; or,
    if the student chooses the RoIs, a ``TeacherHandle``, which computes the teacher's features of them.

    ``run``: what the Datasets are called in Ray's dashboard, with train or val.
    """

    @contextmanager
    def decode(shards: ShardSet, windows: Iterable[Window], maker: BatchMaker) -> Iterator[Iterator[Batch]]:
        planned = iter(windows)
        first = next(planned, None)
        if first is None:
            yield iter(())
            return
        asked = teacher_job if maker.train else None
        chosen_here = asked is not None and asked.distill.rois == "student"
        teaching = None if chosen_here else asked
        name = f"{run}_{'train' if maker.train else 'val'}"
        batches = _batches(
            chain([first], planned), lambda rows: _dataset(name, rows, shards, maker, cluster.data_cpus, teaching)
        )
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


def _dataset(
    name: str, rows: list[Row], shards: ShardSet, maker: BatchMaker, cpus: float, teacher_job: Job | None
) -> ray.data.Dataset:
    pool = teacher_job.teacher.pool if teacher_job is not None and teacher_job.teacher is not None else None
    least, most = pool.actors if pool else (0, 0)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every row, that is every chunk, becomes its own block and is decoded by its own task
    slow_down(context)
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=cpus + (most * pool.cpus if pool else 0.0),
        gpu=most * pool.gpus if pool else 0.0,
        object_store_memory=STORE_BYTES,
    )
    with DataContext.current(context):
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // WINDOWS_PER_BLOCK))
        dataset.set_name(name)
        # Different num_cpus keep Ray from fusing the stages, which would make each window a single task.
        chunks = dataset.flat_map(ReadWindow(shards, maker), compute=TaskPoolStrategy(size=1), num_cpus=0)
        if pool is None or teacher_job is None:
            return chunks.map(DecodeChunk(maker), num_cpus=min(1.0, cpus))
        # A thousandth less, so that it differs from the teacher's CPUs: Ray would fuse stages that ask for the same.
        decoded = chunks.map(DecodeChunk(maker), num_cpus=min(1.0, cpus) - 0.001)
        return decoded.map(
            TeachChunk,
            fn_constructor_kwargs={"job": teacher_job.model_dump(mode="json"), "classes": shards.meta.classes},
            compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
            **resources_of(pool),
        )


class TeachChunk:
    """A Ray Data actor that adds soft targets to batches.

    It runs the teacher on one training batch at a time, as an inline teacher does: a larger batch would round differently.
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


def _batches(windows: Iterator[Window], dataset_of: Callable[[list[Row]], ray.data.Dataset]) -> Generator[Batch, None, None]:
    """Yield the batches of the windows from one Dataset after the other; closing the generator ends their tasks and threads."""
    lost: set[str] = set()
    while rows := [{"window": pickle.dumps(window)} for window in islice(windows, WINDOWS_PER_DATASET)]:
        yield from _batches_of(dataset_of(rows), lost)


def _batches_of(dataset: ray.data.Dataset, lost: set[str]) -> Generator[Batch, None, None]:
    """Run the dataset and yield its batches; ``lost`` collects the teacher processes that were lost.

    Blocks are taken as references instead of with ``iter_batches``, whose helper threads outlive it: if one still fetches while
    the process disconnects from Ray, Ray ends the whole process.
    """
    blocks = (block for bundle in dataset.iter_internal_ref_bundles() for block in bundle.block_refs)
    following = next(blocks, None)
    while following is not None:
        current, following = following, next(blocks, None)
        if following is not None:
            ray.wait([following], timeout=0, fetch_local=True)  # starts the transfer if the block is on another machine
        block = ray.get(current)
        del current
        if "restarted" in block.column_names:
            lost.update(set(block["restarted"].to_pylist()) - {""})
        for head, pixels, error in zip(block["head"], block["pixels"], block["error"], strict=True):
            if error.as_py():
                raise pickle.loads(error.as_py())
            for batch in decoded(head.as_py(), pixels.as_buffer()):
                yield replace(batch, teacher_restarts=len(lost))
