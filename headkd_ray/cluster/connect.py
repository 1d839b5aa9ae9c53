"""Join a Ray cluster, or start one for this run."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment

from headkd_ray.cluster.alive import unanswered, watched
from headkd_ray.errors import ClusterError
from headkd_ray.job import ClusterSpec

OWN_CLUSTER = {
    # Ray ends processes that idle for a second if there are more than CPUs: decoding would start, and import torch, for ever.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # One process fewer: it asks whether the cloud takes this node away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment of a cluster that we start for one run."""
ASKED = "RAY_API_SERVER_ADDRESS"
"""Ray's variable for where a process asks about actors. Without it, one in a cluster asks the latest cluster of its machine,
which may be another. Ray Train's ``PlacementGroupCleaner`` does, and then nobody frees what a stopped trial had reserved."""
SINCE = {"preemption_grace_s": (2, 60)}
"""Keys of ``cluster`` that an older Ray knows nothing of, and its first version that does."""


@contextmanager
def connected(spec: ClusterSpec, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster of ``spec.address`` or ``RAY_ADDRESS``, or start one on this machine and stop it on leaving.

    If it is lost meanwhile, the process ends with a sentence (``alive.watched``).

    Which cluster was joined is said on standard error: on a machine that others use, too, it may be theirs.

    ``dashboard``: a started cluster has one even if ``spec.dashboard`` does not ask for it. Where Tune stops trials with train
    workers it is needed: through it Ray finds the reservations that they leave behind.

    Raises:
        ClusterError: no cluster answers at the address, or none can be started here; or this Ray is too old for a key.
    """
    _check_version(spec)
    if ray.is_initialized():
        yield
        return
    before = dict(os.environ)
    address = _address(spec.address)
    # Unless asked for, workers' output stays in Ray's logs: the run's own records reach the driver through their queue.
    output: dict[str, Any] = {"log_to_driver": spec.log_to_driver, "logging_level": logging.WARNING}
    try:
        context = _start(dashboard or spec.dashboard, output) if address is None else _join(address, output)
        if spec.dashboard and context.dashboard_url:
            print(f"Ray's dashboard: http://{context.dashboard_url}", file=sys.stderr)
        with watched():
            yield
    finally:
        ray.shutdown()
        for name in (*OWN_CLUSTER, ASKED):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _check_version(spec: ClusterSpec) -> None:
    """Raise ClusterError for a key that has been set although this Ray is older than it."""
    installed = tuple(int(number) for number in ray.__version__.split(".")[:2])
    for key, (major, minor) in SINCE.items():
        if installed < (major, minor) and getattr(spec, key) != type(spec).model_fields[key].default:
            raise ClusterError(f"cluster.{key} needs Ray {major}.{minor}, and this is Ray {ray.__version__}: leave the key out")


def _address(asked: str | None) -> str | None:
    """Of the cluster to join; None = start one."""
    name, address = ("cluster.address", asked) if asked else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))
    if address == "local":
        return None
    if not address or address == "auto":  # the one that runs on this machine, if any
        here = running_here()
        if here is None and address == "auto":
            raise ClusterError(f"{name}=auto: no Ray cluster answers on this machine; start one (ray start --head)")
        return here
    reason = None if "://" in address else unanswered(address)
    if reason is not None:
        raise ClusterError(
            f"{name}={address}: no Ray cluster answers there ({reason}); it must be the address that ray start --head prints, "
            "host:6379 as a rule (8265 is the dashboard's port); leave it out to use a cluster of this machine or to start one"
        )
    return address


def running_here() -> str | None:
    """Return the address of the cluster that this machine is a node of; None if there is none, or its head does not answer."""
    with_environment = os.environ.pop("RAY_ADDRESS", None)  # "auto" or empty
    try:
        address = get_ray_address_from_environment("auto", None)
    except ConnectionError:
        return None
    finally:
        if with_environment is not None:
            os.environ["RAY_ADDRESS"] = with_environment
    return address if address is not None and unanswered(address) is None else None  # else it is a dead one's


def _join(address: str, output: dict[str, Any]) -> Any:
    # Not for a client of Ray's (ray://): that process is outside of the cluster, and so is its address.
    environment = {} if "://" in address else {"runtime_env": {"env_vars": {ASKED: address}}}
    try:
        context = ray.init(address=address, **environment, **output)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"the Ray cluster at {address} cannot be joined: {error}") from None
    has = ray.cluster_resources()
    print(
        f"joined the Ray cluster at {address}: {len(ray.nodes())} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} "
        "GPUs (RAY_ADDRESS=local starts one for this command alone)",
        file=sys.stderr,
    )
    return context


def _start(dashboard: bool, output: dict[str, Any]) -> Any:
    for name, value in OWN_CLUSTER.items():
        os.environ.setdefault(name, value)
    port = None
    if dashboard:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ[ASKED] = f"http://127.0.0.1:{port}"  # the new cluster's processes inherit it
    # It advises to switch the new cluster's authentication off.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        # It ends with this process, and has no dashboard unless asked: its start costs more than a small job's training.
        return ray.init(address="local", include_dashboard=dashboard, dashboard_port=port, **output)
    except Exception as error:  # of many kinds, the bare Exception among them: a node that does not come up in time
        if not isinstance(error, OSError) or isinstance(error, ConnectionError):
            raise ClusterError(f"Ray cannot start a cluster on this machine: {error}") from error
        # Sockets in a folder with a long name, a file in a folder's place, a full disk.
        place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        raise ClusterError(
            f"RAY_TMPDIR={place}: Ray cannot keep its session there ({error}); set RAY_TMPDIR to a folder with a short path "
            "and room, such as /tmp"
        ) from None
