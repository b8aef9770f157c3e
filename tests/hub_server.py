"""A hub of one machine: the few endpoints that huggingface_hub asks for, over folders made on the spot."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LFS = (".safetensors", ".parquet", ".jsonl")  # kept by their sha256, as the hub keeps what is large


@dataclass
class Repo:
    """Commits of a repository, and where its branches stand."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    is_gated: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit with these files; returns its hash."""
        text = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(text + branch.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    """Repositories by kind and name, e.g. models/me/tiny."""

    url: str
    repos: dict[str, Repo]
    asked: list[str] = field(default_factory=list)  # "METHOD path" of each request
    damaged: set[str] = field(default_factory=set)  # names of files that are sent with a byte changed


@contextmanager
def serve() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}", repos={})
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[0] == "api":
            key, rest = "/".join(parts[1:4]), parts[4:]
        elif parts[0] == "datasets":
            key, rest = "/".join(parts[:3]), parts[3:]
        else:
            key, rest = "models/" + "/".join(parts[:2]), parts[2:]
        repo = hub.repos.get(key)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if repo.is_gated:
            return self._refuse(403, "GatedRepo")
        commit = repo.branches.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if verb == "revision":
            rows = [{"rfilename": name} for name in files]
            return self._json({"id": key.partition("/")[2], "sha": commit, "siblings": rows}, with_body)
        if verb == "tree":
            return self._json([_row(name, data) for name, data in files.items()], with_body)
        name = "/".join(rest[2:])
        if verb != "resolve" or name not in files:
            return self._refuse(404, "EntryNotFound")
        data = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(name, data)}"'}
        if name in hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        self._send(200, data if with_body else b"", headers, length=len(data))

    def _json(self, value: Any, with_body: bool) -> None:
        data = json.dumps(value).encode()
        self._send(200, data if with_body else b"", {"Content-Type": "application/json"}, length=len(data))

    def _refuse(self, code: int, name: str) -> None:
        self._send(code, b"", {"X-Error-Code": name, "X-Error-Message": name}, length=0)

    def _send(self, code: int, data: bytes, headers: dict[str, str], *, length: int) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


def _row(name: str, data: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
    if name.endswith(_LFS):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 120}
    return row


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(_LFS) else _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
