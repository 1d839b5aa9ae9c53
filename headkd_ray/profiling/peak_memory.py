"""The peak of memory of some code, on the device that it runs on."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from headkd_ray.engine.log import host_peak_mib

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class PeakMemory:
    """A context manager that measures a peak of memory in its block, which ``bytes`` holds afterwards.

    On a GPU it is what torch's allocator has taken from it. On the CPU it is the resident memory of the whole process; where
    the system cannot forget earlier peaks, as macOS, it is the peak of the process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._forgetful = _forget()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
        else:
            self.bytes = _high_water() if self._forgetful else int(host_peak_mib() * 2**20)


def total_memory(device: torch.device) -> int:
    """Return the memory in bytes of a GPU, or that this process may use on the CPU: the machine's, or its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit.read_text().strip() for limit in _LIMITS if limit.is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _forget() -> bool:
    """Set Linux's mark of the process's highest resident memory to the present one; returns whether that is possible."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
