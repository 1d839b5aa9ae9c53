"""The part "data" of ``bench/gpu.sh``: images per second from shards to padded batches on the device, by number of CPUs.

640-pixel JPEGs are shown at 640 pixels and decoded by one thread per CPU; the process is confined to those CPUs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

from gpu_results import Results, Row, Setting, setting
from noise import write_split

from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, local_stream
from headkd_ray.data.epoch_order import Window
from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.loop import on_device
from headkd_ray.engine.streams import Streams
from headkd_ray.job import Job

COUNTS = (16, 8, 4, 2, 1)


def decode_with(
    threads: int, shards: ShardSet, windows: Iterable[Window], maker: BatchMaker
) -> AbstractContextManager[Iterator[Batch]]:
    """Decode like ``engine.streams.decode_here``, with a given number of threads."""
    return closing(local_stream(shards, windows, maker, threads=threads))


def rate(cpus: int, job: Job, place: Setting, seconds: float) -> Row:
    """Measure one row for ``seconds``, not counting the first batches."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])  # applies to threads started from here on
    shards = ShardSet.open(job.data.train)
    streams = Streams(job, Distributed(0, 1, place.device), shards, shards, partial(decode_with, cpus))
    images, started = 0, 0.0
    with streams.train(first=0) as stream:
        for number, batch in enumerate(on_device(stream, place.device)):
            if number == 2 * cpus + 2:
                started = time.perf_counter()
            elif started:
                images += len(batch.images)
                if time.perf_counter() - started > seconds:
                    break
    found = images / (time.perf_counter() - started)
    return {"cpus": cpus, "images_per_second": found, "images_per_second_and_cpu": found / cpus}


def main() -> int:
    """Measure as many rows as time allows."""
    place = setting()
    results = Results("data", place)
    all_cpus = sorted(os.sched_getaffinity(0))
    count, side, batch = (48, 160, 4) if place.tiny else (256, 640, 16)
    with tempfile.TemporaryDirectory() as scratch:
        split = write_split(Path(scratch), "train", count, side)
        sides = {"short_side": [side, side], "long_side": side, "batch_size": batch, "shuffle_window": 64}
        job = Job.model_validate(
            {
                "run": {"name": "data"},
                "method": "supervised",
                "data": {"train": split, "val": split, **sides},
                "optim": {"epochs": 1000, "milestones": []},
                "cluster": {"workers": 0},
            }
        )
        for cpus in (number for number in COUNTS if number <= len(all_cpus)):
            os.sched_setaffinity(0, all_cpus)
            results.add(rate(cpus, job, place, min(3.0, 0.2 * place.left()) if not place.tiny else 0.5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
