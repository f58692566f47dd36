"""What the web server adds to Streamlit: headers on every answer, a door before every request, and whether it is ready.

Streamlit sends no security headers itself. `st.App` is its supported way to put middleware before everything it serves;
`streamlit run streamlit_app.py` finds the one that is made there. An outer middleware sees all answers but the one for
an exception in the server itself, which a handler of its own gives.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import streamlit as st
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptailor.dashboard import access

log = logging.getLogger(__name__)

LEAST_FREE = 1024**3
"""Bytes of disk without which nothing more should be started."""
HEALTH, READY, UPLOADS = "/_stcore/health", "/readyz", "/_stcore/upload_file/"


@lru_cache
def headers() -> tuple[tuple[bytes, bytes], ...]:
    """Headers of every answer.

    Scripts come from this server alone and none is made from text: charts are drawn by Vega's interpreter, which
    Streamlit's bundle uses, so `unsafe-eval` is not needed. The one inline script of Streamlit's page is named by its
    hash. Its styles are written while it runs (emotion), hence `unsafe-inline` for them.
    """
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", *_inline_scripts()]),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "media-src": "'self' blob:",
        "connect-src": "'self'",
        "worker-src": "'self' blob:",
        "manifest-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'self'",
        "frame-ancestors": "'none'",
    }
    unused = ("accelerometer", "camera", "display-capture", "geolocation", "gyroscope", "microphone", "payment", "usb")
    found = {
        "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "same-origin",
        "permissions-policy": ", ".join(f"{name}=()" for name in unused),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    return tuple((name.encode(), value.encode()) for name, value in found.items())


def _inline_scripts() -> list[str]:
    page = (Path(st.__file__).parent / "static" / "index.html").read_text(encoding="utf-8")
    texts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]


class Guard:
    """Headers on every answer; no answer but "I live" where nobody may look; no upload but where one is expected."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                ours = dict(headers())
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in ours]
                message["headers"] = [*kept, *ours.items()]
            await send(message)

        refused = _refusal(scope)
        if refused is None:
            await self.app(scope, receive, with_headers)
        elif scope["type"] == "websocket" and "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        else:
            await refused(scope, receive, with_headers)


def _refusal(scope: Scope) -> Response | None:
    path = scope["path"]
    if path.endswith((HEALTH, READY)):
        return None
    sent = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = sent.get(b"host"), sent.get(b"origin")
    if problem := access.closed(host):
        return HTMLResponse(f"<!doctype html><title>gptailor</title><p>{escape(problem)}", status_code=403)
    if scope["type"] == "websocket" and origin and urlsplit(origin).netloc != host and not _other_origins():
        _tell_operator(origin, host or "")
        return PlainTextResponse(f"this page is not ours; {WHAT_TO_SET}", status_code=403)
    if scope.get("method") == "PUT" and not access.may_upload(path.partition(UPLOADS)[2].partition("/")[0]):
        return PlainTextResponse("no upload is expected from here", status_code=403)
    return None


WHAT_TO_SET = (
    "a proxy has to pass on the Host header with its port (nginx: proxy_set_header Host $http_host), or the server has "
    "to be started with --server.corsAllowedOrigins ORIGIN"
)


@lru_cache(maxsize=16)
def _tell_operator(origin: str, host: str) -> None:
    """Once for each such page, as a browser that is refused shows its user nothing but a page that never loads."""
    log.warning("a page of %.100r was refused: it called this server %.100r; %s", origin, host, WHAT_TO_SET)


def _other_origins() -> Sequence[str]:
    """Origins that the operator allows.

    Without any, Streamlit lets in pages of every port of this machine, and asks a host elsewhere for this one's address
    to know them by.
    """
    return st.get_option("server.corsAllowedOrigins") or ()


async def ready(_request: Request) -> Response:
    """200 where runs can be shown and started, else 503 and what is missing. For probes: it tells nothing else."""
    from gptailor.dashboard import readers  # its caches want Streamlit's runtime, which is not there at first

    root, missing = readers.runs_root(), []
    existing = next((path for path in (root, *root.resolve().parents) if path.exists()), Path("/"))
    if not os.access(existing, os.R_OK | os.X_OK):
        missing.append("the runs folder cannot be read")
    if not access.is_read_only():
        if not os.access(existing, os.W_OK):
            missing.append("the runs folder cannot be written")
        if shutil.disk_usage(existing).free < LEAST_FREE:
            missing.append("the disk is almost full")
    return JSONResponse({"ready": not missing, "missing": missing}, status_code=503 if missing else 200)


def _routes() -> list[Route]:
    """The probe's addresses: below the base path too, where there is one, as Streamlit's own routes are."""
    below = str(st.get_option("server.baseUrlPath") or "").strip("/")
    return [Route(path, ready) for path in dict.fromkeys((READY, f"/{below}{READY}" if below else READY))]


async def _broken(_request: Request, _error: Exception) -> Response:
    return PlainTextResponse(
        "Internal server error", status_code=500, headers={k.decode(): v.decode() for k, v in headers()}
    )


def tell_calmly(error: Exception) -> bool:  # noqa: ARG001 (Streamlit may name it)
    """Show a stranger no traceback, which names folders and versions; the server's own output has it."""
    if access.visitor().name == access.LOCAL:
        return False
    st.error("Something broke on this page. The server's log says what.", icon=":material/error:")
    return True


OPTIONS: dict[str, Any] = {
    "middleware": [Middleware(Guard)],
    "routes": _routes(),
    "exception_handlers": {Exception: _broken},
    "on_script_error": tell_calmly,
}
"""For st.App."""
