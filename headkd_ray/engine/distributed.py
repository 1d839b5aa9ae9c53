"""Who else trains: this process's rank and device, and the few collectives that the loop needs."""

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
    """One training process among ``size``; every method with more than one process is a collective of all ranks."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls, use_gpu: bool = True) -> Distributed:
        """A single process, on the first GPU if it may use one and there is one."""
        return cls(0, 1, torch.device("cuda", 0) if use_gpu and torch.cuda.is_available() else torch.device("cpu"))

    @classmethod
    def here(cls, spec: ClusterSpec) -> Distributed:
        """This process by itself, on the device that ``spec`` gives a worker, and with as many torch threads."""
        if spec.threads_per_worker is not None:
            torch.set_num_threads(spec.threads_per_worker)
        return cls.alone(use_gpu=spec.gpus_per_worker != 0)

    def ranks_of(self, count: int) -> range:
        """Which of ``count`` ranks of a job this process plays: all are played, each by one process."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T] | None:
        """All ranks' picklable values, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def vote(self, yes: bool) -> Callable[[], bool]:
        """Ask all ranks, without waiting; the function that this returns waits: did any say yes?

        Between the two a step's computation hides the time that the answers take. Over gloo: no GPU is waited for.
        """
        if self.size == 1:
            return lambda: yes
        votes = torch.tensor([yes], dtype=torch.int32)  # on the CPU
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)

        def counted() -> bool:
            work.wait()
            return bool(votes)

        return counted

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers of a module: BatchNorm gathers statistics on each rank's own images."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a float tensor on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values
