"""Report running out of memory as a user error: a size in the job or on the command line is too large for this device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headkd_ray.errors import DeviceMemoryError

_ON_CPU = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory")
"""Torch's own messages, by which they are recognised: on the CPU it raises a plain RuntimeError."""


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory within the block into an error that says which sizes to reduce.

    Args:
        doing: what is being done; the message starts with it.
        remedy: what the user can do about it, naming keys or options and their present values.

    Raises:
        DeviceMemoryError: the memory of the GPU, or of this machine, is too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            place = _gpu()
        elif isinstance(error, MemoryError) or any(words in str(error) for words in _ON_CPU):
            place = "this machine"
        else:
            raise
        raise DeviceMemoryError(f"{doing}: out of memory on {place}; {remedy}") from error


def _gpu() -> str:
    """Describe the current GPU and how much of its memory others use: if that is much, the job's sizes are not to blame."""
    free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info())
    elsewhere = total - free - torch.cuda.memory_reserved() / 2**30
    return f"{torch.cuda.get_device_name()} ({total:.1f} GiB, {elsewhere:.1f} GiB of it used by CUDA and other processes)"
