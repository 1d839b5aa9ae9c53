"""Measure HEAD's steps/s with and without Ray: ``python bench/head_step.py [--steps 12] [--rounds 2] [--side 320]``.

R18 RetinaNet student, R50 Faster R-CNN teacher with random weights (trained ones would cost the same), 2 images of side x side
per step, 80 classes, on the CPU. The same job runs with and without Ray in turn, ``rounds`` times; the first steps of each run
are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from noise import CLASSES, write_split

from headkd_ray.cluster.connect import connected
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import ClusterSpec, FasterRCNNSpec, Job
from headkd_ray.train import train

WARM = 3
"""Steps at the start of a run that do not count."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps per run, including the first ones")
    parser.add_argument("--rounds", type=int, default=2, help="runs with Ray, and as many without")
    parser.add_argument("--side", type=int, default=320, help="image side, pixels")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the training process")
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps {options.steps}: the first {WARM} steps do not count; give a greater number")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        counts = {"train": 2 * options.steps, "val": 2}
        splits = {name: write_split(folder, name, count, options.side) for name, count in counts.items()}
        sides = {"short_side": [options.side] * 2, "long_side": options.side, "eval_short_side": options.side}
        names = [f"class {c}" for c in range(1, CLASSES + 1)]
        save_detector(folder / "teacher", build_detector(FasterRCNNSpec(), CLASSES), names)

        def seconds_per_step(name: str, workers: int) -> list[float]:
            job = Job.model_validate(
                {
                    "run": {"name": name, "storage": str(folder / "runs")},
                    "method": "head",
                    "data": {**splits, **sides},
                    "teacher": {"checkpoint": str(folder / "teacher")},
                    "optim": {"epochs": 1, "milestones": []},
                    "log": {"every_steps": 1, "tensorboard": False},
                    "cluster": {"workers": workers, "gpus_per_worker": 0, "threads_per_worker": options.threads},
                }
            )
            rates: list[float] = []

            def note(record: dict[str, Any]) -> None:
                if "losses" in record:
                    rates.append(2 / record["images_per_second"])

            train(job, note)
            return rates[WARM:]

        measured: dict[str, list[float]] = {"without Ray": [], "with Ray": []}
        with connected(ClusterSpec()):
            for turn in range(options.rounds):
                for way, workers in (("without Ray", 0), ("with Ray", 1)):
                    started = time.perf_counter()
                    measured[way] += seconds_per_step(f"{way.replace(' ', '-')}-{turn}", workers)
                    print(f"round {turn + 1}, {way}: {time.perf_counter() - started:.0f} s in all", flush=True)
    medians = {way: statistics.median(times) for way, times in measured.items()}
    for way, times in measured.items():
        spread = f"min {min(times):.3f}, max {max(times):.3f}, n {len(times)}"
        print(f"{way}: median {medians[way]:.3f} s/step = {1 / medians[way]:.3f} steps/s ({spread})")
    print(f"ratio of step times, with / without Ray: {medians['with Ray'] / medians['without Ray']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
