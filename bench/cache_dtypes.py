"""fp16 beside int8: ``python bench/cache_dtypes.py JOB [key.path=value ...] [--images 256]``.

Fills a cache of each type for the first images of data.train, one view each, and computes the losses of the job's untrained
student on the same batches with both. Prints bytes a view and, loss by loss, how far int8 is from fp16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator

import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.distill import build_trainee
from headkd_ray.doors import positive, user_errors
from headkd_ray.engine.placements import Building, fill, some_shards
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.engine.teacher import teacher_of
from headkd_ray.engine.world import World
from headkd_ray.job import Job, load_job
from headkd_ray.teacher import Cache

KEYS = ("distill.rois=teacher", "teacher.placement=cache", "data.views=1")
"""What the job must have; given last, so they replace the job's own."""


def losses_of(job: Job, shards: ShardSet, cache: Cache) -> Iterator[dict[str, float]]:
    """The distillation losses of the untrained student, past all warm-ups, batch by batch of one epoch."""
    world = World.here(job.cluster)
    teacher = teacher_of(job, shards.meta.classes)
    trainee = build_trainee(job, len(shards.meta.classes), teacher, steps_per_epoch=1).to(world.device).train()
    with Streams(job, world, shards, shards, decode_here).train(first=0, cache=cache) as batches, torch.no_grad():
        for batch in (each.to(world.device) for each in batches):
            draws = torch.Generator(world.device).manual_seed(batch.step)
            step = job.distill.warmup_steps
            losses = trainee(batch.images, batch.sizes, batch.boxes, batch.labels, step, draws, targets=batch.targets)
            yield {name: loss.item() for name, loss in losses.items() if name.startswith(("loss_akd", "loss_ckd"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument("--images", type=positive, default=256, help="at least so many (default %(default)s)")
    with user_errors(), tempfile.TemporaryDirectory(prefix="headkd-bench-") as scratch:
        options = parser.parse_intermixed_args()
        sums: dict[str, dict[str, float]] = {}
        sizes: dict[str, Building] = {}
        for dtype in ("fp16", "int8"):
            place = (f"teacher.cache.dtype={dtype}", f"teacher.cache.path={scratch}/{dtype}")
            job = load_job(options.job, [*options.overrides, *KEYS, *place, "optim.epochs=1", "optim.milestones=[]"])
            shards = some_shards(ShardSet.open(job.data.train), options.images)
            builder, sizes[dtype] = fill(job, shards, World.here(job.cluster))
            sums[dtype] = {}
            for losses in losses_of(job, shards, builder.cache):
                for name, loss in losses.items():
                    sums[dtype][name] = sums[dtype].get(name, 0.0) + loss
    for dtype, building in sizes.items():
        print(f"{dtype}: {building.bytes / building.views / 1e3:.1f} kB a view ({building.views} views)")
    for name, loss in sums["fp16"].items():
        print(f"{name}: int8 / fp16 = {sums['int8'][name] / loss:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
