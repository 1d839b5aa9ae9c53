"""What every teacher process has in common: what Ray reserves for it, and how it starts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import ray
import torch

from headkd_ray.errors import ClusterError
from headkd_ray.job import Job, PoolSpec
from headkd_ray.memory import enough_memory

PATIENCE = 300.0
"""Seconds without an answer after which a teacher counts as gone for good: it may have to be started again elsewhere first."""


def actors_of(kind: type, pool: PoolSpec, count: int, *arguments: Any) -> list[Any]:
    """``count`` actors of class ``kind``, as the pool says. Ray starts one that dies again, and gives it its calls again."""
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": pool.resources}
    remote = ray.remote(kind).options(**options, max_restarts=-1, max_task_retries=-1)
    return [remote.remote(*arguments) for _ in range(count)]


def set_up(job: Job) -> torch.device:
    """Use what the pool reserves for this process; the device to be on."""
    assert job.teacher is not None
    torch.set_num_threads(max(1, int(job.teacher.pool.cpus)))
    return torch.device("cuda" if job.teacher.pool.gpus else "cpu")


def within_memory(job: Job) -> AbstractContextManager[None]:
    """For what a teacher process does with one batch of training: raises DeviceMemoryError if that needs more than there is."""
    assert job.teacher is not None
    smaller = f"lower data.batch_size ({job.data.batch_size}), or let fewer processes share a GPU: raise teacher.pool.gpus"
    return enough_memory(f"teacher.pool, asking the teacher {job.teacher.checkpoint}", f"{smaller} ({job.teacher.pool.gpus:g})")


def answer_of(call: Any, pool: PoolSpec) -> Any:
    """The result of an actor's ``call``. Raises ClusterError if none comes; what the teacher raised, as it raised it."""
    try:
        return ray.get(call, timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError:
        asked = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources}
        raise ClusterError(
            f"teacher.pool: no answer for {PATIENCE:.0f} s from a teacher process that asks for {asked}; is its node gone, or "
            "does it run out of memory there? Started again, the run goes on from its last checkpoint"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise ClusterError(f"teacher.pool: a teacher process cannot start: {str(error).strip().splitlines()[-1]}") from None
