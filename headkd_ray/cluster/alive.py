"""Does Ray still live: the head of the cluster, and the raylet of this machine, through which every call goes."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from rich.console import Console

PATIENCE = 10.0
"""Seconds that a cluster may take to answer: Ray itself would ask for minutes."""
HEAD_AWAY = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own variable: seconds for which a cluster's head may be away until Ray ends the processes that need it; 60 by default.
It matters where a head comes back, as KubeRay's does with a database."""

KILLED = "it was killed, as it is where memory runs out (dmesg tells)"


def unanswered(address: str) -> str | None:
    """Why no Ray cluster answers at ``host:port``; None if one does."""
    with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=PATIENCE)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:  # it does; ray.init says what it wants
                return None
            return str(error.details()).removeprefix("failed to connect to all addresses; last error: ")
    return None


@contextmanager
def watched() -> Iterator[None]:
    """Within, this process ends with a sentence and exit code 2 if the Ray that it has joined or started is lost.

    Ray would end it too: without a word as soon as it calls a raylet that has died, and after ``HEAD_AWAY`` without the head.
    Whatever cleans up would call Ray. So no error is raised here: the process ends at once.
    """
    node = ray._private.worker._global_node
    if node is None:  # a client of Ray's (ray://), which has no raylet
        yield
        return
    away = 0.75 * float(os.environ.get(HEAD_AWAY, 60))  # before Ray does
    left = threading.Event()

    def watch() -> None:
        lost = wait_for_loss(node.raylet_socket_name, node.gcs_address, away, left)
        if lost is not None and not left.is_set():
            _end(lost)

    threading.Thread(target=watch, name="headkd-alive", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def wait_for_loss(raylet: str, head: str, away: float, left: threading.Event) -> str | None:
    """What was lost; None once ``left`` is set.

    Args:
        raylet: name of its socket.
        head: host:port of the cluster's head.
        away: seconds for which the head may be away.
    """
    answered = time.monotonic()
    while not left.is_set():
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(raylet)
            except OSError:
                return f"this machine's part of Ray, the raylet, has died: {KILLED}"
            line.settimeout(1)
            while not left.is_set() and not _closed(line):
                reason = unanswered(head)
                if reason is None:
                    answered = time.monotonic()
                elif time.monotonic() - answered > away:
                    silence = f"has not answered for {away:.0f} s ({reason})"
                    return f"the head of the Ray cluster, at {head}, {silence}: {KILLED}, or cannot be reached"
    return None


def _closed(line: socket.socket) -> bool:
    """Whether the other end is closed, which is what becomes of a dead process's; waits for it until ``line`` times out."""
    try:
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _end(lost: str) -> None:
    mend = "start the same command again (a search with --resume): a training goes on from its last checkpoint"
    try:
        Console().show_cursor()  # a progress bar hides it
        print(f"error: {lost}; {mend}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(2)
