"""Measure the error of ``python -m headkd_ray.plan``: ``python bench/plan_error.py [--jobs head] [--images 240] [--rounds 1]``.

Plans the small baseline and the small HEAD job (the quickstart's) for 0, 1 and 2 workers, then trains them and compares images
per second over the second half of each run. Each worker has one torch thread; 2 workers share this machine's CPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import Job, load_job
from headkd_ray.profiling.calibration import calibrate
from headkd_ray.profiling.cost_model import Machine, Prices, plan, work_of
from headkd_ray.train import train

JOBS = Path(__file__).parents[1] / "jobs" / "small"
EVERY = 5
"""Steps per log record."""
BANDWIDTH = 1e9
"""Bytes per second between processes of one machine. Sending gradients is a small share of a step here."""


def planned(job: Job, steps: int) -> float:
    """Return the images per second that the plan predicts."""
    train_set, val_set = ShardSet.open(job.data.train), ShardSet.open(job.data.val)
    costs = calibrate(job, train_set, val_set, steps).costs
    work = work_of(job, train_set, val_set, on_gpu=False)
    workers = max(1, job.cluster.most_workers)
    return plan(work, costs, Prices(), workers, BANDWIDTH, Machine(os.cpu_count() or 1, workers)).images_per_second


def measured(job: Job) -> float:
    """Return the images per second of a run: the median of the log records of its second half, when all buffers are full."""
    rates: list[float] = []

    def note(record: dict[str, Any]) -> None:
        if "losses" in record:
            rates.append(record["images_per_second"])

    train(job, note)
    return statistics.median(rates[len(rates) // 2 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=("baseline", "head"), default=("baseline", "head"))
    parser.add_argument("--images", type=int, default=240, help="drawn images")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each job and number of workers")
    parser.add_argument("--steps", type=int, default=20, help="micro-batches that a plan times")
    options = parser.parse_args()
    table = Table(title=f"images per second, planned and measured; {os.cpu_count()} CPUs")
    for name in ("job", "workers", "planned", "measured", "error"):
        table.add_column(name, justify="left" if name == "job" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw_dataset(Path(scratch) / "drawn", train=options.images, val=8)
        splits = {name: f"{scratch}/{name}" for name in ("train", "val")}
        for name, path in splits.items():
            prepare_split(str(getattr(drawn, name)), str(drawn.images), path)
        common = [
            *(f"data.{name}={path}" for name, path in splits.items()),
            *(f"run.storage={scratch}/runs", f"optim.epochs={options.epochs}", "optim.milestones=[]"),
            *(f"log.every_steps={EVERY}", "log.tensorboard=false", f"eval.every_epochs={options.epochs}"),
            *("cluster.gpus_per_worker=0", "cluster.threads_per_worker=1"),
            *("cluster.cpus_per_worker=0.5", "cluster.data_cpus=0.5"),  # otherwise Ray would not start 2 workers on 2 CPUs
        ]
        classes = ShardSet.open(splits["train"]).meta.classes
        teacher = load_job(str(JOBS / "teacher.yaml"), common)
        torch.manual_seed(0)
        save_detector(f"{scratch}/teacher", build_detector(teacher.student, len(classes)), classes)
        for name in options.jobs:
            own = [*common, *([f"teacher.checkpoint={scratch}/teacher"] if name == "head" else [])]
            for workers in (0, 1, 2):
                for turn in range(options.rounds):
                    changes = [*own, f"cluster.workers={workers}", f"run.name={name}-{workers}-{turn}"]
                    job = load_job(str(JOBS / f"{name}.yaml"), changes)
                    expected, found = planned(job, options.steps), measured(job)
                    table.add_row(name, str(workers), f"{expected:.1f}", f"{found:.1f}", f"{expected / found - 1:+.0%}")
                    print(f"{name}, {workers} workers: {expected:.1f} planned, {found:.1f} measured", flush=True)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
