"""Measure HEAD's whole training loop, data included, with Ray and without: ``python bench/step.py --ray``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from noise import CLASSES, write_split
from step_cases import Size

from headkd_ray.cluster.connect import connected
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import ClusterSpec, FasterRCNNSpec, Job
from headkd_ray.train import train

WARM = 3
"""Steps at the start of a run that do not count."""
BARE = "without Ray"
LOOPS: dict[str, dict[str, Any]] = {
    BARE: {"cluster.workers": 0},
    "Ray worker": {},
    "Ray worker and pool": {
        "teacher.placement": "pool",
        "distill.rois": "teacher",
        "teacher.pool": {"cpus": 0.5},  # shares of CPUs, so that all of it fits on two cores
        "cluster.cpus_per_worker": 0.5,
    },
}


def measure_loops(size: Size, threads: int, steps: int, runs: int = 2) -> list[dict[str, Any]]:
    """Run each of ``LOOPS`` ``runs`` times in turn, ``steps`` steps that count each; return medians and ratios."""
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as scratch, connected(ClusterSpec()):
        job = _job(Path(scratch), size, threads, steps + WARM)
        for turn in range(runs):
            for name, changes in LOOPS.items():
                records = _records(job.replace({"run.name": f"{name.replace(' ', '-')}-{turn}", **changes}))
                times[name] += [1e3 * size.images / record["images_per_second"] for record in records[WARM:]]
                print(f"run {turn + 1} of {runs}, {name}: median {median(times[name]):.0f} ms a step", flush=True)
    bare = median(times[BARE])
    return [{"loop": name, "ms": median(all_of), "times_bare": median(all_of) / bare} for name, all_of in times.items()]


def _records(job: Job) -> list[dict[str, Any]]:
    """Train ``job`` and return the log's records of steps."""
    records: list[dict[str, Any]] = []
    train(job, lambda record: records.append(record) if "losses" in record else None)
    return records


def _job(folder: Path, size: Size, threads: int, steps: int) -> Job:
    """Write splits of noise and a teacher into ``folder``, and return a job on them."""
    counts = {"train": size.images * steps, "val": size.images}
    splits = {name: write_split(folder, name, count, size.side) for name, count in counts.items()}
    names = [f"class {number}" for number in range(1, CLASSES + 1)]
    save_detector(folder / "teacher", build_detector(FasterRCNNSpec(), CLASSES), names)
    sides = {"short_side": [size.side] * 2, "long_side": size.side, "eval_short_side": size.side}
    return Job.model_validate(
        {
            "run": {"name": "loop", "storage": str(folder / "runs")},
            "method": "head",
            "data": {**splits, **sides, "batch_size": size.images},
            "teacher": {"checkpoint": str(folder / "teacher")},
            "optim": {"epochs": 1, "milestones": [], "precision": size.precision},
            "log": {"every_steps": 1, "tensorboard": False},
            "cluster": {"workers": 1, "gpus_per_worker": int(size.device.type == "cuda"), "threads_per_worker": threads},
        }
    )
