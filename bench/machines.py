"""Run a Ray cluster of several nodes on this machine, with real GCS, raylet and worker processes that tests can kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from headkd_ray.storage import Folder

ROOT = Path(__file__).resolve().parents[1]
STORE = 80 << 20
"""Shared memory of each node, in bytes."""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token into the user's home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_worker_niceness": "0",  # at Ray's 15, workers hardly run beside what else is running on this machine
    "OMP_NUM_THREADS": "1",
}
RAYS_OWN = ("_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor", "TrainStateActor")
"""Classes of actors that Ray starts once per cluster and keeps. They do not count as left over."""


class Machines:
    """A cluster whose head has no CPU and whose nodes come and go. Set ``ENVIRONMENT`` before Ray is imported.

    A context manager. The driver runs on the head, so that any other node can be killed without it.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # With the dashboard, like any lasting cluster: Ray asks it which placement groups to clean up.
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": True, "dashboard_port": 0}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, list[Any]] = {}
        """Kind -> its nodes that are alive, not counting the head."""

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cluster.shutdown()

    def have(self, kind: str, count: int, cpus: float = 0, gpus: float = 0, **resources: float) -> None:
        """Start nodes of a kind until there are ``count`` of them. GPUs are a number: they need not be there."""
        nodes = self.nodes.setdefault(kind, [])
        while len(nodes) < count:
            own = {"num_cpus": cpus, "num_gpus": gpus, "resources": resources, "object_store_memory": STORE}
            nodes.append(self._started(own))

    def _started(self, own: dict[str, Any], tries: int = 3) -> Any:
        """Start a node; again if its agent missed Ray's limit of 15 s, as it may on a busy machine, and its raylet ended."""
        before = set(self.cluster.worker_nodes)
        for _ in range(tries - 1):
            with suppress(Exception):  # of many kinds
                return self.cluster.add_node(**own)
            for node in set(self.cluster.worker_nodes) - before:
                node.kill_all_processes(check_alive=False, allow_graceful=False)
                self.cluster.worker_nodes.remove(node)
        return self.cluster.add_node(**own)

    def kill(self, node: Any) -> None:
        """Kill all processes of a node with SIGKILL."""
        below = processes("", raylet_of(node))
        self.replace(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for pid in below:  # they end with their raylet, but not at once
            kill(pid)

    def replace(self, node: Any) -> None:
        """Count a node that is being drained no longer, so that ``have`` starts another."""
        next(nodes for nodes in self.nodes.values() if node in nodes).remove(node)

    def hosts(self, title: str, kind: str) -> list[Any]:
        """Return the nodes of a kind on which a process with this title runs."""
        return [node for node in self.nodes[kind] if processes(title, raylet_of(node))]

    def left_over(self, seconds: float = 120) -> list[str]:
        """Return the actors and placement groups that still exist up to ``seconds`` after the last driver ended; [] is good."""
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
        """Start ``python -m headkd_ray.train JOB`` on this cluster, appending what it prints to ``output``."""
        return self.start(["headkd_ray.train", str(job_file)], output)

    def start(self, module: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Start ``python -m`` with a module and its arguments on this cluster, appending what it prints to ``output``."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # where another Ray may lie
        environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": self.cluster.address, "PYTHONPATH": path}
        with output.open("ab") as file:
            return subprocess.Popen([sys.executable, "-m", *module], env=environment, stdout=file, stderr=file)


def raylet_of(node: Any) -> int:
    """Return the process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def processes(title: str, root: int | None = None) -> list[int]:
    """Return the ids of processes below ``root`` (default: this process) whose command line starts with ``title``."""
    import ray  # noqa: F401  (it has a psutil of its own, which importing it puts on the path)
    import psutil  # isort: skip

    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
        except psutil.Error:  # it has ended in the meantime
            continue
    return found


def kill(pid: int) -> None:
    """Kill a process with SIGKILL if it still exists."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def logged_steps(run: Folder) -> list[dict[str, Any]]:
    """Return the records of training steps in a run's log so far."""
    lines = run.read("log.jsonl").splitlines(keepends=True) if run.has("log.jsonl") else []
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be incomplete
    return [record for record in records if "losses" in record]


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Wait until ``what()`` is true. Raises RuntimeError if the driver ends first or it takes too long."""
    deadline = time.monotonic() + seconds
    while not what():
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run hung, or ended first (exit code {driver.poll()})")
        time.sleep(0.02)
