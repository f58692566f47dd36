"""The audit of what is installed, against a database on loopback that knows what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("audit.py")
KNOWN: dict[str, list[str]] = {}
ANSWER: list[bytes] = []


class Database(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        names = [query["package"]["name"].lower() for query in queries]
        results = [{"vulns": [{"id": known} for known in KNOWN[name]]} if name in KNOWN else {} for name in names]
        body = ANSWER[0] if ANSWER else json.dumps({"results": results}).encode()
        self.send_response(200 if self.path == "/v1/querybatch" else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Database)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    KNOWN.clear()
    ANSWER.clear()


def audit(url: str) -> tuple[int, str]:
    environment = {**os.environ, "OSV_URL": url}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout


def test_nothing_known_passes(database: str) -> None:
    code, said = audit(database)
    assert code == 0 and "packages audited: 0 with a known vulnerability" in said
    assert int(said.split()[0]) > 50


def test_a_known_vulnerability_fails(database: str) -> None:
    KNOWN["streamlit"] = ["PYSEC-2026-1"]
    code, said = audit(database)
    assert code == 1 and "streamlit 1." in said and "https://osv.dev/PYSEC-2026-1" in said


def test_a_network_that_is_away_is_said_and_passes(database: str) -> None:
    for answer in (b"", b"<html>a proxy speaks</html>", b'{"results": []}', b"[]", b'{"results": null}'):
        ANSWER[:] = [answer]
        code, said = audit(database)
        assert code == 0 and "could not be audited" in said, answer
    code, said = audit("http://127.0.0.1:9")
    assert code == 0 and "could not be audited" in said and said.count("\n") == 1
