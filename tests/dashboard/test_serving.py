"""The web server as a stranger meets it: headers on every answer, who is answered at all, uploads, readiness."""

from __future__ import annotations

import base64
import http.client
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from gptailor.dashboard import access, readers, serving

KEY = base64.b64encode(b"0" * 16).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`streamlit run`, over no run."""
    runs = tmp_path_factory.mktemp("served") / "runs"
    runs.mkdir()
    found = Server(runs)
    found.start()
    yield found
    found.kill()


def ask(
    server: Server, path: str, method: str = "GET", host: str | None = None, body: bytes = b"", **headers: str
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    sent = {name.replace("_", "-"): value for name, value in headers.items()} | ({"Host": host} if host else {})
    connection.request(method, path, body, sent)
    return connection.getresponse()


ANSWERS = [
    ("/", "GET", 200),
    ("/Launch?run=..%2F..%2Fetc", "GET", 200),
    ("/static/js/none.js", "GET", None),
    ("/media/none.png", "GET", 404),
    ("/_stcore/health", "GET", 200),
    ("/_stcore/host-config", "GET", 200),
    ("/readyz", "GET", 200),
    ("/auth/login", "GET", 302),
    ("/..%2f..%2fetc/passwd", "GET", None),
    ("/", "POST", 405),
    ("/_stcore/upload_file/a/b", "PUT", 403),
]


@pytest.mark.parametrize("path, method, status", ANSWERS, ids=[f"{method} {path}" for path, method, _ in ANSWERS])
def test_every_answer_carries_the_headers(server: Server, path: str, method: str, status: int | None) -> None:
    answer = ask(server, path, method)
    assert status in (None, answer.status)
    assert b"root:" not in answer.read()
    for name, value in serving.headers():
        assert answer.headers.get_all(name.decode()) == [value.decode()], name


def test_the_policy_lets_nothing_be_made_into_a_script() -> None:
    policy = dict(
        part.split(" ", 1) for part in dict(serving.headers())[b"content-security-policy"].decode().split("; ")
    )
    assert policy["script-src"].startswith("'self' 'sha256-") and "unsafe" not in policy["script-src"]
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert not [part for part in policy.values() if "http" in part or "*" in part or "unsafe-eval" in part]


# --- who is answered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/Launch", "/_stcore/host-config", "/_stcore/stream", "/readyz/x"])
def test_another_name_for_this_machine_is_not_answered(server: Server, path: str) -> None:
    answer = ask(server, path, host="rebound.example")
    body = answer.read().decode()
    assert answer.status == 403 and "has no sign-in" in body and "GPTAILOR_OPEN=1" in body
    assert answer.headers["Content-Security-Policy"]
    socket: dict[str, Any] = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": KEY,
        "Sec_WebSocket_Version": "13",
    }
    assert ask(server, "/_stcore/stream", host="rebound.example", **socket).status == 403
    assert ask(server, "/_stcore/stream", Origin="http://else.where", **socket).status == 403
    assert ask(server, "/_stcore/stream", **socket).status == 101


def test_probes_are_answered_whatever_the_name(server: Server) -> None:
    assert ask(server, "/_stcore/health", host="10.0.0.7").read() == b"ok"
    assert json.loads(ask(server, "/readyz", host="10.0.0.7").read()) == {"ready": True, "missing": []}


def test_an_upload_that_nobody_waits_for_is_not_read(server: Server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("PUT", "/_stcore/upload_file/guessed/1")
    connection.putheader("Content-Length", str(5 * 1024**3))
    connection.endheaders()  # five gigabytes are announced, and the answer is there before the first byte
    answer = connection.getresponse()
    assert answer.status == 403 and answer.read() == b"no upload is expected from here"


# --- the guard by itself ----------------------------------------------------------------------------------------------


def guarded() -> TestClient:
    async def fine(_request: Request) -> Response:
        return PlainTextResponse("fine", headers={"X-Frame-Options": "ALLOWALL", "Content-Security-Policy": "none"})

    async def break_down(_request: Request) -> Response:
        raise RuntimeError("a secret")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    routes = [
        Route("/", fine),
        Route("/broken", break_down),
        Route("/_stcore/upload_file/mine/1", fine, methods=["PUT"]),
    ]
    options = {name: serving.OPTIONS[name] for name in ("middleware", "exception_handlers")}
    app = Starlette(routes=[*routes, WebSocketRoute("/talk", talk), Route("/readyz", serving.ready)], **options)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def test_headers_of_others_give_way_and_a_broken_answer_has_ours_too() -> None:
    client = guarded()
    for path, status in (("/", 200), ("/broken", 500)):
        answer = client.get(path)
        assert answer.status_code == status and "a secret" not in answer.text
        assert answer.headers.get_list("X-Frame-Options") == ["DENY"]
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_uploads_are_taken_from_those_who_may_import(monkeypatch: pytest.MonkeyPatch) -> None:
    client = guarded()
    assert client.put("/_stcore/upload_file/mine/1").status_code == 403
    monkeypatch.setitem(access._uploaders, "mine", None)
    assert client.put("/_stcore/upload_file/mine/1").status_code == 200
    assert client.put("/_stcore/upload_file/other/mine").status_code == 403


def test_a_socket_is_closed_to_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    client = guarded()
    with client.websocket_connect("/talk", headers={"Host": "localhost"}):
        pass
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers={"Host": "rebound.example"}):
        pass
    for origin in ("http://localhost:9999", "http://else.where", "null", "http://localhost.else.where"):
        other = {"Host": "localhost", "Origin": origin}
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers=other):
            pass
    with client.websocket_connect("/talk", headers={"Host": "localhost:8501", "Origin": "http://localhost:8501"}):
        pass
    monkeypatch.setenv(access.OPEN, "1")
    with client.websocket_connect("/talk", headers={"Host": "rebound.example"}):
        pass


def test_a_refused_page_says_what_to_set(server: Server) -> None:
    """A proxy that drops the port from the Host header, as nginx's $host does."""
    handshake: dict[str, Any] = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    handshake |= {"Sec_WebSocket_Key": KEY, "Origin": "https://localhost:8443"}
    for host, status in (("localhost", 403), ("localhost:8443", 101)):
        answer = ask(server, "/_stcore/stream", host=host, **handshake)
        assert answer.status == status
        assert status == 101 or b"proxy_set_header Host $http_host" in answer.read()
    said = (server.runs.parent / "server.log").read_text()
    assert said.count("a page of 'https://localhost:8443' was refused: it called this server 'localhost'") == 1


def test_probes_are_answered_below_a_base_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.st, "get_option", lambda name: "/tailor/" if name == "server.baseUrlPath" else None)
    routes = serving._routes()
    monkeypatch.undo()
    client = TestClient(Starlette(routes=routes))
    for path in ("/tailor/readyz", "/readyz"):
        assert client.get(path).json() == {"ready": True, "missing": []}


def test_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "new" / "runs"))
    client = guarded()
    assert client.get("/readyz").json() == {"ready": True, "missing": []}
    monkeypatch.setattr(serving, "LEAST_FREE", 1 << 62)
    answer = client.get("/readyz")
    assert answer.status_code == 503 and answer.json()["missing"] == ["the disk is almost full"]
    monkeypatch.setenv(access.READ_ONLY, "1")
    assert client.get("/readyz").status_code == 200


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_runs_folder_that_cannot_be_written_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert guarded().get("/readyz").json()["missing"] == ["the runs folder cannot be written"]
    assert readers.runs_root() == tmp_path


def test_strangers_see_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving.tell_calmly(ValueError("/home/ada/models")) is False  # whoever sits here does
    monkeypatch.setenv(access.OPEN, "1")
    assert serving.tell_calmly(ValueError("/home/ada/models")) is True
