"""Measure the memory that a training step needs beyond what is there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def step_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak during a ``step`` above what was in use before, in MiB; None where the system does not tell.

    That is gradients and activations; weights and the optimizer's moments are there before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    if not RESET.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would hide what the step takes
    RESET.write_text("5")  # the peak starts from here (man 5 proc)
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Return a field of /proc/self/status (VmRSS, VmHWM) in MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10
