"""Starting a training again when a process of it was lost: one count, whatever was lost and whenever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train import PreemptionError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from headkd_ray.job import ClusterSpec

T = TypeVar("T")

LOST = (RayActorError, RayTaskError, GetTimeoutError, WorkerGroupStartupFailedError)
"""What Ray Train's controller meets when a worker is lost while the workers start."""


class PreemptedError(Exception):
    """A training ended early, with a checkpoint of its last step, because nodes of its workers are being drained."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """``nodes``: their ids."""
        super().__init__(nodes)
        self.nodes = nodes

    def __str__(self) -> str:
        return f"nodes with train workers are being taken away: {', '.join(node[:12] for node in self.nodes)}"


FAILURES = (TrainingFailedError, RayActorError, PreemptedError)
"""What ``with_restarts`` meets with another start, or raises in the end."""


def with_restarts(fit: Callable[[], T], spec: ClusterSpec, note: Callable[[str], None]) -> T:
    """The result of ``fit``, which runs Ray Train once and does not restart workers itself.

    Ray Train's own count, ``FailureConfig.max_failures``, is of workers lost in training alone. One that is lost while the
    workers start ends its run or is never counted, and the loss of the controller, which does the counting, ends it too. So
    each loss ends ``fit`` here, and the next one goes on from the last checkpoint.

    Args:
        spec: how many losses (``max_failures``) and preemptions (``max_preemption_failures``) are met with another start.
        note: takes a sentence about each.

    Raises:
        TrainingFailedError, RayActorError, PreemptedError: the last one, or what a restart would meet again.
    """
    losses = preemptions = 0
    waiting = False
    while True:
        reserved = _reservations()
        try:
            return fit()
        except FAILURES as error:
            _release(_reservations() - reserved)
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, WorkerGroupStartupTimeoutError):  # which is no loss: a node is still to come
                if not waiting:
                    note("the cluster has no room for the train workers yet; they start as soon as it has")
                waiting = True
                continue
            waiting = False
            if was_preempted(error):
                preemptions += 1
                most = spec.max_preemption_failures
                if most is not None and preemptions > most:
                    raise
                kept = "with a checkpoint of" if isinstance(error, PreemptedError) else "before there was a checkpoint of"
                times = f"preemption {preemptions}" + ("" if most is None else f" of {most}")
                note(f"the cluster takes a node of this run away, {kept} this step; starting again elsewhere ({times})")
                continue
            losses += 1
            if losses > spec.max_failures or (isinstance(error, ControllerError) and not isinstance(cause, LOST)):
                raise
            note(
                f"a training process was lost; starting again from the last checkpoint ({losses} of {spec.max_failures} times)"
            )


def was_preempted(error: BaseException) -> bool:
    """Return whether a training ended because a node was drained: announced to its workers in time, or not."""
    causes = [error, getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    return isinstance(error, PreemptedError | PreemptionError) or any(
        isinstance(cause, RayActorError) and cause.preempted for cause in causes
    )


def _reservations() -> set[str]:
    """Ids of this program's placement groups that hold resources; none within an actor, beside which others make theirs."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:  # a trial of a search: Ray's own cleaner, which needs a dashboard, sees to it there
        return set()
    table = placement_group_table()
    return {key for key, group in table.items() if group["state"] != "REMOVED" and key.endswith(context.get_job_id())}


def _release(keys: set[str]) -> None:
    """Give back what a lost controller, or one that failed while the workers started, leaves reserved: the next needs it."""
    for key in keys:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
