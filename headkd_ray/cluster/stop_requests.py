"""What makes the train workers stop: the driver was asked to, or Ray announces that a node of theirs is taken away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import train as ray_train

from headkd_ray.engine.distributed import Distributed

try:
    from ray.train.v2._internal.execution.context import get_train_context
except ImportError:  # Ray has no public way to ask on one rank alone; without this one, a drain is met after an evaluation
    get_train_context = None

POLL_SECONDS = 1.0
"""Seconds between a run's questions to Ray whether a node of it is being drained; a drain is announced minutes ahead."""


class StopRequests:
    """Whether training should end: with this step, which all ranks are asked together, or within an evaluation.

    ``ray.train.get_preemption_info`` is a collective of all ranks and takes a call to an actor. So it is not called in every
    step, but in those before which a second has passed on any rank: the ranks agree on them with a vote, which costs no time
    because its result is read a step later.
    """

    def __init__(self, sign: Any, distributed: Distributed) -> None:
        """``sign``: the driver's ``driver.stop_sign``."""
        self.distributed = distributed
        self.up = sign.wait.remote()
        self.looked = time.monotonic()
        self._due: Callable[[], bool] = lambda: False

    def __call__(self) -> bool:
        """Return whether this rank was asked to stop, or a node is being drained; called once per step by every rank."""
        leaving = False
        if self._due():
            leaving = bool(self.leaving())
            self.looked = time.monotonic()
        self._due = self.distributed.vote(time.monotonic() - self.looked > POLL_SECONDS)
        return leaving or self.asked

    @property
    def asked(self) -> bool:
        """Whether the driver wants this rank to stop."""
        return bool(ray.wait([self.up], timeout=0)[0])

    def leaving(self) -> list[str]:
        """Return the ids of the nodes with train workers that are being drained; a collective, the same on every rank."""
        info = ray_train.get_preemption_info()
        return [] if info is None else info.preempted_node_ids

    def within_evaluation(self) -> bool:
        """Return whether this rank was asked to stop, or was told of a drain; other ranks may hear of it a little later.

        Not a collective, unlike Ray's public function: during an evaluation each rank works at its own pace.
        """
        return self.asked or _told_of_drain()


def _told_of_drain() -> bool:
    """Return whether Ray Train has told this worker that a node of its group is being drained."""
    told = getattr(get_train_context(), "preemption_context", None) if get_train_context is not None else None
    return getattr(told, "preemption_info", None) is not None
