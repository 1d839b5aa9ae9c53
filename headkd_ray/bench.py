"""Benchmark on your machine: ``python -m headkd_ray.bench teacher JOB [key.path=value ...]``.

Compares short, alternating stretches of training without a teacher, with an inline teacher (with the student's or the teacher's
RoIs), with a pool, and with a cache, and recommends a placement. The job's method must be head or akd.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.table import Table

from headkd_ray.cli import command_parser, positive, user_errors
from headkd_ray.errors import JobError
from headkd_ray.job import METHODS, Job, TwoStageDetectorSpec, load_job
from headkd_ray.report.terminal import Terminal

if TYPE_CHECKING:
    from headkd_ray.profiling.placements import Building, Placement


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("bench", __doc__)
    parser.add_argument("subject", choices=("teacher",))
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument("--steps", type=positive, default=20, help="steps per stretch (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="stretches of each placement (default %(default)s)")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        job = load_job(options.job, options.overrides)
        if "akd" not in METHODS[job.method].terms:
            raise JobError(f"method: {job.method} has no teacher to place; give a job whose method is head or akd")
        if isinstance(job.student, TwoStageDetectorSpec):
            raise JobError(f"student.kind: a {job.student.kind} uses its own RoIs, so there is nothing to compare")
        measure_teacher(job, options.steps, options.rounds)
    return 0


def measure_teacher(job: Job, steps: int, rounds: int) -> None:
    """Measure the placements, and print a table and a recommendation."""
    # Imported late, because torch and timm take ten seconds: mistakes in the job file are reported before that.
    from headkd_ray.data.shards import ShardSet
    from headkd_ray.data.training_set import training_set
    from headkd_ray.engine.distributed import Distributed
    from headkd_ray.engine.streams import Decode, decode_here
    from headkd_ray.profiling.placements import WARM_UP, Placement, fill, images_per_second, inline, measure, some_shards

    assert job.teacher is not None
    distributed = Distributed.here(job.cluster)
    shards = some_shards(ShardSet.open(job.data.train), (steps + WARM_UP) * job.data.batch_size)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="headkd-bench-"))
        theirs, cache = (_changed(job, "teacher", name, scratch) for name in ("inline", "cache"))
        both = job.teacher.answers_the_student
        own = _changed(job, "student", "inline", scratch) if both else theirs
        decode: Decode = decode_here
        if job.cluster.most_workers > 0:
            from headkd_ray.cluster.connect import connected
            from headkd_ray.cluster.ray_stream import decode_on_ray
            from headkd_ray.cluster.resources import check_resources
            from headkd_ray.cluster.trainer import with_absolute_paths

            pool, held = (with_absolute_paths(_changed(job, rois, "pool", scratch)) for rois in ("teacher", "student"))
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            stack.enter_context(connected(job.cluster))
            check_resources(pool.replace({"cluster.workers": 1}))
            decode = decode_on_ray(job.cluster)
        builder, building = fill(cache, shards, distributed)
        pooled = job.cluster.most_workers > 0
        placements = [Placement("no teacher", own, decode, teacher=False)]
        if both:
            placements.append(Placement("inline, student's RoIs", own, decode))
        if both and pooled:
            placements.append(Placement("pool, student's RoIs", held, decode_on_ray(job.cluster, held)))
        placements.append(Placement("inline, teacher's RoIs", theirs, decode, asked=inline(theirs, shards, distributed)))
        if pooled:
            placements.append(Placement("pool, teacher's RoIs", pool, decode_on_ray(job.cluster, pool)))
        placements.append(Placement("cache", cache, decode, cache=builder.cache))
        measure(placements, shards, steps, rounds)
    rates = {placement.name: images_per_second(placement) for placement in placements}
    _tell(placements, rates, building)
    _recommend(job, rates, building, len(training_set(job).index))


def _changed(job: Job, rois: str, placement: str, cache: str) -> Job:
    """Return the job with one view per image and the teacher's placement changed."""
    assert job.teacher is not None
    changes = {"teacher.placement": placement, "teacher.cache.path": cache, "distill.rois": rois, "data.views": 1}
    return job.replace(changes)


def _tell(placements: list[Placement], rates: dict[str, float], building: Building) -> None:
    bare = rates["no teacher"]
    table = Table(title="training steps of one worker")
    for name in ("teacher", "images/s", "time per step, no teacher = 1", "data wait"):
        table.add_column(name, justify="left" if name == "teacher" else "right")
    for placement in placements:
        rate, wait = rates[placement.name], sum(placement.waited) / sum(placement.seconds)
        table.add_row(placement.name, f"{rate:.1f}", f"{bare / rate:.2f}", f"{wait:.0%}")
    console = Terminal()
    console.print(table)
    rate = building.views / building.seconds
    console.print(
        f"cache: built at {rate:.1f} views/s, {building.asked_seconds / building.seconds:.2f} of the bare teacher's rate; "
        f"{building.bytes / building.views / 1e3:.1f} kB per view; read and checked at "
        f"{building.bytes / building.read_seconds / 1e6:.0f} MB/s",
        highlight=False,
    )


def _recommend(job: Job, rates: dict[str, float], building: Building, images: int) -> None:
    """Print the predicted hours of each placement, and recommend that which ends the whole run first, building included."""
    epochs = job.optim.epochs
    views = epochs if job.data.views is None else min(job.data.views, epochs)
    hours = {name: images * epochs / rate / 3600 for name, rate in rates.items() if name not in ("no teacher",)}
    hours["cache"] += views * images * building.seconds / building.views / 3600
    best = min(hours, key=lambda name: hours[name])
    size = building.bytes / building.views * images * views / 1e9
    print(
        f"one worker, {images} images, {epochs} epochs, {views} views each; hours, including building a cache ({size:.2f} GB):"
    )
    print("  " + ", ".join(f"{name} {each:.2f}" for name, each in hours.items()))
    if views > epochs / 2:
        print("  A cache pays off when views are reused: try data.views=2, or share it between runs.")
    print(f"recommended: {best}")


if __name__ == "__main__":
    sys.exit(main())
