"""Helpers that the tests of the files in cluster/ share."""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCS = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

TRAIN_WORKER = {"CPU": 8, "GPU": 1}
"""Resources that a train worker of the documented command requests."""
TEACHER = {"CPU": 1, "GPU": 1, "teacher": 1}
"""Resources that a process of a teacher pool requests with gpus: 1 and resources: {teacher: 1}."""


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def fits(demand: dict[str, float], resources: dict[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in demand.items())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nodes_to_come(config: dict[str, Any]) -> str:
    """Return HEADKD_RAY_NODES as the head's start command sets it."""
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    (quoted,) = re.findall(r"HEADKD_RAY_NODES=('.*?')", start, re.DOTALL)
    return shlex.split(quoted)[0]


def check_announced(text: str, types: dict[str, Any]) -> None:
    """Check that HEADKD_RAY_NODES matches the node types: each kind once, whether on spot or on demand."""
    for group in json.loads(text):
        count = group.pop("count")
        found = [
            kind["max_workers"]
            for kind in types.values()
            if {name: amount for name, amount in kind["resources"].items() if name in ("CPU", "GPU", "teacher")} == group
        ]
        assert found and set(found) == {count}, group


def pre_stop_hooks() -> list[list[str]]:
    """Return the command of each worker pod's preStop hook in kuberay.yaml."""
    documents = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    groups = cluster["spec"]["workerGroupSpecs"]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    return [container["lifecycle"]["preStop"]["exec"]["command"] for container in containers]
