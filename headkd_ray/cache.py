"""Cache soft targets on disk: compute them once, then train without running the teacher.

    python -m headkd_ray.cache build jobs/mine.yaml     run the teacher on every view of the job, and store its soft targets
    python -m headkd_ray.cache verify jobs/mine.yaml    run it again on a sample, and compare
    python -m headkd_ray.cache info jobs/mine.yaml      print size and coverage

The job needs distill.rois: teacher; teacher.placement: cache makes training read the cache. A build that was interrupted
continues where it stopped; a damaged file is built again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headkd_ray.cli import command_parser, positive, user_errors
from headkd_ray.errors import CacheError
from headkd_ray.job import Job, load_job
from headkd_ray.report.terminal import progress_bar
from headkd_ray.text import printable

if TYPE_CHECKING:
    from headkd_ray.teacher import Builder, Cache

LEAST_COSINE = 0.99
"""Minimum mean cosine at which a cache is taken to be the teacher's."""


def build(job: Job, builder: Builder, done: Callable[[tuple[int, int], int], None]) -> None:
    """Fill the job's cache, in this process or on Ray as ``job.cluster`` says; existing intact files are kept.

    ``done`` is called with each (shard, view) and its size in bytes, or 0 if it was kept. Raises UserError.
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
        from headkd_ray.cluster.cache_build import build_on_ray  # workers: 0 must run where Ray is not installed

        build_on_ray(job, cache.units(), built)
    cache.sweep()


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("cache", __doc__)
    parser.add_argument("action", choices=("build", "verify", "info"))
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
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
    builder = _builder(job)
    started, sizes = time.perf_counter(), list[int]()
    with progress_bar() as bar:
        task = bar.add_task("running the teacher", total=len(builder.cache.units()))

        def done(unit: tuple[int, int], size: int) -> None:
            sizes.append(size)
            bar.advance(task)

        build(job, builder, done)
    seconds, built = time.perf_counter() - started, sum(size > 0 for size in sizes)
    print(f"built {built} files in {seconds:.1f} s; {len(sizes) - built} already existed")
    _tell(builder.cache)
    return 0


def _verify(job: Job, sample: int) -> int:
    from headkd_ray.teacher.verify import verify

    builder = _builder(job, on_gpu=True)
    found = verify(builder, sample)
    print(f"{printable(builder.cache.folder.uri)}: {found.views} views compared with the teacher")
    print(f"  RoIs that it would choose now: the same in {found.same_rois} of {found.views} views")
    print(f"  cosine of the features: mean {found.cosine:.6f}, minimum {found.least_cosine:.6f}")
    print(f"  largest difference: {found.worst:.2%} of the largest feature")
    if found.same_class is not None:
        print(f"  class of the largest logit: the same for {found.same_class:.2%} of the RoIs")
    if not found.cosine >= LEAST_COSINE:
        raise CacheError(f"{builder.cache.folder.uri}: not built with this teacher; delete the folder and build it again")
    return 0


def _info(job: Job) -> int:
    cache = _builder(job).cache
    cache.check_recipe()
    _tell(cache)
    return 0


def _tell(cache: Cache) -> None:
    """Print the cache's size and coverage."""
    total, missing = len(cache.units()), len(cache.missing())
    sizes = [size or 0 for size in cache.folder.sizes([cache.file(*unit) for unit in cache.units()])]
    images = sum(cache.shards.meta.shards[shard].images for (shard, _), size in zip(cache.units(), sizes, strict=True) if size)
    print(
        f"{printable(cache.folder.uri)}: {cache.views} views of {cache.shards.meta.images} images, "
        f"up to {cache.budget} RoIs each"
    )
    print(f"  {total - missing} of {total} files, {sum(sizes) / 1e6:.1f} MB, {sum(sizes) / max(images, 1) / 1e3:.1f} kB/view")


def _builder(job: Job, on_gpu: bool = False) -> Builder:
    # Imported late, because torch and timm take ten seconds: mistakes in the job file are reported before that.
    from headkd_ray.engine.distributed import Distributed
    from headkd_ray.teacher.verify import open_builder

    # On a cluster other processes run the teacher, so this one needs no GPU.
    here = on_gpu or job.cluster.workers == 0
    return open_builder(job, Distributed.here(job.cluster).device if here else "cpu")


if __name__ == "__main__":
    sys.exit(main())
