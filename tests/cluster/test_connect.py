"""Addresses at which no Ray cluster answers are told in seconds; Ray itself asks for minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ray

from headkd_ray.cluster.alive import unanswered
from headkd_ray.cluster.connect import connected
from headkd_ray.errors import ClusterError
from headkd_ray.job import ClusterSpec


@pytest.fixture
def web_server() -> Iterator[str]:
    """host:port of a server that speaks HTTP, as Ray's dashboard does."""
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
    """As in a process that has not joined a cluster yet; nothing here may start one."""

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


def test_a_cluster_answers(ray_cluster: None) -> None:
    assert unanswered(ray.get_runtime_context().gcs_address) is None
