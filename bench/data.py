"""Compare the data stream with bare decoding and resizing: ``python bench/data.py [--images 64] [--rounds 8]``.

Both get the same JPEGs of ``--side`` pixels, shown at ``--view`` pixels: the stream from shards to padded uint8 batches with
boxes, on one thread; torchvision's decoder and resize one image after the other, which keep nothing. They take turns, batch by
batch, and what counts is CPU time, which other processes on the machine disturb less than elapsed time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from noise import write_split
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from headkd_ray.data.batch import collate
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, load_window
from headkd_ray.data.epoch_order import Window, train_rows, train_windows
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.views import show
from headkd_ray.job import DataSpec

BATCH = 16
Times = dict[str, list[float]]
Result = TypeVar("Result")


def timed(times: Times, name: str, images: int, function: Callable[[], Result]) -> Result:
    """Return what ``function`` returns, and note its CPU milliseconds per image under ``name``."""
    started = time.process_time()
    result = function()
    times.setdefault(name, []).append(1e3 * (time.process_time() - started) / images)
    return result


def bare(pending: PendingBatch, side: int) -> None:
    """Decode and resize a batch's images with torchvision, and nothing else."""
    for sample in pending.samples:
        encoded = torch.frombuffer(bytearray(sample.image), dtype=torch.uint8)
        resize(decode_image(encoded, ImageReadMode.RGB), [side, side], antialias=True)


def measure(shards: ShardSet, maker: BatchMaker, windows: list[Window], side: int) -> Iterator[Times]:
    """Yield the CPU milliseconds per image of each window, after one that does not count."""
    for number, window in enumerate(windows):
        times: Times = {}
        images = sum(len(batch.rows) for batch in window.batches)
        for pending in timed(times, "read", images, partial(load_window, shards, window, maker)):
            count = len(pending.samples)
            timed(times, "batch", count, partial(maker, pending))
            timed(times, "bare", count, partial(bare, pending, side))
            parts(times, maker, pending)
        if number:
            yield times


def parts(times: Times, maker: BatchMaker, pending: PendingBatch) -> None:
    """Note what the parts of making a batch take by themselves."""
    count = len(pending.samples)
    timed(times, "decode", count, lambda: [sample.pixels() for sample in pending.samples])
    views = maker.views(pending)
    timed(
        times,
        "decode + view",
        count,
        lambda: [show([sample], view) for sample, view in zip(pending.samples, views, strict=True)],
    )
    examples = list(map(maker.example, pending.samples, pending.numbers, views))
    timed(times, "pad", count, lambda: collate(examples, pending.step, maker.spec.pad))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count")
    parser.add_argument("--side", type=int, default=640, help="side of the JPEGs, pixels")
    parser.add_argument("--view", type=int, default=720, help="side of the views, pixels")
    parser.add_argument("--reduced", action="store_true", help="with data.reduced_decode")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
    spec = DataSpec(
        train="-", val="-", batch_size=BATCH, short_side=(options.view, options.view), long_side=options.view,
        shuffle_window=options.images, reduced_decode=options.reduced,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        shards = ShardSet.open(write_split(Path(scratch), "train", options.images, options.side))
        rows = train_rows(shards.index, keep_empty=True)
        windows = train_windows(
            shards.index, rows, seed=0, rank=0, world_size=1, batch_size=BATCH, window=options.images,
            epochs=options.rounds + 1, start_step=0,
        )  # fmt: skip
        rounds = list(measure(shards, BatchMaker(spec, 0, train=True), list(windows), options.view))
    medians = {name: statistics.median(value for times in rounds for value in times[name]) for name in rounds[0]}
    stream = medians["read"] + medians["batch"]
    print(f"ratio of images per second, stream / bare: {medians['bare'] / stream:.2f}")
    print(f"stream: {1e3 / stream:.0f} images/s per core; bare: {1e3 / medians['bare']:.0f}")
    print("CPU ms per image: " + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()))
    print(f"({options.side} px JPEGs at {options.view} px, {options.rounds} rounds of {options.images} images, medians)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
