"""Withdraw what a lost controller of this run asked Ray for, which Ray would keep reserved for it.

Ray Train's controller tells an actor of Ray's which resources its workers need. It withdraws that when it ends, but not when it
is killed, with its driver or alone. The actor keeps the resources for it for three minutes more (Ray 2.60,
``ray/train/v2/_internal/execution/scaling_policy/autoscaling_coordinator_client.py``). A run with a range of workers, started
again, would wait for that long, and the data tasks of any other would have fewer CPUs.
"""

from __future__ import annotations

from contextlib import suppress

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from headkd_ray.engine.files import writing
from headkd_ray.storage import Folder

REQUESTER = "ray_requester.txt"
"""File in the folder of a run that trains, with the name under which its controller asks for resources."""
COORDINATOR = "AutoscalingCoordinator"
"""The actor's name, and its namespace."""
PATIENCE = 10.0
"""Seconds that it may take to answer."""


def withdraw_former(run: Folder, trainer: TorchTrainer) -> None:
    """Withdraw what the last controller of the run asked for, unless it did so itself, and keep the name of the next one's.

    Args:
        run: the run's folder.
        trainer: which starts the next controller.

    Raises:
        DiskError: the name cannot be written.
    """
    if run.has(REQUESTER):
        # Ray has no public way; without this one, the request expires by itself.
        with suppress(RayError, ValueError, AttributeError):
            coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
            ray.get(coordinator.cancel_request.remote(run.read(REQUESTER).decode()), timeout=PATIENCE)
    with suppress(AttributeError), writing(run.named(REQUESTER), "run.storage"):
        run.write(REQUESTER, f"train-{trainer.train_run_context.run_id}".encode())
