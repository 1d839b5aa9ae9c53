"""What makes the train workers stop: the driver was asked to, or Ray announces that a node of theirs is taken away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import train as ray_train

from headkd_ray.engine.distributed import Distributed

POLL_SECONDS = 1.0
"""Seconds between a run's questions to Ray whether a node of it is being drained; a drain is announced minutes ahead."""


class StopRequests:
    """Whether training should end with this step; called once per step by every rank.

    ``ray.train.get_preemption_info`` is a collective of all ranks and takes a call to an actor. So it is not called in every
    step, but in those before which a second has passed on any rank: the ranks agree on them with a vote, which costs no time
    because its result is read a step later.
    """

    def __init__(self, sign: Any, distributed: Distributed) -> None:
        """``sign``: the driver's ``driver.stop_sign``."""
        self.distributed = distributed
        self.up = sign.wait.remote()
        self.leaving: list[str] = []
        """Ids of the nodes with train workers that are being drained; the same on every rank."""
        self.looked = time.monotonic()
        self._due: Callable[[], bool] = lambda: False

    @property
    def asked(self) -> bool:
        """Whether the driver wants this rank to stop."""
        return bool(ray.wait([self.up], timeout=0)[0])

    def __call__(self) -> bool:
        if self._due():
            info = ray_train.get_preemption_info()
            self.leaving = [] if info is None else info.preempted_node_ids
            self.looked = time.monotonic()
        self._due = self.distributed.vote(time.monotonic() - self.looked > POLL_SECONDS)
        return bool(self.leaving) or self.asked
