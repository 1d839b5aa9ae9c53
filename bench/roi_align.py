"""Compare RoIAlign on the CPU with torchvision's, level by level: ``python bench/roi_align.py [--side 320] [--threads 1]``.

1,024 RoIs of 10 to 245 pixels on two images, 256 channels, on P3 to P6 as a dense student's assistant reads them. Both ways
take turns, without gradients and with; medians of the CPU time of this process and of the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from headkd_ray.detectors.ops.roi_align import _pool_by_level, _pool_cells, roi_levels
from headkd_ray.job import RoIHeadSpec

STRIDES = (8, 16, 32, 64)
ROIS, CHANNELS = 1024, 256
WAYS = {"torchvision, level by level": _pool_by_level, "as an embedding bag": _pool_cells}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=320, help="side of the images, pixels")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    maps = [torch.randn(2, CHANNELS, -(-options.side // stride), -(-options.side // stride)) for stride in STRIDES]
    maps = [level.to(memory_format=torch.channels_last).requires_grad_() for level in maps]
    size = ((torch.rand(ROIS, 2) * 3.2).exp() * 10).clamp(max=options.side)
    corner = torch.rand(ROIS, 2) * (options.side - size)
    rois, image = torch.cat([corner, corner + size], dim=1), torch.randint(0, 2, (ROIS,))
    spec = RoIHeadSpec()
    level = roi_levels(rois, len(maps), spec.finest_scale)
    gradient = torch.randn(ROIS, CHANNELS * spec.pool**2)

    def pooled(way: str) -> Tensor:
        return WAYS[way](maps, STRIDES, rois, image, level, spec).flatten(1)

    def forward(way: str) -> None:
        with torch.no_grad():
            pooled(way)

    def both(way: str) -> None:
        torch.autograd.grad(pooled(way), maps, gradient)

    passes: dict[str, Callable[[str], None]] = {"forward": forward, "forward and backward": both}
    for name, work in passes.items():
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, own in times.items():
                clock, cpu = time.perf_counter(), time.process_time()
                work(way)
                own.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - clock)))
        for way, own in times.items():
            used, passed = (median(column) for column in zip(*own, strict=True))
            print(f"{name}, {way}: {used:.0f} ms of CPU time, {passed:.0f} ms by the clock", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
