"""Measure what a student costs at inference."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.distill.start import with_architecture
from headkd_ray.engine.distributed import Distributed
from headkd_ray.job import Job, PyramidDetectorSpec, WholeDetectorSpec

WARM_UP, TIMES = 3, 20


@torch.inference_mode()
def inference_cost(job: Job) -> dict[str, float]:
    """Measure the job's student on one image of the largest evaluation size, data.eval_short_side x data.long_side.

    Returns:
        - ``params``: millions of parameters;
        - ``flops``: 10^9 floating-point operations of convolutions and matrix products, a multiply-add counting as two;
        - ``latency``: median time of a pass with post-processing, ms, on this process's device. The weights are untrained and
          detect hardly anything, so post-processing has little to do; other load on the machine is not excluded.
    """
    job, distributed = with_architecture(job), Distributed.here(job.cluster)
    classes = ShardSet.open(job.data.val).meta.classes
    spec: WholeDetectorSpec = job.student
    if isinstance(spec, PyramidDetectorSpec):
        spec = spec.replace({"backbone.weights": "none"})
    with torch.random.fork_rng(devices=[]):
        student = build_detector(spec, len(classes)).to(distributed.device).eval()
    size = [-(-side // job.data.pad) * job.data.pad for side in (job.data.eval_short_side, job.data.long_side)]
    image = torch.full((1, 3, *size), 114, dtype=torch.uint8, device=distributed.device)
    sizes = torch.tensor([size], device=distributed.device)
    with FlopCounterMode(display=False) as counter:
        student(image, sizes)
    times = []
    for _ in range(WARM_UP + TIMES):
        started = time.perf_counter()
        student(image, sizes)
        if distributed.device.type == "cuda":
            torch.cuda.synchronize(distributed.device)
        times.append(time.perf_counter() - started)
    return {
        "params": sum(parameter.numel() for parameter in student.parameters()) / 1e6,
        "flops": counter.get_total_flops() / 1e9,
        "latency": 1e3 * median(times[WARM_UP:]),
    }
