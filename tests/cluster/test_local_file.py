"""``ray up`` with cluster/local.yaml really starts a cluster of two machines."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.files import BIN, ROOT, free_port, read

SSH = """#!/bin/bash
until [[ $1 == *@* ]]; do shift; done
export HOME='{machines}'/"${{1#*@}}"
cd "$HOME" || exit 255
shift
exec bash -c "$*"
"""
"""A stand-in for ssh that runs the command here; a machine is a home folder of its own."""
RSYNC = """#!/bin/bash
source=${{@: -2:1}} target=${{@: -1}}
host=${{target%%:*}} path=${{target#*:}}
path=${{path/#\\~/'{machines}'/${{host#*@}}}}
if [ -d "$source" ]; then mkdir -p "$path" && cp -r "$source." "$path"; else cp "$source" "$path"; fi
"""

JOB = """
import os, ray, time
ray.init(logging_level="ERROR")
until = time.time() + 120
while "teacher" not in ray.cluster_resources() and time.time() < until:
    time.sleep(1)
print(len(ray.nodes()), "nodes,", ray.cluster_resources().get("teacher"), "teachers")
print("inherited", os.environ["RAY_enable_autoscaler_v2"])
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a folder with a short path. Processes that name it on their command line are killed before it is removed."""
    folder = Path(tempfile.mkdtemp(prefix="headkd-ray-", dir="/tmp"))  # a socket's path has at most 107 bytes
    try:
        yield folder
    finally:
        for _ in range(3):  # by id, because `ray stop` would end other clusters too
            for entry in Path("/proc").iterdir():
                try:
                    if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def set_up(machine: Path, tools: Path) -> None:
    """Prepare a machine as setup.sh would leave it, with this test's environment, so that setup.sh has nothing to do."""
    environment = machine / "headkd_ray/.venv"
    for name in ("python", "ray"):
        executable(environment / "bin" / name, f'#!/bin/sh\nexec {BIN / name} "$@"\n')
    for name in ("ssh", "rsync"):
        (environment / "bin" / name).symlink_to(tools / name)
    stamp = (ROOT / "requirements.lock").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    (environment / "headkd_ray-installed").write_bytes(stamp)


def for_two_machines_here(config: dict[str, Any], head: str, worker: str, gcs: int, dashboard: int, folder: Path) -> None:
    """Rewrite the file for this machine: other addresses and ports, small nodes, no ``ray stop``, which would end others."""
    config["cluster_name"] = folder.name
    config["provider"].update(head_ip=head, worker_ips=[worker])
    small = "--num-cpus=1 --object-store-memory=80000000 --disable-usage-stats --dashboard-agent-listen-port=0"
    for kind, more in (("head", f"--temp-dir={folder}/s --node-ip-address={head}"), ("worker", f"--node-ip-address={worker}")):
        stop, start = config[f"{kind}_start_ray_commands"]
        assert stop == "ray stop"
        for old, new in (("6379", str(gcs)), ("8265", str(dashboard)), (" --object-manager-port=8076", "")):
            start = start.replace(old, new)
        config[f"{kind}_start_ray_commands"] = [f"{start} {small} {more}"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a second loopback address")
@pytest.mark.slow
def test_ray_up_starts_machines_that_are_there(scratch: Path) -> None:
    """The page's commands start the cluster and run a job on it. Only the transport is replaced: ssh and rsync run here."""
    from ray.util import get_node_ip_address

    head, worker, gcs, dashboard = get_node_ip_address(), "127.0.0.2", free_port(), free_port()
    machines, laptop, tools = scratch / "m", scratch / "laptop", scratch / "bin"
    for name, text in (("ssh", SSH), ("rsync", RSYNC)):
        executable(tools / name, text.format(machines=machines))
    for machine in (head, worker):
        set_up(machines / machine, tools)
    (machines / worker / "ray_resources.json").write_text('{"teacher": 1}')
    executable(laptop / ".ssh/id_ed25519", "a key")
    executable(scratch / "work/job.py", JOB)
    config = read("local.yaml")
    for_two_machines_here(config, head, worker, gcs, dashboard, scratch)
    (scratch / "local.yaml").write_text(yaml.safe_dump(config))

    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(laptop), "PATH": f"{tools}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch)}

    def ray(*command: str) -> tuple[int, str]:
        arguments: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "text": True, "timeout": 300}
        done = subprocess.run([str(BIN / "ray"), *command], capture_output=True, check=False, **arguments)
        return done.returncode, done.stdout + done.stderr

    assert ray("get-auth-token", "--generate")[0] == 0
    code, said = ray("up", "--yes", "--no-config-cache", str(scratch / "local.yaml"))
    assert code == 0, said
    assert (machines / head / "headkd_ray/headkd_ray/train.py").exists()

    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.3", dashboard)) != 0, "the dashboard listens on more than 127.0.0.1"
    address = f"http://127.0.0.1:{dashboard}"
    code, said = ray("job", "list", "--address", address)
    assert code != 0 and "Missing authentication token" in said
    environment["RAY_AUTH_MODE"] = "token"
    code, said = ray("job", "submit", "--address", address, "--working-dir", str(scratch / "work"), "--", "python", "job.py")
    assert code == 0 and "2 nodes, 1.0 teachers" in said, said
    assert "inherited 0" in said, "a job sees what the head's start command exports, as HEADKD_RAY_NODES in aws.yaml"
    assert (machines / worker / "headkd_ray/headkd_ray/train.py").exists(), "the head passes the files on"
