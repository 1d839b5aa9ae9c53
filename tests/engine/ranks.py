"""Run a function on several ranks on this machine: real processes that communicate over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from headkd_ray.engine.distributed import Distributed
from tests.support import HANGS


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the results of ``work(distributed, *arguments)``, a module-level function, on ``size`` ranks, in rank order."""
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (size, scratch, work, arguments), nprocs=size)
        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, scratch: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # With a timeout, so that a collective that only some ranks reach fails the test instead of hanging it.
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=HANGS)
    )
    try:
        torch.save(work(Distributed(rank, size, torch.device("cpu")), *arguments), Path(scratch) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
