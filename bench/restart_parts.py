"""Measure what passes before a run goes on after a loss: ``python bench/restart_parts.py``.

- Seconds until Ray declares a killed node dead, with Ray's defaults and with ``QUICK`` in the environment of the head.
- CPU seconds that the processes of a run take to import what they need, each the least of ``--rounds`` new processes.

docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

from machines import ENVIRONMENT, ROOT, Machines

QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
IMPORTS = {
    "Ray Train": "ray.train",
    "a process that reads or decodes images": "headkd_ray.cluster.unhurried, headkd_ray.cluster.decoding",
    "a teacher process": "headkd_ray.cluster.teacher_actors",
    "a train worker": "headkd_ray.cluster.trainer",
    "the driver": "headkd_ray.train, headkd_ray.engine.preflight, headkd_ray.run_report, headkd_ray.cluster.trainer",
}


def seconds_until_dead() -> float:
    """Kill a node's raylet, and return after how many seconds the head counts the node as dead."""
    with Machines() as machines:
        machines.have("node", 1, cpus=1)
        (node,) = machines.nodes["node"]
        state = machines.cluster.global_state
        node.all_processes["raylet"][0].process.kill()
        killed = time.monotonic()
        while any(entry["NodeID"] == node.node_id and entry["Alive"] for entry in state.node_table()):
            time.sleep(0.1)
        return time.monotonic() - killed


def import_seconds(modules: str, rounds: int) -> float:
    """Return the least CPU seconds, of user and system, of processes that import ``modules`` and end."""
    taken = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(taken)


def main() -> int:
    """Print all of it and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-death", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if options.only_death:
        print(f"{seconds_until_dead():.1f} s until a killed node is dead")
        return 0
    for title, own in {"Ray's defaults": {}, ", ".join(f"{key}={value}" for key, value in QUICK.items()): QUICK}.items():
        print(f"{title}: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, "--only-death"], check=True, env={**os.environ, **own})
    for title, modules in IMPORTS.items():
        print(f"{title}: {import_seconds(modules, options.rounds):.1f} CPU seconds of imports", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
