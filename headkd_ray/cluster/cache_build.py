"""Filling a cache of soft targets with many teachers: a pool of actors, each taking one (shard, view) unit after another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ray

from headkd_ray.cluster.connect import connected
from headkd_ray.cluster.resources import check_pool
from headkd_ray.cluster.teacher_process import PATIENCE, actors_of, answer_of, set_up
from headkd_ray.cluster.trainer import with_absolute_paths
from headkd_ray.job import Job
from headkd_ray.teacher.verify import open_builder

Unit = tuple[int, int]


class _Teacher:
    """One process of the pool."""

    def __init__(self, job: dict[str, Any]) -> None:
        whole = Job.model_validate(job)
        self.builder = open_builder(whole, set_up(whole))

    def ready(self) -> None:
        """Answers when it has started."""

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
        if not pool.gpus and ray.cluster_resources().get("GPU"):
            print("warning: teacher.pool.gpus is 0: the teacher runs on CPUs, beside GPUs that idle", file=sys.stderr)
        units = list(units)
        actors = actors_of(_Teacher, pool, min(pool.actors[1], len(units)), with_absolute_paths(job).model_dump(mode="json"))
        waiting = units[::-1]
        running: dict[Any, tuple[Any, Unit | None]] = {actor.ready.remote(): (actor, None) for actor in actors}
        try:
            while waiting or any(unit is not None for _, unit in running.values()):
                # Only who has started gets a unit: one for which there is no room holds up nobody.
                finished, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE)
                for call in finished:
                    actor, unit = running.pop(call)
                    size = answer_of(call, pool)
                    if unit is not None:
                        done(unit, size)
                    if waiting:
                        following = waiting.pop()
                        running[actor.build.remote(*following)] = (actor, following)
                if not finished and all(unit is None for _, unit in running.values()):
                    answer_of(next(iter(running)), pool)  # none has started
        finally:
            for actor in actors:
                ray.kill(actor)
