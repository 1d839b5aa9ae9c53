"""Check that a job fits the cluster before anything is started, since Ray itself would wait forever."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from headkd_ray.errors import ClusterError
from headkd_ray.job import ClusterSpec, Job, PoolSpec, ProcessSpec

GROWS = "HEADKD_RAY_NODES"
"""Environment variable with which a cluster file lists the nodes that its autoscaler may add to the head, as JSON, for example
[{"count": 2, "CPU": 48, "GPU": 4, "labels": {"pool": "trainer"}}]. Ray does not report them, and no job would fit while only
the head is running. Labels and kinds of GPU that are not listed are taken to be those that a job selects. If it is unset, only
the nodes that are running count."""


@dataclass(frozen=True)
class Resources:
    """The resources of a job's workers, as checked against the cluster."""

    workers: int | tuple[int, int]
    """Number of workers, or the minimum and the maximum."""
    cpus_per_worker: float
    gpus_per_worker: float


def check_resources(job: Job) -> Resources:
    """Check that workers, data tasks and teacher processes fit the cluster, and return the workers' resources.

    The minimum of a range of workers must fit, and as many workers as Ray would start must leave room for their data tasks.
    Raises ClusterError, which says what was requested and what exists.
    """
    spec, workers = job.cluster, job.cluster.fewest_workers
    found, has = _nodes()
    if problem := _selects_nothing("cluster", spec, found):
        raise ClusterError(problem)
    nodes = [node.resources for node in found if node.suits(spec)]
    cpus = sum(node.resources.get("CPU", 0.0) for node in found)  # data tasks run anywhere
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    wants_gpu = spec.gpus_per_worker
    gpus_per_worker = wants_gpu if wants_gpu is not None else float(gpus >= workers > 0)

    problems = []
    if gpus_per_worker and gpus < workers * gpus_per_worker:
        problems.append(
            f"cluster.workers {workers} x cluster.gpus_per_worker {gpus_per_worker:g} = "
            f"{workers * gpus_per_worker:g} GPUs requested, the cluster {has} {gpus:g}; lower one of them, or set "
            "cluster.gpus_per_worker to 0 to train on CPUs"
        )
    each = spec.cpus_per_worker + spec.data_cpus
    if cpus < workers * each:
        problems.append(
            f"cluster.workers {workers} x (cluster.cpus_per_worker {spec.cpus_per_worker:g} + cluster.data_cpus "
            f"{spec.data_cpus:g}) = {workers * each:g} CPUs requested, the cluster {has} {cpus:g}; lower cluster.workers, or "
            "give each less (fractions are allowed)"
        )
    places = sum(_places(node, spec.cpus_per_worker, gpus_per_worker) for node in nodes)
    if not problems and places < workers:
        problems.append(
            f"cluster.workers {workers}: only {places} fit on nodes with {spec.cpus_per_worker:g} CPUs and "
            f"{gpus_per_worker:g} GPUs (nodes: {[{k: node.get(k, 0.0) for k in ('CPU', 'GPU')} for node in nodes]}); "
            "request less per worker"
        )
    grown = max(workers, min(spec.most_workers, places))
    if not problems and cpus < grown * each:
        problems.append(
            f"cluster.workers {[workers, spec.most_workers]}: the {grown} that fit would leave {cpus:g} - {grown} x "
            f"cluster.cpus_per_worker {spec.cpus_per_worker:g} CPUs to data tasks, which need {grown} x cluster.data_cpus "
            f"{spec.data_cpus:g}; lower the maximum, or raise cpus_per_worker so that fewer workers fit on a node"
        )
    problems += _pool_problems(job, found, grown, gpus_per_worker)
    if job.eval.placement == "task":
        beside = _taken(job, grown, gpus_per_worker, with_pool=True)
        problems += _process_problems("eval.task", job.eval.task, found, 1, beside)
    if problems:
        raise ClusterError(problems)
    return Resources(spec.workers, spec.cpus_per_worker, gpus_per_worker)


def room_for(job: Job) -> int:
    """Return how many trainings of this job fit the cluster at once; each takes one process (cluster.workers 0) or its workers.

    Raises ClusterError as ``check_resources`` does.
    """
    spec = job.cluster
    nodes, _ = _nodes()
    if spec.workers == 0:
        return sum(_places(node.resources, spec.cpus_per_worker, gpus_of_process(job)) for node in nodes)
    gpus = check_resources(job).gpus_per_worker
    places = sum(_places(node.resources, spec.cpus_per_worker + spec.data_cpus, gpus) for node in nodes if node.suits(spec))
    most = max(1, places // spec.most_workers)
    while most > 1 and _pool_problems(job, nodes, most * spec.most_workers, gpus):  # else their teachers would wait for ever
        most -= 1
    return most


def has_pool(job: Job) -> bool:
    """Return whether each train worker has teacher processes of its own."""
    return job.teacher is not None and job.teacher.placement == "pool"


def gpus_of_process(job: Job) -> float:
    """Return the GPUs of a training in one process: cluster.gpus_per_worker, or by default one if the cluster has any."""
    nodes, _ = _nodes()
    wants = job.cluster.gpus_per_worker
    return wants if wants is not None else float(any(node.resources.get("GPU", 0.0) for node in nodes))


def check_pool(job: Job) -> None:
    """Raise ClusterError if the teacher processes that build a cache do not all fit the cluster."""
    assert job.teacher is not None
    nodes, _ = _nodes()
    problems = _process_problems("teacher.pool", job.teacher.pool, nodes, job.teacher.pool.actors[1], beside={})
    if problems:
        raise ClusterError(problems)


def check_predictors(spec: ClusterSpec) -> float:
    """Check that the processes of a prediction fit the cluster, and return the GPUs of each.

    Raises ClusterError, which names the options of the command.
    """
    count, cpus = spec.fewest_workers, spec.cpus_per_worker
    nodes, has = _nodes()
    there = sum(node.resources.get("GPU", 0.0) for node in nodes)
    gpus = float(there >= count) if spec.gpus_per_worker is None else spec.gpus_per_worker
    places = sum(_places(node.resources, cpus, gpus) for node in nodes)
    if places < count:
        asked = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ClusterError(
            f"--workers {count}: each requests {asked}, and the cluster {has} room for {places}; lower --workers, "
            "--cpus-per-worker or --gpus-per-worker"
        )
    return gpus


def resources_of_worker(spec: ClusterSpec, found: Resources) -> dict[str, Any]:
    """Return the resources of a train worker, as options of a Ray task or actor."""
    return {"num_cpus": found.cpus_per_worker, "num_gpus": found.gpus_per_worker, **_nodes_of(spec)}


def resources_of(spec: ProcessSpec) -> dict[str, Any]:
    """Return the resources of a process, as options of a Ray task or actor."""
    return {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "resources": spec.resources, **_nodes_of(spec)}


def options_of(spec: ProcessSpec) -> dict[str, Any]:
    """Return the options of a Ray task or actor that is a process.

    It gets resources of its own. In a search Ray would otherwise place it within the reservation of the train worker that
    starts it, which the worker itself fills.
    """
    return {**resources_of(spec), "scheduling_strategy": "DEFAULT"}


def _nodes_of(spec: ClusterSpec | ProcessSpec) -> dict[str, Any]:
    """Return the options of a Ray task or actor that select the nodes of ``spec``."""
    chosen = {"label_selector": spec.labels, "accelerator_type": spec.accelerator_type}
    return {option: value for option, value in chosen.items() if value}


@dataclass(frozen=True)
class _Node:
    resources: dict[str, float]
    labels: dict[str, str] | None
    """None: an autoscaler's node whose labels are not known."""

    @property
    def accelerators(self) -> list[str]:
        """Kinds of GPU."""
        return [kind for name in self.resources for key, _, kind in [name.partition(":")] if key == "accelerator_type"]

    def suits(self, spec: ClusterSpec | ProcessSpec) -> bool:
        """Return whether the node has the labels and the kind of GPU that ``spec`` selects, as far as is known."""
        kind = spec.accelerator_type is None or spec.accelerator_type in self.accelerators
        if self.labels is None:
            return kind or not self.accelerators
        return kind and all(_matches(self.labels.get(key), wanted) for key, wanted in spec.labels.items())


def _matches(value: str | None, wanted: str) -> bool:
    """Return whether a node's label has a value of a selector: value, in(a, b), or either with ! in front."""
    negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", wanted)
    options = [option.strip() for option in several[1].split(",")] if several else [wanted]
    return (value in options) is not negated


def _selects_nothing(section: str, spec: ClusterSpec | ProcessSpec, nodes: list[_Node]) -> str | None:
    """Return that no node has what ``spec`` selects, and what they have; None if one does."""
    if not nodes or any(node.suits(spec) for node in nodes):
        return None
    asked: Mapping[str, object] = {"labels": spec.labels, "accelerator_type": spec.accelerator_type}
    keys = " and ".join(f"{section}.{key} {value}" for key, value in asked.items() if value)
    has: list[dict[str, str]] = []
    for node in nodes:
        labels = {key: value for key, value in (node.labels or {}).items() if key != "ray.io/node-id"}
        kind = {"accelerator_type": ", ".join(node.accelerators)} if node.accelerators else {}
        has += [] if {**labels, **kind} in has else [{**labels, **kind}]
    return f"{keys}: no node of the cluster has this; the nodes have {has}; select others, or start such a node"


def _nodes() -> tuple[list[_Node], str]:
    """Return the nodes, including those that an autoscaler may start, and the verb for messages about them."""
    alive = [_Node(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    if not os.environ.get(GROWS):
        return alive, "has"
    try:
        groups = [dict(group) for group in json.loads(os.environ[GROWS])]
        started = [_Node(group, group.pop("labels", None)) for group in groups for _ in range(group.pop("count"))]
    except (ValueError, TypeError, KeyError):
        raise ClusterError(f'{GROWS}={os.environ[GROWS]!r} is not a JSON list like [{{"count": 2, "CPU": 48}}]') from None
    return [node for node in alive if "node:__internal_head__" in node.resources] + started, "may grow to"


def _pool_problems(job: Job, found: list[_Node], workers: int, gpus_per_worker: float) -> list[str]:
    """Return why the teacher processes of so many train workers cannot start beside them; empty if they can."""
    if job.teacher is None or not has_pool(job):
        return []
    pool = job.teacher.pool
    return _process_problems("teacher.pool", pool, found, workers * pool.actors[0], _taken(job, workers, gpus_per_worker))


def _taken(job: Job, workers: int, gpus_per_worker: float, with_pool: bool = False) -> dict[str, float]:
    """Return what so many train workers and their data tasks take and, ``with_pool``, the fewest teacher processes for them."""
    cpus, gpus = job.cluster.cpus_per_worker + job.cluster.data_cpus, gpus_per_worker
    if with_pool and job.teacher is not None and has_pool(job):
        pool = job.teacher.pool
        cpus, gpus = cpus + pool.actors[0] * pool.cpus, gpus + pool.actors[0] * pool.gpus
    return {"CPU": workers * cpus, "GPU": workers * gpus}


def _process_problems(
    section: str, spec: ProcessSpec, found: list[_Node], count: int, beside: Mapping[str, float]
) -> list[str]:
    """Return why ``count`` processes cannot start while others take ``beside``; empty if they can.

    ``section``: that of the processes' keys.
    """
    if problem := _selects_nothing(section, spec, found):
        return [problem]
    nodes = [node.resources for node in found]
    each = {name: amount for name, amount in {"CPU": spec.cpus, "GPU": spec.gpus, **spec.resources}.items() if amount}
    asked = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
    suitable = [node.resources for node in found if node.suits(spec)]
    able = [node for node in suitable if all(node.get(name, 0.0) >= amount for name, amount in each.items())]
    if not able:
        has = [{name: node.get(name, 0.0) for name in each} for node in suitable]
        return [f"{section}: no node has what a process requests ({asked}); nodes: {has}; request less, or start such a node"]
    key = f"{section}.actors: {count} processes" if isinstance(spec, PoolSpec) else f"{section}: a process"
    fits = [min(node[name] / amount for name, amount in each.items()) if each else math.inf for node in able]
    places = sum(math.floor(min(number, count) + 1e-9) for number in fits)
    if places < count:
        return [f"{key} of {asked} requested, the nodes have room for {places}; request less"]
    for name, taken in beside.items():  # the others may take theirs from any node
        there = sum(node.get(name, 0.0) for node in nodes)
        if name in each and there < count * each[name] + taken:
            ones = " each" if count > 1 else ""
            return [
                f"{key} of {each[name]:g} {name}{ones} requested, besides {taken:g} for the train workers, the nodes have "
                f"{there:g}; request less"
            ]
    return []


def _places(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Return the number of workers that fit on one node."""
    fits = [node.get(name, 0.0) / each for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return math.floor(min(fits) + 1e-9)
