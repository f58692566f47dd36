"""What the Hugging Face hub answers to somebody who uploads, on this machine: it keeps what it was sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """address: for HF_ENDPOINT. created: what was asked for. files: content by path. n_requests: of any kind."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    n_requests: int = 0


@contextmanager
def hub_for_uploads(token: str) -> Iterator[Hub]:
    """A hub that knows this token and takes every file in the commit itself."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hub.n_requests += 1
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                self.answer(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self.answer(200, {"url": f"{hub.address}/ada/short", "name": "ada/short"})
            elif "/preupload/" in self.path:
                taken = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer(200, {"files": [{"path": file["path"]} | taken for file in json.loads(body)["files"]]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer(200, {"commitUrl": f"{hub.address}/ada/short/commit/1", "commitOid": "1" * 40})
            else:
                self.answer(200, {})

        def do_GET(self) -> None:
            hub.n_requests += 1
            self.answer(200, {"id": "ada/short", "sha": "1" * 40, "siblings": []})

        def answer(self, code: int, data: dict[str, Any]) -> None:
            content = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
