"""Measure what a step does with the GPU: how long it is busy, where the host waits for it, how much it computes."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import headkd_ray

PROFILED = 3
"""Number of steps that are profiled."""
Work = Callable[[], object]


def busy_milliseconds(step: Work) -> float:
    """Return the time per step, in ms, during which at least one kernel or copy runs."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return covered(spans) / 1e3 / PROFILED


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def synchronisations(step: Work) -> dict[str, float]:
    """Count how often per step the host waits for the GPU, by the line of this project or of torchvision that makes it wait."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *rest: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[place_of(traceback.extract_stack())] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # torch warns where it waits
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(PROFILED):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {place: count / PROFILED for place, count in places.most_common()}


def place_of(stack: Iterable[traceback.FrameSummary]) -> str:
    """Return ``package/file.py:line`` of our innermost frame, or else torchvision's.

    Without either, as in the backward pass, return ``elsewhere``.
    """
    frames = list(stack)[::-1]
    for file in (headkd_ray.__file__, torchvision.__file__):
        folder = Path(str(file)).parent
        for frame in frames:
            if Path(frame.filename).is_relative_to(folder):
                return f"{Path(frame.filename).relative_to(folder.parent).as_posix()}:{frame.lineno}"
    return "elsewhere"


def tera_operations(step: Work) -> float:
    """Return a step's floating-point operations in convolutions and matrix products, in 10^12; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e12
