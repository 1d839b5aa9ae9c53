"""Predict what a run will cost before you start it: ``python -m headkd_ray.plan JOB [key.path=value ...]``.

Times a few real steps of the job on this machine, which should be like those that you want to rent, and predicts steps, hours,
money and bytes for several numbers of workers. The formulas of the model are in headkd_ray/profiling/cost_model.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from headkd_ray.cli import command_parser, positive, user_errors
from headkd_ray.job import Job, load_job
from headkd_ray.report.plan_tables import cost_table, plan_table
from headkd_ray.report.terminal import Terminal
from headkd_ray.text import rounded

if TYPE_CHECKING:
    from headkd_ray.profiling.calibration import Calibration
    from headkd_ray.profiling.cost_model import Plan, Work

MODEL = (
    "Model: each of k workers is as fast as the one measured here. A step takes as long as the slowest of data, teacher (in a "
    "pool) and student (with an inline teacher), which work at the same time, then the optimizer's update, then sending "
    "2 (k - 1) / k of the gradients; or longer, if the machine has too few CPUs for everything that runs on it. Not included: "
    "starting machines and Ray, reading a cache, checkpoints, metrics, failures."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_intermixed_args(arguments)
        job = load_job(options.job, options.overrides)
        workers = options.workers or ([1] if job.cluster.workers == 0 else sorted({1, 2, 4, 8, job.cluster.most_workers}))
        prices = (options.price_per_gpu_hour, options.price_per_cpu_hour)
        tell(job, options.steps, workers, prices, options.gbps, options.workers_per_machine)
    return 0


def tell(
    job: Job, steps: int, workers: list[int], hourly: tuple[float, float], gbps: float, per_machine: int | None = None
) -> None:
    """Measure the job, and print the tables; ``hourly`` has the prices of a GPU hour and a CPU hour."""
    # Imported late, because torch and timm take ten seconds: mistakes in the job file are reported before that.
    import torch

    from headkd_ray.data.shards import ShardSet
    from headkd_ray.data.training_set import training_set
    from headkd_ray.profiling.calibration import calibrate
    from headkd_ray.profiling.cost_model import Machine, Prices, plan, work_of

    train, val = training_set(job), ShardSet.open(job.data.val)
    measured = calibrate(job, train, val, steps)
    work = work_of(job, train, val, on_gpu=measured.device.type == "cuda")
    machine = Machine(os.cpu_count() or 1, per_machine or max(1, torch.cuda.device_count()))
    plans = [plan(work, measured.costs, Prices(*hourly), count, gbps * 1e9 / 8, machine) for count in workers]
    console = Terminal()
    console.print(cost_table(asdict(measured.costs), measured.device.type))
    console.print(plan_table([asdict(each) for each in plans], with_money=any(hourly)))
    for line in _notes(job, work, measured, plans, gbps):
        console.print(line)


def _notes(job: Job, work: Work, measured: Calibration, plans: list[Plan], gbps: float) -> list[str]:
    """Return sentences about what the tables do not show."""
    from headkd_ray.profiling.cost_model import cache_bytes

    parameters = measured.costs.parameters / 1e6
    notes = [
        f"{work.images} images, {work.epochs} epochs; {parameters:.2f} M trained parameters. MB/step: what a worker sends to "
        f"others and exchanges with its teachers, at {gbps:g} Gbit/s."
    ]
    if job.teacher is not None and job.distill.rois == "teacher" and measured.codec is not None:
        size = cache_bytes(work.distinct, work.views, job.distill.roi_budget, measured.codec)
        built = f", whose building takes {rounded(plans[0].build_hours)} of the hours" if work.placement == "cache" else ""
        dtype = measured.codec.dtype
        notes.append(f"A cache of {work.views} views per image: at most {size / 1e9:.3g} GB ({dtype}, uncompressed){built}.")
    if work.gpus and measured.device.type == "cpu":
        notes.append("warning: the job requests GPUs, but there is none here: these are a CPU's times.")
    return [*notes, MODEL]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", __doc__)
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument(
        "--workers", type=positive, nargs="+", metavar="K", help="numbers of workers (default: 1, 2, 4, 8 and the job's)"
    )
    parser.add_argument("--price-per-gpu-hour", type=_price, default=0.0, metavar="P", help="in any currency")
    parser.add_argument("--price-per-cpu-hour", type=_price, default=0.0, metavar="P", help="in the same currency")
    parser.add_argument(
        "--workers-per-machine",
        type=positive,
        metavar="M",
        help="workers that share the CPUs of a machine like this one (default: its number of GPUs, or 1)",
    )
    parser.add_argument(
        "--gbps", type=_rate, default=10.0, metavar="G", help="network bandwidth of a worker, Gbit/s (default %(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=8, help="micro-batches to time (default %(default)s)")
    return parser


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must not be negative, is {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
