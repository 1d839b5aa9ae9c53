"""A server on this machine that behaves like AWS's instance metadata service, as far as a spot machine's end is concerned."""

from __future__ import annotations

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class MetadataServer:
    """A metadata service (IMDSv2) of a spot machine. A context manager."""

    def __init__(self) -> None:
        self.lifecycle: str | None = "spot"
        """instance-life-cycle; None = the service is not up."""
        self.answers: list[str | None] = [None]
        """What the next requests for spot/instance-action get, the last one for ever: None = nothing (404), "expired" = the
        token is refused (401), "outage" = an error (503), or the notice."""
        self.tokens: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def notice(action: str, time: str) -> str:
        return json.dumps({"action": action, "time": time})

    def __enter__(self) -> MetadataServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path: str, token: str | None) -> tuple[int, str]:
        """Return the status and the body for a GET."""
        if token is None or token not in self.tokens[-1:]:
            return 401, ""
        if path == "/latest/meta-data/instance-life-cycle":
            return (503, "") if self.lifecycle is None else (200, self.lifecycle)
        if path != "/latest/meta-data/spot/instance-action":
            return 404, ""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "expired":
            self.tokens.append("")
            return 401, ""
        if answer == "outage":
            return 503, ""
        return (404, "") if answer is None else (200, answer)


def _handler(service: MetadataServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            if known:
                service.tokens.append(secrets.token_hex(8))
            self._send(200 if known else 400, service.tokens[-1] if known else "")

        def do_GET(self) -> None:
            self._send(*service.reply(self.path, self.headers["X-aws-ec2-metadata-token"]))

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Print nothing."""

    return Handler
