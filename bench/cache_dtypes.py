"""Compare fp16 and int8 caches: ``python bench/cache_dtypes.py JOB [key.path=value ...] [--images 256]``.

Fills a cache of each type for the first images of data.train, one view each, and computes the losses of the job's untrained
student on the same batches with both. Prints bytes per view and, for each loss, the ratio of int8 to fp16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator

import torch

from headkd_ray.cli import positive, user_errors
from headkd_ray.data.shards import ShardSet
from headkd_ray.distill import build_training_model
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.job import Job, load_job
from headkd_ray.profiling.placements import Building, fill, some_shards
from headkd_ray.teacher import Cache
from headkd_ray.teacher.loading import teacher_of

KEYS = ("distill.rois=teacher", "teacher.placement=cache", "data.views=1")
"""Overrides that the comparison needs; they come last and so replace the job's own values."""


def losses_of(job: Job, shards: ShardSet, cache: Cache) -> Iterator[dict[str, float]]:
    """Yield the distillation losses of the untrained student, past all warm-ups, for each batch of one epoch."""
    distributed = Distributed.here(job.cluster)
    teacher = teacher_of(job, shards.meta.classes)
    model = build_training_model(job, len(shards.meta.classes), teacher, steps_per_epoch=1).to(distributed.device).train()
    with Streams(job, distributed, shards, shards, decode_here).train(first=0, cache=cache) as batches, torch.no_grad():
        for batch in (each.to(distributed.device) for each in batches):
            draws = torch.Generator(distributed.device).manual_seed(batch.step)
            step = job.distill.warmup_steps
            losses = model(batch, step, draws)
            yield {name: loss.item() for name, loss in losses.items() if name.startswith(("loss_akd", "loss_ckd"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument("--images", type=positive, default=256, help="use at least this many images (default %(default)s)")
    with user_errors(), tempfile.TemporaryDirectory(prefix="headkd-bench-") as scratch:
        options = parser.parse_intermixed_args()
        sums: dict[str, dict[str, float]] = {}
        sizes: dict[str, Building] = {}
        for dtype in ("fp16", "int8"):
            place = (f"teacher.cache.dtype={dtype}", f"teacher.cache.path={scratch}/{dtype}")
            job = load_job(options.job, [*options.overrides, *KEYS, *place, "optim.epochs=1", "optim.milestones=[]"])
            shards = some_shards(ShardSet.open(job.data.train), options.images)
            builder, sizes[dtype] = fill(job, shards, Distributed.here(job.cluster))
            sums[dtype] = {}
            for losses in losses_of(job, shards, builder.cache):
                for name, loss in losses.items():
                    sums[dtype][name] = sums[dtype].get(name, 0.0) + loss
    for dtype, building in sizes.items():
        print(f"{dtype}: {building.bytes / building.views / 1e3:.1f} kB per view ({building.views} views)")
    for name, loss in sums["fp16"].items():
        print(f"{name}: int8 / fp16 = {sums['int8'][name] / loss:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
