"""Measure on your machine: ``python -m headkd_ray.bench teacher JOB [key.path=value ...]``.

Compares short stretches of training without a teacher, with the teacher in place (the student's RoIs, the teacher's RoIs), in a
pool, and from a cache, taken in turns, and recommends a placement. The job must be of method head or akd.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.table import Table

from headkd_ray.doors import positive, user_errors
from headkd_ray.errors import JobError
from headkd_ray.job import Job, load_job
from headkd_ray.report.terminal import Terminal

if TYPE_CHECKING:
    from headkd_ray.engine.placements import Building, Placement


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("teacher",))
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument("--steps", type=positive, default=20, help="steps a stretch (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="stretches of each placement (default %(default)s)")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        job = load_job(options.job, options.overrides)
        if job.method not in ("akd", "head"):
            raise JobError(f"method: {job.method} has no teacher that could be placed; give a job of method head or akd")
        if job.student.kind in ("faster_rcnn", "cascade_rcnn"):
            raise JobError(f"student.kind: a {job.student.kind} looks at RoIs of its own, so there is nothing to compare")
        measure_teacher(job, options.steps, options.rounds)
    return 0


def measure_teacher(job: Job, steps: int, rounds: int) -> None:
    """Measure, print the table and a recommendation."""
    # Imported here, because torch and timm take ten seconds: what is wrong with the job file is told before.
    from headkd_ray.data.shards import ShardSet
    from headkd_ray.engine.placements import WARM_UP, Placement, fill, images_per_second, inline, measure, some_shards
    from headkd_ray.engine.streams import Decode, decode_here
    from headkd_ray.engine.world import World

    world = World.here(job.cluster)
    shards = some_shards(ShardSet.open(job.data.train), (steps + WARM_UP) * job.data.batch_size)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="headkd-bench-"))
        own = _changed(job, "student", "inline", scratch)
        theirs, cache = (_changed(job, "teacher", name, scratch) for name in ("inline", "cache"))
        decode: Decode = decode_here
        if job.cluster.most_workers > 0:
            from headkd_ray.cluster.connect import connected
            from headkd_ray.cluster.resources import check_resources
            from headkd_ray.cluster.stream import decode_on_ray
            from headkd_ray.cluster.train import with_absolute_paths

            pool, held = (with_absolute_paths(_changed(job, rois, "pool", scratch)) for rois in ("teacher", "student"))
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            stack.enter_context(connected(job.cluster))
            check_resources(pool.replace({"cluster.workers": 1}))
            decode = decode_on_ray(job.cluster)
        builder, building = fill(cache, shards, world)
        placements = [
            Placement("no teacher", own, decode, teacher=False),
            Placement("inline, student's RoIs", own, decode),
            Placement("inline, teacher's RoIs", theirs, decode, asked=inline(theirs, shards, world)),
            Placement("cache", cache, decode, cache=builder.cache),
        ]
        if job.cluster.most_workers > 0:
            placements.insert(2, Placement("pool, student's RoIs", held, decode_on_ray(job.cluster, held)))
            placements.insert(4, Placement("pool, teacher's RoIs", pool, decode_on_ray(job.cluster, pool)))
        measure(placements, shards, steps, rounds)
    rates = {placement.name: images_per_second(placement) for placement in placements}
    _tell(placements, rates, building)
    _recommend(job, rates, building, len(ShardSet.open(job.data.train).index))


def _changed(job: Job, rois: str, placement: str, cache: str) -> Job:
    """The job with one view an image, and its teacher placed so."""
    assert job.teacher is not None
    changes = {"teacher.placement": placement, "teacher.cache.path": cache, "distill.rois": rois, "data.views": 1}
    return job.replace(changes)


def _tell(placements: list[Placement], rates: dict[str, float], building: Building) -> None:
    bare = rates["no teacher"]
    table = Table(title="training steps of one worker")
    for name in ("teacher", "images/s", "time a step, no teacher = 1", "data wait"):
        table.add_column(name, justify="left" if name == "teacher" else "right")
    for placement in placements:
        rate, wait = rates[placement.name], sum(placement.waited) / sum(placement.seconds)
        table.add_row(placement.name, f"{rate:.1f}", f"{bare / rate:.2f}", f"{wait:.0%}")
    console = Terminal()
    console.print(table)
    rate = building.views / building.seconds
    console.print(
        f"cache: built at {rate:.1f} views/s, {building.asked_seconds / building.seconds:.2f} of the bare teacher's rate; "
        f"{building.bytes / building.views / 1e3:.1f} kB a view; read and checked at "
        f"{building.bytes / building.read_seconds / 1e6:.0f} MB/s",
        highlight=False,
    )


def _recommend(job: Job, rates: dict[str, float], building: Building, images: int) -> None:
    """The placement that ends the whole run first, the cache's building included."""
    epochs = job.optim.epochs
    views = epochs if job.data.views is None else min(job.data.views, epochs)
    hours = {name: images * epochs / rate / 3600 for name, rate in rates.items() if name not in ("no teacher",)}
    hours["cache"] += views * images * building.seconds / building.views / 3600
    best = min(hours, key=lambda name: hours[name])
    size = building.bytes / building.views * images * views / 1e9
    print(
        f"one worker, {images} images, {epochs} epochs, {views} views each; hours, a cache's building ({size:.2f} GB) included:"
    )
    print("  " + ", ".join(f"{name} {each:.2f}" for name, each in hours.items()))
    if views > epochs / 2:
        print("  A cache pays when views come again: try data.views=2, or share it between runs.")
    print(f"recommended: {best}")


if __name__ == "__main__":
    sys.exit(main())
