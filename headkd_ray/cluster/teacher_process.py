"""What all teacher processes share: their start, and their errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import ray
import torch

from headkd_ray.cluster.driver import actor_name
from headkd_ray.cluster.resources import options_of
from headkd_ray.errors import ClusterError
from headkd_ray.job import Job, PoolSpec
from headkd_ray.memory import enough_memory

PATIENCE = 900.0
"""Seconds without an answer after which a teacher is given up: an autoscaler may first have to start a node for it, which then
installs PyTorch."""


def actors_of(kind: type, run: str, pool: PoolSpec, count: int, *arguments: Any) -> list[Any]:
    """Start ``count`` actors of class ``kind`` with the pool's resources. Ray restarts one that dies and repeats its calls."""
    options = {**options_of(pool), "max_restarts": -1, "max_task_retries": -1}
    remote, names = ray.remote(kind), [actor_name(run, f"teacher-{number}") for number in range(count)]
    return [remote.options(name=name, **options).remote(*arguments) for name in names]


def set_up(job: Job) -> torch.device:
    """Set the number of torch threads to what the pool reserves for this process, and return the device to use."""
    assert job.teacher is not None
    torch.set_num_threads(max(1, int(job.teacher.pool.cpus)))
    return torch.device("cuda" if job.teacher.pool.gpus else "cpu")


def within_memory(job: Job) -> AbstractContextManager[None]:
    """Return a context for a teacher's work on one training batch, which raises DeviceMemoryError if memory runs out."""
    assert job.teacher is not None
    smaller = f"lower data.batch_size ({job.data.batch_size}), or let fewer processes share a GPU: raise teacher.pool.gpus"
    return enough_memory(f"teacher.pool, asking the teacher {job.teacher.checkpoint}", f"{smaller} ({job.teacher.pool.gpus:g})")


def answer_of(call: Any, pool: PoolSpec) -> Any:
    """Return the result of an actor's ``call``. Raises ClusterError if none comes, or else what the teacher itself raised."""
    try:
        return ray.get(call, timeout=PATIENCE)
    except ray.exceptions.GetTimeoutError:
        asked = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources}
        raise ClusterError(
            f"teacher.pool: no answer for {PATIENCE:.0f} s from a teacher process that requests {asked}; is its node lost, or "
            "does it run out of memory there? The same command resumes from the last checkpoint"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise ClusterError(f"teacher.pool: a teacher process cannot start: {str(error).strip().splitlines()[-1]}") from None
