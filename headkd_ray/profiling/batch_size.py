"""Find the largest batch size whose training steps fit into a GPU, by training a few steps with one size after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from headkd_ray.data.epoch_order import train_rows
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.engine.distributed import Distributed
from headkd_ray.errors import DeviceMemoryError, JobError
from headkd_ray.job import Job
from headkd_ray.profiling.step_trial import try_steps

SHARE = 0.9
"""Share of a GPU's memory that trials may use. The rest is for what they do not show: memory that becomes fragmented over an
epoch of differently shaped batches, and buffers of NCCL."""

NO_GPU = (
    "data.max_batch_size: is for GPUs, and there is none that torch can use; set it to null, and data.batch_size to what you "
    "want"
)


def largest_batch_size(job: Job, share: float = 1.0) -> int:
    """Return the largest multiple of ``data.batch_size``, at most ``data.max_batch_size``, whose steps fit into memory.

    Each size is tried by two optimizer steps on the largest batch that an epoch can make, and an evaluation. A batch is never
    larger than the training set.

    Args:
        share: the part of a GPU that a worker of the job has, if several share one.

    Raises:
        DeviceMemoryError: not even ``data.batch_size`` fits.
        CheckpointError, DataError, JobError: as ``try_steps``.
    """
    train, val = training_set(job), ShardSet.open(job.data.val)
    smallest, most = job.data.batch_size, job.data.max_batch_size or job.data.batch_size
    most = min(most, len(train_rows(train.index, job.data.keep_empty)))

    def fits(size: int) -> bool:
        try:
            try_steps(job.replace({"data.batch_size": size}), train, val)
        except DeviceMemoryError:
            if size == smallest:
                raise
            return False
        finally:
            _release()
        return True

    with torch.random.fork_rng(), _at_most(SHARE * min(1.0, share)):  # a trial draws initial weights, and the run draws its own
        return largest_multiple(fits, smallest, most)


def largest_batch_size_here(job: Job) -> int:
    """Return what ``largest_batch_size`` finds on this machine's GPU. Raises JobError if there is none."""
    if Distributed.here(job.cluster).device.type != "cuda":
        raise JobError(NO_GPU)
    return largest_batch_size(job)


def largest_multiple(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """Return the largest multiple of ``unit`` up to ``most`` (at least ``unit``) that fits, if all smaller ones do, too.

    Sizes are doubled until one does not fit, so that none that is tried is far too large, and then halved between.
    """
    below, above = 0, max(1, most // unit) + 1  # numbers of units that are known to fit, and not to
    while above - below > 1:
        size = min(max(1, 2 * below), above - 1) if above > most // unit else (below + above) // 2
        if fits(size * unit):
            below = size
        else:
            above = size
    return max(1, below) * unit


@contextmanager
def _at_most(share: float) -> Iterator[None]:
    """Let torch take at most this share of the GPU's memory within the block, if there is a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _release() -> None:
    """Give the memory of a trial back, so that the next one is not charged with it."""
    gc.collect()  # models and autograd graphs refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
