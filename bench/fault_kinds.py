"""The faults of bench/faults.py: what is killed or taken away, and which command each of them may strike."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from random import Random
from typing import Any

from fault_commands import Command, ElasticTraining
from machines import ENVIRONMENT, Machines, kill, processes
from metadata_server import MetadataServer

from headkd_ray.cluster.spot_watch import ENDPOINT

PATIENCE = 1200.0
"""Longest wait for anything, in seconds."""
REPLACED_AFTER = 5.0
"""Seconds until a killed node is replaced."""
NOTICE = timedelta(minutes=5)
"""From a spot notice to the node's end."""
NODES: dict[str, dict[str, float]] = {"trainer": {"cpus": 2}, "teacher": {"teacher": 1}}
"""Kind of node -> its resources."""

Record = dict[str, Any]


class EndedFirstError(Exception):
    """The command had ended before there was anything to strike."""


class Run:
    """A command that runs on the cluster; a thread follows how far it is."""

    def __init__(self, machines: Machines, command: Command) -> None:
        self.machines, self.command = machines, command
        self.position = 0
        self.seen = [time.monotonic()]
        """Times at which each step, from 0, was first seen to be done (``time.monotonic()``)."""
        self.hits: list[Record] = []
        """What struck, at which step, and how many steps were repeated since."""
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.driver = command.start(machines)
        self.watcher.start()

    def start_again(self) -> None:
        self.driver = self.command.start(self.machines, again=True)

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            for position in self.command.positions():
                self.position = position
                self.seen += [time.monotonic()] * (position + 1 - len(self.seen))
                for hit in self.hits[-1:]:
                    hit["repeated"] = max(hit["repeated"], len(self.seen) - 1 - position)

    def wait(self, what: Callable[[], bool]) -> None:
        """Wait until ``what()`` is true. Raises EndedFirstError, or RuntimeError if the command fails or hangs."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            code = self.driver.poll()
            if code == 0 and not what():
                raise EndedFirstError
            if code:
                raise RuntimeError(f"the command failed with exit code {code}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the command hung for {PATIENCE:.0f} s")
            time.sleep(0.02)

    def note_hit(self, fault: str) -> None:
        self.hits.append({"fault": fault, "step": self.position, "repeated": 0})

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.over.set()
        self.watcher.join()


Fault = Callable[[Run, Random], Callable[[], None]]
"""A function that waits until there is something to strike, and returns the function that strikes."""


def process(*titles: str) -> Fault:
    """Return the fault that kills a process with one of these titles."""

    def find(run: Run, random: Random) -> Callable[[], None]:
        found: list[int] = []

        def there() -> bool:
            found.extend(pid for title in titles for pid in processes(title))
            return bool(found)

        run.wait(there)
        return partial(kill, random.choice(sorted(found)))

    return find


def node(kind: str, title: str) -> Fault:
    """Return the fault that kills a node of a kind on which a process with this title runs. Another node replaces it."""

    def find(run: Run, random: Random) -> Callable[[], None]:
        victim = _host(run, random, kind, title)

        def hit() -> None:
            run.machines.kill(victim)
            time.sleep(REPLACED_AFTER)
            fill(run)

        return hit

    return find


def the_driver(run: Run, random: Random) -> Callable[[], None]:
    """Kill the command itself and then start it again."""

    def hit() -> None:
        run.driver.kill()
        run.driver.wait()
        run.start_again()

    return hit


def spot_notice(run: Run, random: Random) -> Callable[[], None]:
    """Announce the end of a node with a train worker as AWS does; the node ends once the run goes on with another."""
    leaving = _host(run, random, "trainer", WORKER)

    def hit() -> None:
        watch = [sys.executable, "-m", "headkd_ray.cluster.spot_watch", "--address", run.machines.cluster.address]
        with MetadataServer() as server:
            server.answers = [server.notice("terminate", f"{datetime.now(timezone.utc) + NOTICE:%Y-%m-%dT%H:%M:%SZ}")]
            environment = {**os.environ, **ENVIRONMENT, ENDPOINT: server.url}
            subprocess.run([*watch, "--node-id", leaving.node_id], env=environment, stdout=subprocess.DEVNULL, check=True)
        run.machines.have("trainer", len(run.machines.nodes["trainer"]) + 1, **NODES["trainer"])
        try:
            run.wait(lambda: b"(preemption " in run.command.output.read_bytes())
            last = run.position
            run.wait(lambda: run.position > last)
        finally:
            run.machines.kill(leaving)

    return hit


def a_worker_fewer(run: Run, random: Random) -> Callable[[], None]:
    """Kill a node with a train worker, and replace it only when the run goes on with the other."""
    victim = _host(run, random, "trainer", WORKER)

    def hit() -> None:
        run.machines.kill(victim)
        _goes_on_alone(run)

    return hit


def both_fewer(run: Run, random: Random) -> Callable[[], None]:
    """Kill the command and a node of its workers, and start the command again on the other node."""
    victim = _host(run, random, "trainer", WORKER)

    def hit() -> None:
        run.driver.kill()
        run.driver.wait()
        run.machines.kill(victim)
        run.start_again()
        _goes_on_alone(run)

    return hit


def _goes_on_alone(run: Run) -> None:
    command = run.command
    assert isinstance(command, ElasticTraining)
    run.wait(lambda: command.workers() == 1)
    fill(run)


def _host(run: Run, random: Random, kind: str, title: str) -> Any:
    run.wait(lambda: bool(run.machines.hosts(title, kind)))
    return random.choice(run.machines.hosts(title, kind))


def fill(run: Run) -> None:
    """Start the nodes that the command needs."""
    have(run.machines, run.command)


def have(machines: Machines, command: Command) -> None:
    """Start or end nodes until there are as many as the command needs."""
    for kind, count in command.nodes.items():
        for node in machines.nodes.get(kind, [])[count:]:
            machines.kill(node)
        machines.have(kind, count, **NODES[kind])


WORKER, TEACHER, BUILDER, TRIAL = "ray::RayTrainWorker", "ray::TeacherActor", "ray::CacheTeacher", "ray::ImplicitFunc"
DRIVER = ("the driver; then the same command again", the_driver)
TRAINING: dict[str, tuple[str, Fault]] = {
    "worker": ("a train worker", process(WORKER)),
    "data": ("a process that reads or decodes images", process("ray::Map(DecodeChunk)", "ray::FlatMap(ReadWindow)")),
    "teacher": ("a teacher process", process(TEACHER)),
    "trainer-node": ("the node of a train worker and its data tasks", node("trainer", WORKER)),
    "teacher-node": ("the node of a teacher process", node("teacher", TEACHER)),
    "drained-node": ("the node of a train worker, after a spot notice", spot_notice),
    "controller": ("Ray Train's controller", process("ray::TrainController")),
    "driver": DRIVER,
}
FAULTS: dict[str, dict[str, tuple[str, Fault]]] = {
    "training": TRAINING,
    "s3": {fault: TRAINING[fault] for fault in ("worker", "drained-node", "controller", "driver")},
    "elastic": {
        "node": ("the node of one of two workers; the other goes on alone", a_worker_fewer),
        "driver-and-node": (
            "the driver and a worker's node; then the same command with the other",
            both_fewer,
        ),
    },
    "cache": {
        "teacher": ("a teacher process", process(BUILDER)),
        "teacher-node": ("the node of a teacher process", node("teacher", BUILDER)),
        "driver": DRIVER,
    },
    "search": {
        "worker": ("a train worker of a trial", process(WORKER)),
        "trial": ("the process of a trial", process(TRIAL)),
        "driver": ("the driver; then the command with --resume", the_driver),
    },
}
"""Command -> fault -> what it is called in the table, and the function."""
