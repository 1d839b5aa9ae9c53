"""Start the actors that Ray Data keeps for a whole cluster on the driver's node.

Ray Data starts each of them on the node of the process that first needs it, and never ends it (Ray 2.60). In a run that process
is a train worker, whose node would be in use for ever after: no autoscaler would remove it, and a drain would not end it.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import ray

KEPT = {
    "ray.data._internal.stats": "get_or_create_stats_actor",
    "ray.data._internal.cluster_autoscaler": "get_or_create_autoscaling_coordinator",
}
"""Modules and their functions that return such an actor, and start it if there is none. Ray has no public ones."""
OF_POOLS = {"ray.data._internal.execution.node_trackers": "get_or_create_actor_location_tracker"}
"""The same, for Datasets with a pool of actors."""
OF_USAGE = {"ray.data._internal.usage.actor": "get_or_create_usage_collection_actor"}
"""The same, where Ray collects usage statistics."""


def keep_data_actors_here(pool: bool) -> None:
    """Start Ray Data's actors on this process's node, unless the cluster has them.

    ``pool``: whether the run's Datasets have a pool of actors.
    """
    if ray.get_runtime_context().get_actor_id() is not None:
        return  # a trial, with which they would end; the search has started them
    for module, function in {**KEPT, **(OF_POOLS if pool else {}), **(OF_USAGE if _counts_usage() else {})}.items():
        with suppress(ImportError, AttributeError):  # another version of Ray; without this, a node only stays in use
            getattr(import_module(module), function)()


def _counts_usage() -> bool:
    try:
        from ray.data._internal.usage.collector import usage_collection_disabled
    except ImportError:
        return False
    return not usage_collection_disabled()
