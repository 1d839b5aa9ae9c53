"""The part "ray" of ``bench/gpu.sh``: HEAD on Ray Train with the GPU, compared with the same job without Ray.

The teacher is inline, in a pool on a share of the same GPU, or cached. Each row is a complete run of ``headkd_ray.train``, from
the check of the job to the exported student.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from gpu_recipes import NAMES, fresh_teacher, recipe
from gpu_results import Results, Row, Setting, setting
from noise import write_split

from headkd_ray import cache
from headkd_ray.cluster.connect import OWN_CLUSTER
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import Job
from headkd_ray.teacher.verify import open_builder
from headkd_ray.train import train

WARM = 4
"""Steps at the start of a run that do not count towards its rate."""
TEACHERS_ROIS = ("distill.rois=teacher", "distill.roi_budget=64")
POOL = ("teacher.placement=pool",)
RUNS: dict[str, tuple[str, ...]] = {
    "without Ray": ("cluster.workers=0",),
    "Ray Train": (),
    "pool, teacher's RoIs": (*POOL, *TEACHERS_ROIS),
    "cache": ("teacher.placement=cache", *TEACHERS_ROIS, "data.views=1"),
    "pool, student's RoIs": POOL,
}


def job_of(name: str, folder: Path, place: Setting) -> Job:
    """Return the job of a row."""
    on_gpu = place.device.type == "cuda"
    images, side = (2, 64) if place.tiny else (16, 320)
    shared = on_gpu and "pool" in name  # worker and teacher share one GPU
    keys = {
        "run.name": name.replace(" ", "-").replace(",", "").replace("'", ""),
        "run.storage": str(folder / "runs"),
        "data.train": str(folder / "train"),
        "data.val": str(folder / "val"),
        "data.batch_size": images,
        "data.short_side": [side, side],
        "data.long_side": side,
        "data.eval_short_side": side,
        "data.flip": 0.0,
        "teacher.checkpoint": str(folder / "teacher"),
        "teacher.cache.path": str(folder / "cache"),
        "teacher.pool": {"cpus": 0.5, "gpus": 0.4 * on_gpu},
        "optim": {"epochs": 1, "milestones": [], "lr_batch": None, "lr": 1e-5, "precision": "bf16" if on_gpu else "fp32"},
        "eval": {"every_epochs": 1, "batch_size": images},
        "log": {"every_steps": 1, "tensorboard": False},
        "cluster.workers": 1,
        "cluster.gpus_per_worker": (0.5 if shared else 1.0) * on_gpu,
        "cluster.cpus_per_worker": 0.5,
        "cluster.data_cpus": 1.0 if place.tiny else 8.0,
        "cluster.threads_per_worker": 1,
        "cluster.max_failures": 0,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]  # JSON is valid YAML
    return recipe("head", *overrides, *RUNS[name], tiny=place.tiny)


def run(name: str, folder: Path, place: Setting) -> Row:
    """Measure one row: the rate of its steps and its first loss, which is the same in all rows without the teacher's RoIs."""
    job = job_of(name, folder, place)
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    if name == "cache":
        device = torch.device("cpu")  # this process only coordinates: the processes of the pool run the teacher
        cache.build(job, open_builder(job, device), lambda unit, size: None)
    built = time.perf_counter() - started
    result = train(job, lambda record: records.append(record) if "losses" in record else None)
    steps = records[WARM:]
    return {
        "run": name,
        "steps": len(records),
        "images_per_second": median(record["images_per_second"] for record in steps),
        "data_wait": median(record["data_wait"] for record in steps),
        "memory_mib": records[-1]["memory_mib"],
        "first_loss": records[0]["losses"]["total"],
        "evaluated_images": result["best"]["images"],
        "seconds": time.perf_counter() - started,
        **({"cache_seconds": built} if name == "cache" else {}),
    }


def start_ray(place: Setting) -> None:
    """Start a cluster for this bench alone, without the dashboard, which the stripped-down Ray lacks."""
    os.environ.update(OWN_CLUSTER)
    store = (200 << 20) if place.tiny else (2 << 30)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    ray.init(address="local", object_store_memory=store, **quiet)


def main() -> int:
    """Measure as many rows as time allows; return 1 if one failed."""
    place = setting()
    results = Results("ray", place)
    failed = False
    steps, images, side = (8, 2, 64) if place.tiny else (24, 16, 320)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for split, count in {"train": steps * images, "val": images}.items():
            write_split(folder, split, count, side)
        save_detector(folder / "teacher", fresh_teacher(place.tiny), NAMES)
        for name in RUNS:
            if place.left() < 5:
                print("no time left for the remaining rows", flush=True)
                return 1
            try:
                if name != "without Ray" and not ray.is_initialized():
                    stack.callback(ray.shutdown)
                    start_ray(place)
                results.add(run(name, folder, place))
            except Exception as error:  # the remaining rows are still worth having
                failed = True
                results.add({"run": name, "error": repr(error)[:2000]})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
