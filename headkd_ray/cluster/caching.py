"""Filling a cache of soft targets with many teachers: a pool of actors, each taking one (shard, view) unit after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch

from headkd_ray.cluster.resources import check_pool, connected
from headkd_ray.cluster.train import with_absolute_paths
from headkd_ray.engine.caching import open_builder
from headkd_ray.job import Job

Unit = tuple[int, int]


class _Teacher:
    """One process of the pool."""

    def __init__(self, job: dict[str, Any]) -> None:
        whole = Job.model_validate(job)
        assert whole.teacher is not None
        pool = whole.teacher.pool
        torch.set_num_threads(max(1, int(pool.cpus)))
        self.builder = open_builder(whole, "cuda" if pool.gpus else "cpu")

    def build(self, shard: int, view: int) -> int:
        return self.builder.build(shard, view)


def build_on_ray(job: Job, units: list[Unit], done: Callable[[Unit, int], None]) -> None:
    """Build ``units`` with teacher.pool.actors processes; ``done`` is called with each one's size in bytes as it is finished.

    A process that is killed is started again and given its unit again. Raises ClusterError if the pool does not fit; DataError,
    CacheError as a process met them.
    """
    assert job.teacher is not None
    pool = job.teacher.pool
    with connected(job.cluster):
        check_pool(job)
        options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": pool.resources}
        remote = ray.remote(_Teacher).options(**options, max_restarts=-1, max_task_retries=-1)
        arguments = with_absolute_paths(job).model_dump(mode="json")
        actors = [remote.remote(arguments) for _ in range(min(pool.actors[1], len(units)))]
        waiting, running = list(reversed(units)), {}
        try:
            for actor in actors:
                unit = waiting.pop()
                running[actor.build.remote(*unit)] = (actor, unit)
            while running:
                (finished,), _ = ray.wait(list(running), num_returns=1)
                actor, unit = running.pop(finished)
                try:
                    size = ray.get(finished)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                done(unit, size)
                if waiting:
                    following = waiting.pop()
                    running[actor.build.remote(*following)] = (actor, following)
        finally:
            for actor in actors:
                ray.kill(actor)
