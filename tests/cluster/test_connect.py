"""An address at which no Ray cluster answers is reported within seconds, and so is a cluster that dies during a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from headkd_ray.cluster.alive import HEAD_AWAY, unanswered, wait_for_loss
from headkd_ray.cluster.connect import connected
from headkd_ray.errors import ClusterError
from headkd_ray.job import ClusterSpec
from tests.support import HANGS


@pytest.fixture
def web_server() -> Iterator[str]:
    """Yield host:port of a server that speaks HTTP, as Ray's dashboard does."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


def refused(spec: ClusterSpec) -> str:
    with pytest.raises(ClusterError) as caught, connected(spec):
        pass
    return str(caught.value)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process has not joined a cluster; nothing here may start one."""

    def start(**options: object) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)


def test_the_dashboard_s_address_is_not_the_cluster_s(web_server: str, no_ray: None) -> None:
    text = refused(ClusterSpec(address=web_server))
    assert text.startswith(f"cluster.address={web_server}: no Ray cluster answers there (") and "8265 is the dashboard" in text


def test_nobody_listens_at_the_environment_s_address(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    address = free_port()
    monkeypatch.setenv("RAY_ADDRESS", address)
    text = refused(ClusterSpec())
    assert text.startswith(f"RAY_ADDRESS={address}: no Ray cluster answers there (") and "Connection refused" in text


def test_a_key_that_this_ray_is_too_old_for(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.59.1")
    text = refused(ClusterSpec(preemption_grace_s=5.0))
    assert text == "cluster.preemption_grace_s needs Ray 2.60, and this is Ray 2.59.1: leave the key out"


def test_a_cluster_answers(ray_cluster: None) -> None:
    assert unanswered(ray.get_runtime_context().gcs_address) is None


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[socket.socket]:
    """Yield a socket where a raylet would listen."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "raylet"))
        listening.listen()
        yield listening


def test_a_raylet_that_dies_is_noticed(raylet: socket.socket, tmp_path: Path, ray_cluster: None) -> None:
    head = ray.get_runtime_context().gcs_address
    done, lost = threading.Event(), []
    thread = threading.Thread(target=lambda: lost.append(wait_for_loss(str(tmp_path / "raylet"), head, 0, done)))
    thread.start()
    line, _ = raylet.accept()
    thread.join(2)
    assert thread.is_alive(), "took a living one for dead"
    raylet.close()
    line.close()
    thread.join()
    assert lost[0] is not None and "the raylet, has died" in lost[0]
    done.set()
    assert wait_for_loss(str(tmp_path / "raylet"), head, 0, done) is None


def test_a_head_that_is_away_too_long_is_noticed(raylet: socket.socket, tmp_path: Path) -> None:
    head = free_port()
    started = time.monotonic()
    lost = wait_for_loss(str(tmp_path / "raylet"), head, 2, threading.Event())
    assert lost is not None and f"at {head}, has not answered for 2 s (" in lost and "Connection refused" in lost
    assert time.monotonic() - started > 2


WAITS = """
import time
import ray
from headkd_ray.cluster.connect import connected
from headkd_ray.cli import user_errors
from headkd_ray.job import ClusterSpec

with user_errors(), connected(ClusterSpec()):
    node = ray._private.worker._global_node
    print(*(node.all_processes[name][0].process.pid for name in ("raylet", "gcs_server")), flush=True)
    ray.get(ray.remote(lambda: time.sleep(1000)).remote())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "told"), [(0, "the raylet, has died"), (1, "has not answered for 9 s")])
def test_a_real_ray_that_dies_ends_the_command_with_a_sentence(number: int, told: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local", HEAD_AWAY: "12"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    os.kill(int(pids[number]), signal.SIGKILL)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 2, errors
    assert told in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors


ASKS = """
import os
import ray
from ray.util.state import list_actors
from headkd_ray.cluster.connect import connected
from headkd_ray.job import ClusterSpec

@ray.remote(num_cpus=0)
class Marker:
    def asked(self, joined):
        if joined:  # a cluster without a dashboard, which answers nobody
            return os.environ["RAY_API_SERVER_ADDRESS"]
        return len(list_actors(filters=[("class_name", "=", "Marker")]))

with connected(ClusterSpec(), dashboard=True):
    marker = Marker.remote()
    print(ray.get(marker.asked.remote(os.environ["RAY_ADDRESS"] != "local")))
assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://elsewhere:8265"
"""


def test_a_process_asks_its_own_cluster_about_actors_where_a_machine_has_several(ray_cluster: None) -> None:
    """As Ray Train's PlacementGroupCleaner does: without an answer, what a stopped trial had reserved is never free again."""
    here = ray.get_runtime_context().gcs_address
    for address, answer in (("local", "1"), (here, here)):
        environment = {**os.environ, "RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": "http://elsewhere:8265"}
        asked = subprocess.run([sys.executable, "-c", ASKS], env=environment, stdout=subprocess.PIPE, timeout=HANGS)
        assert asked.stdout.decode().strip() == answer
