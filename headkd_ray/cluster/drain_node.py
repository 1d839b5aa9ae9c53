"""Drain the Ray node on this machine, and wait until its work has left.

    python -m headkd_ray.cluster.drain_node [--seconds 110] [--address HOST:6379] [--node-id ID]

Ray Train tells a run's workers of a drain; they write a checkpoint at once and go on elsewhere. Neither Ray nor KubeRay drains
a node because its pod is about to be deleted, as it is when a spot machine is taken back. So the worker pods of
``cluster/kuberay.yaml`` run this command as their preStop hook. A node without work ends by itself once it is drained, and with
it the pod; otherwise the pod ends with this command.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

from headkd_ray.errors import ClusterError

SECONDS = 110.0
"""Default of ``--seconds``: less than terminationGracePeriodSeconds in cluster/kuberay.yaml, of which the hook is a part."""
PATIENCE = 15.0
"""Seconds for which the command tries to have its drain accepted: a cluster that is being deleted has no head any more."""


class RayNode(NamedTuple):
    """A Ray node."""

    cluster: str
    """Address of its cluster, host:port."""
    id: str
    host: str
    port: int
    """Port of its raylet."""

    @property
    def alive(self) -> bool:
        """Whether its raylet accepts connections."""
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError:
            return False
        return True


def drain(
    why: str, end: float, patience: float, address: str | None, node_id: str | None, tell: Callable[[str], None]
) -> RayNode:
    """Tell Ray that a node will end; repeated until Ray accepts it.

    Args:
        why: what takes the node away, for Ray's logs and ``tell``.
        end: when, in seconds since 1970.
        patience: seconds for which it is repeated.
        address: the cluster's, host:port; None = that of this machine's node.
        node_id: the node's id; None = that of the Ray node on this machine.

    Raises:
        ClusterError: Ray has not accepted it.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    started = time.time()
    while True:
        left = max(0, int(end - time.time()))
        try:
            node = find_node(address, node_id)
            asked = ["--address", node.cluster, "--node-id", node.id, "--deadline-remaining-seconds", str(left)]
            done = subprocess.run([*command, *asked, "--reason-message", why], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                tell(f"{why} in {left} s: Ray node {node.id} is being drained")
                return node
            refusal = (done.stderr or done.stdout).strip().splitlines()[-1:]
        except (ConnectionError, RuntimeError, ClusterError) as error:
            refusal = str(error).strip().splitlines()[:1]
        if time.time() - started > patience:
            raise ClusterError(f"the Ray node cannot be drained: {' '.join(refusal)}")
        tell(f"Ray does not accept the drain ({' '.join(refusal)}); trying again")
        time.sleep(1)


def find_node(address: str | None, node_id: str | None) -> RayNode:
    """Return the node with this id, or the one on this machine. Raises RuntimeError or ClusterError if none is."""
    import ray  # late: a program that waits for days for a notice needs no memory for it

    from headkd_ray.cluster.alive import unanswered
    from headkd_ray.cluster.connect import running_here

    there = address or running_here()
    reason = "none runs here, or its head has gone" if there is None else unanswered(there)  # ray.init would take minutes
    if reason is not None:
        raise ClusterError(f"no Ray cluster answers {'on this machine' if there is None else f'at {there}'} ({reason})")
    assert there is not None
    ray.init(address=there, log_to_driver=False, logging_level="ERROR")
    try:
        wanted = node_id or ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == wanted and node["Alive"]:
                return RayNode(there, wanted, node["NodeManagerAddress"], node["NodeManagerPort"])
    finally:
        ray.shutdown()
    raise RuntimeError(f"the cluster has no node {wanted}")


def add_node_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which node is drained."""
    parser.add_argument("--address", help="the Ray cluster's address; by default that of this machine's node")
    parser.add_argument("--node-id", help="the Ray node to drain; by default the one on this machine")


def say(text: str) -> None:
    """Print a sentence with the time."""
    print(f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.cluster.drain_node", description=(__doc__ or "").splitlines()[0]
    )
    add_node_options(parser)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long the node may still work (%(default)g)")
    options = parser.parse_args(arguments)
    end = time.time() + options.seconds
    try:
        node = drain("this node is taken away", end, PATIENCE, options.address, options.node_id, say)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    while node.alive and time.time() < end:
        time.sleep(0.5)
    say("the node has ended" if not node.alive else "its work has not left in time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
