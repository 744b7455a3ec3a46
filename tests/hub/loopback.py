"""A small Hugging Face hub on the loopback: enough of its interface for huggingface_hub to fetch models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """models: name -> directory; gated: names that want TOKEN; asked: what was fetched, in order."""

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    revisions: dict[str, Path] = field(default_factory=dict)  # revision -> directory, of any model
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve until the block is left."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def folder(self, name: str, revision: str) -> Path | None:
        """The files of a model at a branch or commit."""
        for known, path in {"main": self.models.get(name), **self.revisions}.items():
            if path is not None and revision in (known, commit(path)) and name in self.models:
                return path
        return None


def commit(folder: Path) -> str:
    """A commit for a directory."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.tokens |= {token} - {""}
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._model("/".join(parts[2:4]), parts[5] if parts[5:] else "main", parts[4:5] == ["tree"])
            elif parts[2:3] == ["resolve"]:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
            else:
                self._refuse(404, "EntryNotFound")

        def _model(self, name: str, revision: str, tree: bool) -> None:
            folder = hub.folder(name, revision)
            if name not in hub.models:
                self._refuse(401, "RepoNotFound")  # as the hub says it to those it does not know
            elif folder is None:
                self._refuse(404, "RevisionNotFound")
            else:
                files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
                names = [{"rfilename": file} for file in files]
                entries = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": f} for f in files]
                model = {"id": name, "sha": commit(folder), "siblings": names, "private": False}
                self._send(json.dumps(entries if tree else model).encode())

        def _file(self, name: str, revision: str, file: str, token: str) -> None:
            folder = hub.folder(name, revision)
            if name in hub.gated and token != TOKEN:
                self._refuse(403 if token else 401, "GatedRepo")
            elif folder is None or not (folder / file).is_file():
                self._refuse(404, "EntryNotFound")
            else:
                if self.command == "GET":
                    hub.asked.append(file)
                data = (folder / file).read_bytes()
                self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit(folder)})

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler
