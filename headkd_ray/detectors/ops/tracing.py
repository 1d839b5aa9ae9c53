"""Sizes that stay variable when a detector is traced into a graph (``torch.jit.trace``, ONNX).

While it is traced, torch gives sizes as tensors that the graph computes; a Python integer made of them would be a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_most(limit: int, size: Any) -> Any:
    """Return the smaller of ``limit`` and ``size``, one of a tensor's."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(limit, size)


def as_sizes(counts: Tensor) -> list[Any]:
    """Return ``counts`` (N,) int64 as N sizes, with one host-device synchronisation."""
    return list(counts.unbind()) if torch.jit.is_tracing() else counts.tolist()
