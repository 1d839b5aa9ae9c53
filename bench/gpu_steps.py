"""The part "steps" of ``bench/gpu.sh``: what one training step costs, method by method, compared with torchvision's detectors.

``bench/step.py`` measures the same steps in turns, for ratios; here each is also watched: where it waits, how busy the GPU is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from gpu_measure import busy_milliseconds, synchronisations, tera_operations
from gpu_results import Results, Row, Setting, setting
from step_cases import CASES, PARTS, Case, Clock, Size, Step

WARM_UP, MOST_STEPS, MOST_SECONDS = 3, 20, 4.0
ROWS = [
    *((case, precision) for precision in ("bf16", "fp32") for case in CASES if not case.compiled),
    *((case, "bf16") for case in CASES if case.compiled),  # last, since compiling may take all the time that is left
]


def measure(case: Case, precision: str, place: Setting) -> Row:
    """Measure one row."""
    row: Row = {"case": case.name, "torchvision": case.torchvision, "precision": precision}
    images, side = (2, 64) if place.tiny else (16, 640)
    step = Step(case, Size(place.device, images, side, precision, place.tiny))
    for _ in range(1 if place.tiny else WARM_UP):
        step()
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    times = list(_timed(step, 2 if place.tiny else MOST_STEPS))
    parts = {part: median(each[number] for each in times) for number, part in enumerate(PARTS)}
    milliseconds = median(sum(each) for each in times)
    row |= {"images": step.images, "ms": milliseconds, "images_per_second": 1e3 * step.images / milliseconds, "parts_ms": parts}
    row["steps"] = len(times)
    looks: dict[str, Callable[[], object]] = {"tera_operations": lambda: tera_operations(step)}
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated(place.device) / 2**30
        looks |= {"syncs": lambda: synchronisations(step), "busy": lambda: busy_milliseconds(step) / milliseconds}
    for name, look in looks.items():
        try:
            row[name] = look()
        except Exception as error:  # the times are worth having without it
            row[name], row[f"{name}_error"] = None, repr(error)
    return row


def _timed(step: Step, most: int) -> Iterator[tuple[float, ...]]:
    """Yield the milliseconds of each part for up to ``most`` steps, or fewer if they take long."""
    started = time.perf_counter()
    for number in range(most):
        if number >= 2 and time.perf_counter() - started > MOST_SECONDS:
            return
        yield step.timed()


def main() -> int:
    """Measure as many rows as time allows; return 1 if one failed."""
    place = setting()
    results = Results("steps", place)
    results.content["ceilings"] = ceilings(place)
    failed = False
    for case, precision in ROWS:
        if place.left() < 10:
            print("no time left for the remaining rows", flush=True)
            return 1
        try:
            results.add(measure(case, precision, place))
        except Exception as error:  # the remaining rows are still worth having
            failed = True
            results.add({"case": case.name, "torchvision": case.torchvision, "precision": precision, "error": repr(error)})
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


def ceilings(place: Setting) -> Row:
    """Measure the device's peaks: bf16 matrix products, in TFLOP/s; copies within its memory, in TB/s read and written."""
    side, size = (256, 1 << 20) if place.tiny else (8192, 1 << 32)
    one, other = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            clock = Clock(place.device)
            work()
            clock.lap()
            times.append(clock.laps()[0] / 1e3)
        return median(times[3:])

    product, copy = seconds(lambda: one @ other), seconds(lambda: target.copy_(source))
    return {"bf16_tflops": 2 * side**3 / product / 1e12, "copy_tb_per_second": 2 * size / copy / 1e12}


if __name__ == "__main__":
    sys.exit(main())
