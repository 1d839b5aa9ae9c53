"""Measure what the Ray stream costs while training is the slower side: ``python bench/stream_wait.py [--batches 300]``.

A consumer takes a batch, sleeps as long as a small training step takes, and takes the next. All CPU time of its process is then
overhead: Ray Data's scheduling loop runs in a thread of the train worker. Two ways are measured in turn, once Ray's buffers are
full: as the project runs it (paced), and as Ray runs it by itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headkd_ray.cluster import ray_stream, unhurried
from headkd_ray.cluster.connect import connected
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.streams import Streams
from headkd_ray.job import ClusterSpec, Job

STEP = 0.05
"""Seconds that the consumer sleeps per batch."""


@contextmanager
def pace(seconds: float) -> Iterator[None]:
    before, unhurried.STEP_SECONDS = unhurried.STEP_SECONDS, seconds
    try:
        yield
    finally:
        unhurried.STEP_SECONDS = before


def busy_share(streams: Streams, warm: int, batches: int) -> float:
    """Return this process's CPU seconds per second over ``batches`` batches, after the first ``warm``."""
    with streams.train(first=0) as source:
        for number, _ in enumerate(source):
            if number == warm:
                started, cpu = time.perf_counter(), time.process_time()
            time.sleep(STEP)
            if number == warm + batches:
                break
        return (time.process_time() - cpu) / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=300, help="batches that count")
    options = parser.parse_args()
    warm = 300  # batches until Ray's buffers are full
    with tempfile.TemporaryDirectory() as scratch, connected(ClusterSpec()):
        drawn = draw_dataset(Path(scratch) / "drawn", train=400, val=8)
        splits = {name: str(Path(scratch) / name) for name in ("train", "val")}
        for name, path in splits.items():
            prepare_split(str(getattr(drawn, name)), str(drawn.images), path)
        job = Job.model_validate(
            {
                "run": {"name": "wait", "storage": scratch},
                "method": "supervised",
                "data": {**splits, "batch_size": 8, "short_side": [320, 320], "long_side": 480, "eval_short_side": 320},
                "optim": {"epochs": 1000, "milestones": []},
            }
        )
        train, val = (ShardSet.open(path) for path in splits.values())
        streams = Streams(job, Distributed.alone(use_gpu=False), train, val, ray_stream.decode_on_ray(job.cluster))
        for way, seconds in (("paced", unhurried.STEP_SECONDS), ("as Ray does", 0.0)) * 2:
            with pace(seconds):
                print(f"{way}: {busy_share(streams, warm, options.batches):.2f} CPU seconds per second", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
