"""Sizes that stay variable when a detector is traced into a graph (``torch.jit.trace`` for ONNX, ``torch.export``).

While it is traced, a size is part of the graph: a tensor in ``torch.jit.trace``, of which a Python integer would be a constant,
and a symbolic integer in ``torch.export``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def traced() -> bool:
    """Return whether a graph is being made, so that tensors may not outlive the call."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def at_most(limit: int, size: Any) -> Any:
    """Return the smaller of ``limit`` and ``size``, one of a tensor's."""
    if isinstance(size, Tensor):
        return size.clamp(max=limit)
    return torch.sym_min(limit, size) if isinstance(size, torch.SymInt) else min(limit, size)


def as_sizes(counts: Tensor) -> list[Any]:
    """Return ``counts`` (N,) int64 as N sizes, with one host-device synchronisation."""
    return list(counts.unbind()) if torch.jit.is_tracing() else counts.tolist()
