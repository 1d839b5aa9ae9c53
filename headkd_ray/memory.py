"""Running out of memory, told as what it is: a size in the job or on the command line that this device cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headkd_ray.errors import DeviceMemoryError

_ON_CPU = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory")
"""How torch words it: on the CPU it raises a plain RuntimeError."""


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory within the block into an error that says what to lower.

    Args:
        doing: what is being done, to start the message with.
        remedy: what the user can do about it, naming keys or options and their present values.

    Raises:
        DeviceMemoryError: the GPU's, or this machine's, memory is too small.
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
    """The current GPU, and how much of it is taken elsewhere: if that is much, no size of ours is at fault."""
    free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info())
    elsewhere = total - free - torch.cuda.memory_reserved() / 2**30
    return f"{torch.cuda.get_device_name()} ({total:.1f} GiB, {elsewhere:.1f} GiB of them taken by CUDA and other processes)"
