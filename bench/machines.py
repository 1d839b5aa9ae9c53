"""A Ray of several nodes on this machine, to be hurt: real GCS, raylets and worker processes, and commands that use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from headkd_ray.storage import Folder

ROOT = Path(__file__).resolve().parents[1]
STORE = 80 << 20
"""Bytes of each node's shared memory."""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the user's home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "OMP_NUM_THREADS": "1",
}
RAYS_OWN = ("_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor", "TrainStateActor")
"""Classes of actors that Ray starts once a cluster and keeps: they are nobody's leak."""


class Machines:
    """A cluster whose head has no CPU; nodes come and go. Set ``ENVIRONMENT`` before Ray is imported.

    A context manager. The driver's node is the head, so a node can be killed without the driver.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # With the dashboard, as a cluster that is there to stay has it: Ray asks it which placement groups to clean up.
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": True, "dashboard_port": 0}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, list[Any]] = {}
        """Kind -> the nodes of it that are alive, the head aside."""

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cluster.shutdown()

    def have(self, kind: str, count: int, cpus: float = 0, **resources: float) -> None:
        """Start nodes of a kind until there are ``count``."""
        nodes = self.nodes.setdefault(kind, [])
        while len(nodes) < count:
            nodes.append(self.cluster.add_node(num_cpus=cpus, resources=resources, object_store_memory=STORE))

    def kill(self, node: Any) -> None:
        """Kill -9 all processes of a node."""
        below = processes("", raylet_of(node))
        next(nodes for nodes in self.nodes.values() if node in nodes).remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for pid in below:  # they end with their raylet, but not at once
            kill(pid)

    def hosts(self, title: str, kind: str) -> list[Any]:
        """Nodes of a kind on which a process with such a title runs."""
        return [node for node in self.nodes[kind] if processes(title, raylet_of(node))]

    def left_over(self, seconds: float = 120) -> list[str]:
        """Actors and placement groups that are there still, ``seconds`` after the last driver has ended; [] is good."""
        deadline = time.monotonic() + seconds
        while (found := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _alive(self) -> list[str]:
        state = self.cluster.global_state
        actors = [
            entry["ActorClassName"]
            for entry in state.actor_table(None).values()
            if entry["State"] != "DEAD" and entry["ActorClassName"] not in RAYS_OWN
        ]
        groups = [
            f"placement group {key}" for key, entry in state.placement_group_table().items() if entry["state"] != "REMOVED"
        ]
        return actors + groups

    def train(self, job_file: Path, output: Path) -> subprocess.Popen[bytes]:
        """``python -m headkd_ray.train JOB`` on this cluster; what it prints is appended to ``output``."""
        environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": self.cluster.address, "PYTHONPATH": str(ROOT)}
        with output.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "headkd_ray.train", str(job_file)], env=environment, stdout=file, stderr=file
            )


def raylet_of(node: Any) -> int:
    """Process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def processes(title: str, root: int | None = None) -> list[int]:
    """Process ids below ``root`` (this process by default) whose command line starts with ``title``."""
    import psutil  # comes with Ray

    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def kill(pid: int) -> None:
    """Kill -9, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def steps_told(run: Folder) -> list[dict[str, Any]]:
    """The records of a run's steps in its log, so far."""
    lines = run.read("log.jsonl").splitlines(keepends=True) if run.has("log.jsonl") else []
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be half written
    return [record for record in records if "losses" in record]


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Wait until ``what()``. Raises RuntimeError if the driver ends first, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not what():
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run hung, or ended first (exit code {driver.poll()})")
        time.sleep(0.02)
