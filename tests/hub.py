"""A small Hugging Face Hub: an HTTP server with the endpoints that huggingface_hub calls to push and to download a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"
"""Tokens with and without write access."""


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    url: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    """The files of each commit, by repository."""
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    """Files that were uploaded through LFS, by SHA-256."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""

    def files(self, repository: str) -> dict[str, bytes]:
        return self.commits[repository][-1]

    def put(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit as others would, and return its hash."""
        self.commits.setdefault(repository, [{}]).append(files)
        return self.sha(repository, len(self.commits[repository]) - 1)

    @staticmethod
    def sha(repository: str, number: int) -> str:
        return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return hash and files of a commit that is named by its hash or as main."""
        for number in reversed(range(len(self.commits[repository]))):
            sha = self.sha(repository, number)
            if revision in ("main", sha):
                return sha, self.commits[repository][number]
        return None


Reply = tuple[int, Any, dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, answer in ROUTES[{"HEAD": "GET"}.get(self.command, self.command)]:
            if match := re.fullmatch(pattern, path):
                return self.reply(*answer(self, body, **match.groupdict()))
        raise AssertionError(f"{self.command} {self.path}: huggingface_hub asks for what this server does not know")

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def reply(self, status: int, content: Any, headers: dict[str, str]) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    # --- what the routes answer ---

    def create(self, body: bytes) -> Reply:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if self.token != WRITE:
            status, says = (
                (403, "You don't have the rights to create a model") if self.token == READ else (401, "Invalid token")
            )
            return status, {"error": says}, {"X-Error-Message": says}
        if name in self.hub.commits:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        self.hub.commits[name] = [{}]
        self.hub.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def validate(self, body: bytes) -> Reply:
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, body: bytes, name: str) -> Reply:
        modes = {file["path"]: file["path"].endswith(".safetensors") for file in json.loads(body)["files"]}
        files = [{"path": path, "uploadMode": "lfs" if large else "regular"} for path, large in modes.items()]
        return 200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}, {}

    def batch(self, body: bytes, name: str) -> Reply:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def store(self, body: bytes, sha256: str) -> Reply:
        assert hashlib.sha256(body).hexdigest() == sha256
        self.hub.large[sha256] = body
        return 200, {}, {}

    def commit(self, body: bytes, name: str) -> Reply:
        files = dict(self.hub.files(name))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
        sha = self.hub.put(name, files)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}, {}

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | Reply:
        if name not in self.hub.commits or (name in self.hub.private and self.token not in (READ, WRITE)):
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        found = self.hub.at(name, revision)
        return found or (404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})

    def info(self, body: bytes, name: str, revision: str) -> Reply:
        found = self.find(name, revision)
        if len(found) == 3:
            return found
        sha, files = found
        siblings = [{"rfilename": path} for path in files]
        return 200, {"_id": "1", "id": name, "sha": sha, "private": name in self.hub.private, "siblings": siblings}, {}

    def tree(self, body: bytes, name: str, revision: str) -> Reply:
        found = self.find(name, revision)
        if len(found) == 3:
            return found
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in found[1].items()
        ]
        return 200, files, {}

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Reply:
        found = self.find(name, revision)
        if len(found) == 3:
            return found
        sha, files = found
        if path not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        return 200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'}


MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES: dict[str, list[tuple[str, Callable[..., Reply]]]] = {
    "GET": [
        (MODEL, lambda self, body, name: self.info(body, name, "main")),
        (MODEL + r"/revision/(?P<revision>.+)", Handler.info),
        (MODEL + r"/tree/(?P<revision>[^/]+)", Handler.tree),
        (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ],
    "POST": [
        (r"/api/repos/create", Handler.create),
        (r"/api/validate-yaml", Handler.validate),
        (MODEL + r"/preupload/main", Handler.preupload),
        (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
        (MODEL + r"/commit/main", Handler.commit),
    ],
    "PUT": [(r"/lfs/(?P<sha256>\w+)", Handler.store)],
}


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty hub on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
