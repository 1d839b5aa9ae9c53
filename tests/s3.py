"""An S3 server for tests: moto in a process of its own, and a proxy before it that makes it fail."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

EXPIRED = (
    400,
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>",
)
"""S3's answer to temporary credentials that have expired."""

Answer = tuple[int, bytes]


@contextlib.contextmanager
def moto_server(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Start a server with its log in ``folder``, and yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "moto.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy for the server at ``url``: ``refuse`` may answer a request itself. All (method, path) are recorded."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(url).netloc
        self.seen: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], Answer | None] = lambda method, path: None

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed, or that did not wait for the rest of an answer

    def __exit__(self, *raised: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = b"".join(self._chunks()) if "chunked" in self.headers.get("Transfer-Encoding", "") else self._whole()
        self.server.seen.append((self.command, self.path))
        refused = self.server.refuse(self.command, self.path)
        if refused is not None:
            self.send_response(refused[0])
            self.send_header("Content-Length", str(len(refused[1])))
            self.end_headers()
            self.wfile.write(refused[1])
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        own = ("expect", "transfer-encoding", "content-length")  # concerns only the client and this proxy
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        # An answer to HEAD gives the length that GET would have.
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    def _whole(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def uri(bucket: str, netloc: str, path: str = "") -> str:
    """Return the address of ``path`` in a bucket of the store at ``netloc`` (host:port)."""
    return f"s3://{bucket}{path and '/' + path}?endpoint_override={netloc}&scheme=http"


def nobody() -> dict[str, str]:
    """Return this process's environment with credentials that moto accepts, instead of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_EC2_METADATA_DISABLED": "true"}
    return {**kept, **keys, "NO_PROXY": "127.0.0.1"}
