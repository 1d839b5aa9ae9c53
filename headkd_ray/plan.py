"""What a run will take, before money is spent: ``python -m headkd_ray.plan JOB [key.path=value ...]``.

Times a few real steps of the job on this machine, so run it on a machine like those that you want to rent, and works out steps,
hours, money and bytes for several numbers of workers. The model, as formulas, is in headkd_ray/engine/planning.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from headkd_ray.doors import positive, user_errors
from headkd_ray.job import Job, load_job
from headkd_ray.report.plan import cost_table, plan_table
from headkd_ray.report.terminal import Terminal

if TYPE_CHECKING:
    from headkd_ray.engine.calibration import Calibration
    from headkd_ray.engine.planning import Plan, Work

MODEL = (
    "Model: each of k workers is as fast as the one measured here. A step takes the slowest of data, teacher (in a pool) and "
    "student (with its teacher, if in place), which work at the same time, then the optimizer's update, then sending "
    "2 (k - 1) / k of the gradients; or longer, where the machine's CPUs do not suffice for all that runs on it. Not in it: "
    "starting machines and Ray, reading a cache, checkpoints, metrics, failures."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
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
    """Measure, and print the tables; ``hourly`` = price of a GPU, of a CPU."""
    # Imported here, because torch and timm take ten seconds: what is wrong with the job file is told before.
    import torch

    from headkd_ray.data.shards import ShardSet
    from headkd_ray.engine.calibration import calibrate
    from headkd_ray.engine.planning import Machine, Prices, plan, work_of

    train, val = ShardSet.open(job.data.train), ShardSet.open(job.data.val)
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
    """What the tables do not say."""
    from headkd_ray.engine.planning import cache_bytes

    parameters = measured.costs.parameters / 1e6
    notes = [
        f"{work.images} images, {work.epochs} epochs; {parameters:.2f} M trained parameters. MB/step: what a worker sends to "
        f"others and gets of its teachers, at {gbps:g} Gbit/s."
    ]
    if job.teacher is not None and job.distill.rois == "teacher" and measured.codec is not None:
        size = cache_bytes(work.images, work.views, job.distill.roi_budget, measured.codec)
        built = f", built in {plans[0].build_hours:.2g} of the hours" if work.placement == "cache" else ""
        dtype = measured.codec.dtype
        notes.append(
            f"A cache of {work.views} views of each image: at most {size / 1e9:.3g} GB ({dtype}, uncompressed){built}."
        )
    if work.gpus and measured.device.type == "cpu":
        notes.append("warning: the job asks for GPUs and there is none here: these are a CPU's times.")
    return [*notes, MODEL]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", help="job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument(
        "--workers", type=positive, nargs="+", metavar="K", help="numbers of workers (default: 1, 2, 4, 8 and the job's)"
    )
    parser.add_argument("--price-per-gpu-hour", type=_price, default=0.0, metavar="P", help="in any currency")
    parser.add_argument("--price-per-cpu-hour", type=_price, default=0.0, metavar="P", help="in the same")
    parser.add_argument(
        "--workers-per-machine",
        type=positive,
        metavar="M",
        help="that share the CPUs of a machine like this one (default: its number of GPUs, or 1)",
    )
    parser.add_argument(
        "--gbps", type=_rate, default=10.0, metavar="G", help="network of a worker, Gbit/s (default %(default)s)"
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
