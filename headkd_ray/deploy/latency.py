"""How long a network takes for one image on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from headkd_ray.data.batch import Batch

WARM_UP, LEAST, MOST = 3, 5, 50
"""Passes that are not timed; least and largest number of those that are."""
SECONDS = 5.0
"""Time after which no further pass is started, if there were LEAST."""


class Latency(NamedTuple):
    """Times of a pass over one image, post-processing included, without reading and resizing it."""

    median: float
    """Median in ms."""
    p95: float
    """95th percentile in ms."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(network: Callable[[Batch], object], batches: Sequence[Batch]) -> Latency:
    """Time passes of ``network`` over ``batches`` of one image each, in turn."""
    times: list[float] = []
    for number in range(WARM_UP + MOST):
        started = time.perf_counter()
        network(batches[number % len(batches)])
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
        if len(times) >= LEAST and sum(times) > SECONDS:
            break
    median, p95 = np.quantile(times, (0.5, 0.95)) * 1e3
    return Latency(float(median), float(p95))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch's operators with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
