"""Fill a cache of soft targets with a pool of teacher actors, each of which builds one (shard, view) unit after another."""

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


class CacheTeacher:
    """An actor that builds units of the cache."""

    def __init__(self, job: dict[str, Any]) -> None:
        whole = Job.model_validate(job)
        self.builder = open_builder(whole, set_up(whole))

    def ready(self) -> None:
        """Return once the actor has started."""

    def build(self, shard: int, view: int) -> int:
        return self.builder.build(shard, view)


def build_on_ray(job: Job, units: list[Unit], done: Callable[[Unit, int], None]) -> None:
    """Build ``units`` with teacher.pool.actors processes, and call ``done`` with each finished unit and its size in bytes.

    A process that is killed is restarted and given its unit again. Raises ClusterError if the pool does not fit the cluster,
    and the DataError or CacheError that a process raised.
    """
    assert job.teacher is not None
    pool = job.teacher.pool
    with connected(job.cluster):
        check_pool(job)
        if not pool.gpus and ray.cluster_resources().get("GPU"):
            print("warning: teacher.pool.gpus is 0: the teacher runs on CPUs while GPUs are idle", file=sys.stderr)
        units = list(units)
        count = min(pool.actors[1], len(units))
        actors = actors_of(CacheTeacher, job.run.name, pool, count, with_absolute_paths(job).model_dump(mode="json"))
        waiting = units[::-1]
        running: dict[Any, tuple[Any, Unit | None]] = {actor.ready.remote(): (actor, None) for actor in actors}
        try:
            while waiting or any(unit is not None for _, unit in running.values()):
                # Give units to started actors only, so that one waiting for resources does not block the rest.
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
                    answer_of(next(iter(running)), pool)  # no actor has started: raises why
        finally:
            for actor in actors:
                ray.kill(actor)
