"""Starting a training again when a process of it was lost: one count, whatever was lost and whenever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

T = TypeVar("T")

LOST = (RayActorError, RayTaskError, GetTimeoutError, WorkerGroupStartupFailedError)
"""What Ray Train's controller meets when a worker is lost while the workers start."""


def with_restarts(fit: Callable[[], T], max_failures: int, note: Callable[[str], None]) -> T:
    """The result of ``fit``, which runs Ray Train once and does not restart workers itself.

    Ray Train's own count, ``FailureConfig.max_failures``, is of workers lost in training alone. One that is lost while the
    workers start ends its run or is never counted, and the loss of the controller, which does the counting, ends it too. So
    each loss ends ``fit`` here, and the next one goes on from the last checkpoint.

    Args:
        max_failures: how many losses are met with another start.
        note: takes a sentence about each.

    Raises:
        TrainingFailedError, RayActorError: the last loss, or what a restart would meet again.
    """
    losses = 0
    while True:
        reserved = _reservations()
        try:
            return fit()
        except (TrainingFailedError, RayActorError) as error:
            _release(_reservations() - reserved)
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if not isinstance(cause, WorkerGroupStartupTimeoutError):  # which is no loss: a node is still to come
                losses += 1
                if losses > max_failures or (isinstance(error, ControllerError) and not isinstance(cause, LOST)):
                    raise
                note(f"a training process was lost; starting again from the last checkpoint ({losses} of {max_failures} times)")


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
