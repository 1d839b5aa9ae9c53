"""This process's rank and device in a distributed run, and the few collectives that the training loop needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from headkd_ray.job import ClusterSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """One of ``size`` training processes. With more than one, every method but ``ranks_of`` is a collective of all ranks."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls, use_gpu: bool = True) -> Distributed:
        """Return a single process, on the first GPU if it may use one and one is available."""
        return cls(0, 1, torch.device("cuda", 0) if use_gpu and torch.cuda.is_available() else torch.device("cpu"))

    @classmethod
    def here(cls, spec: ClusterSpec) -> Distributed:
        """Return a single process with the device and the number of torch threads that ``spec`` gives a worker."""
        if spec.threads_per_worker is not None:
            torch.set_num_threads(spec.threads_per_worker)
        return cls.alone(use_gpu=spec.gpus_per_worker != 0)

    def ranks_of(self, count: int) -> range:
        """Return which of a job's ``count`` logical ranks this process runs; each is run by exactly one process."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T] | None:
        """Gather all ranks' picklable values, in rank order, on rank 0; other ranks get None."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def broadcast(self, value: T) -> T:
        """Return rank 0's picklable value on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def vote(self, yes: bool) -> Callable[[], bool]:
        """Start a vote without waiting for it, and return a function that waits and tells whether any rank voted yes.

        The computation of a step in between hides the communication. The vote runs over gloo, so it does not wait for a GPU.
        """
        if self.size == 1:
            return lambda: yes
        votes = torch.tensor([yes], dtype=torch.int32)  # on the CPU, for gloo
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)

        def counted() -> bool:
            work.wait()
            return bool(votes)

        return counted

    def share_buffers(self, module: nn.Module) -> None:
        """Copy rank 0's buffers of a module to every rank, since each rank's BatchNorm statistics are of its own images."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over ranks of a float tensor, which is on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values
