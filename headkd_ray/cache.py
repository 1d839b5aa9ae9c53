"""Soft targets on disk: compute them once, then train without a teacher.

    python -m headkd_ray.cache build jobs/mine.yaml     ask the teacher about every view of the job, and keep its answers
    python -m headkd_ray.cache verify jobs/mine.yaml    ask again about a sample, and compare
    python -m headkd_ray.cache info jobs/mine.yaml      size and coverage

The job needs distill.rois: teacher; teacher.placement: cache makes training read the cache. A build that was interrupted goes
on where it stopped; a damaged file is built again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headkd_ray.doors import positive, user_errors
from headkd_ray.errors import CacheError
from headkd_ray.job import Job, load_job
from headkd_ray.report.terminal import Terminal
from headkd_ray.text import printable

if TYPE_CHECKING:
    from headkd_ray.teacher import Builder, Cache

LEAST_COSINE = 0.99
"""Below this, on average, the cache is another teacher's."""


def build(job: Job, builder: Builder, done: Callable[[tuple[int, int], int], None]) -> None:
    """Fill the job's cache where ``job.cluster`` says; files that are there and sound are kept.

    ``done`` is called with each (shard, view) and its bytes, 0 if it was kept. Raises UserError.
    """
    cache = builder.cache
    cache.folder.check_writable()
    cache.begin()
    left = len(cache.missing())

    def built(unit: tuple[int, int], size: int) -> None:
        nonlocal left
        left -= size > 0
        done(unit, size)
        cache.check_room(left * size)

    if job.cluster.workers == 0:
        for unit in cache.units():
            built(unit, builder.build(*unit))
    else:
        from headkd_ray.cluster.caching import build_on_ray  # workers: 0 must run where Ray is not installed

        build_on_ray(job, cache.units(), built)
    cache.sweep()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("build", "verify", "info"))
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument(
        "--sample", type=positive, default=32, metavar="N", help="views that verify compares (default %(default)s)"
    )
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        job = load_job(options.job, options.overrides)
        action = {"build": _build, "verify": lambda job: _verify(job, options.sample), "info": _info}[options.action]
        return action(job)


def _build(job: Job) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    builder = _builder(job)
    started, sizes = time.perf_counter(), list[int]()
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("asking the teacher", total=len(builder.cache.units()))

        def done(unit: tuple[int, int], size: int) -> None:
            sizes.append(size)
            bar.advance(task)

        build(job, builder, done)
    seconds, built = time.perf_counter() - started, sum(size > 0 for size in sizes)
    print(f"built {built} files in {seconds:.1f} s; {len(sizes) - built} were there")
    _tell(builder.cache)
    return 0


def _verify(job: Job, sample: int) -> int:
    from headkd_ray.engine.caching import verify

    builder = _builder(job, on_gpu=True)
    found = verify(builder, sample)
    print(f"{printable(builder.cache.folder.uri)}: {found.views} views compared with the teacher")
    print(f"  RoIs that it would choose now: the same in {found.same_rois} of {found.views} views")
    print(f"  cosine of the features: mean {found.cosine:.6f}, least {found.least_cosine:.6f}")
    print(f"  greatest difference: {found.worst:.2%} of the greatest feature")
    if found.same_class is not None:
        print(f"  class of the greatest logit: the same for {found.same_class:.2%} of the RoIs")
    if not found.cosine >= LEAST_COSINE:
        raise CacheError(f"{builder.cache.folder.uri}: not what this teacher says; delete the folder and build it again")
    return 0


def _info(job: Job) -> int:
    cache = _builder(job).cache
    cache.check_recipe()
    _tell(cache)
    return 0


def _tell(cache: Cache) -> None:
    """Size and coverage."""
    total, missing = len(cache.units()), len(cache.missing())
    sizes = [size or 0 for size in cache.folder.sizes([cache.file(*unit) for unit in cache.units()])]
    images = sum(cache.shards.meta.shards[shard].images for (shard, _), size in zip(cache.units(), sizes, strict=True) if size)
    print(
        f"{printable(cache.folder.uri)}: {cache.views} views of {cache.shards.meta.images} images, "
        f"up to {cache.budget} RoIs each"
    )
    print(f"  {total - missing} of {total} files, {sum(sizes) / 1e6:.1f} MB, {sum(sizes) / max(images, 1) / 1e3:.1f} kB a view")


def _builder(job: Job, on_gpu: bool = False) -> Builder:
    # Imported here, because torch and timm take ten seconds: what is wrong with the job file is told before.
    from headkd_ray.engine.caching import open_builder
    from headkd_ray.engine.world import World

    # On a cluster others ask the teacher, so that this process needs no GPU.
    here = on_gpu or job.cluster.workers == 0
    return open_builder(job, World.here(job.cluster).device if here else "cpu")


if __name__ == "__main__":
    sys.exit(main())
