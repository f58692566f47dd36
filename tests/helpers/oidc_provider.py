"""A small OpenID provider on loopback.

The standard endpoints, real signatures, and a form in which people say who they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwk, jwt

CLIENT, CLIENT_SECRET = "gptailor", "a secret of client and provider"
FORM = (
    '<!doctype html><title>Provider</title><form method="post"><label>E-mail <input name="email"></label>'
    "<button>Continue</button></form>"
)


class Provider:
    """Start it, and `url` is its issuer. It believes whatever e-mail is typed; `claims` adds to what it says of one."""

    def __init__(self) -> None:
        self.key = jwk.RSAKey.generate_key(2048, parameters={"kid": "one", "use": "sig", "alg": "RS256"})
        self.claims: dict[str, dict[str, Any]] = {}
        self.codes: dict[str, dict[str, str]] = {}
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.answer(self, urlsplit(self.path).path, None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                provider.answer(self, urlsplit(self.path).path, {k: v[0] for k, v in parse_qs(body).items()})

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, path: str, sent: dict[str, str] | None) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        if path == "/.well-known/openid-configuration":
            _json(request, self._discovery())
        elif path == "/jwks":
            _json(request, {"keys": [self.key.as_dict(private=False)]})
        elif path == "/authorize" and sent is None:
            _send(request, 200, FORM.encode(), "text/html")
        elif path == "/authorize" and sent is not None:
            code = secrets.token_hex(8)
            self.codes[code] = asked | {"email": sent["email"]}
            _redirect(request, f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}")
        elif path == "/token" and sent is not None:
            self._token(request, sent)
        elif path == "/logout":
            _redirect(request, asked["post_logout_redirect_uri"])
        else:  # a browser's wish for an icon
            _send(request, 204, b"", "text/plain")

    def _discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "end_session_endpoint": f"{self.url}/logout",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
        }

    def _token(self, request: BaseHTTPRequestHandler, sent: dict[str, str]) -> None:
        """One ID token for one code, to the client that asked for it and can show what it promised (PKCE)."""
        asked = self.codes.pop(sent.get("code", ""), None)
        basic = base64.b64encode(f"{CLIENT}:{CLIENT_SECRET}".replace(" ", "+").encode()).decode()
        plain = base64.b64encode(f"{CLIENT}:{CLIENT_SECRET}".encode()).decode()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(sent.get("code_verifier", "").encode()).digest())
        if (
            asked is None
            or request.headers.get("Authorization") not in (f"Basic {basic}", f"Basic {plain}")
            or asked["redirect_uri"] != sent.get("redirect_uri")
            or asked["code_challenge"] != challenge.decode().rstrip("=")
        ):
            _send(request, 400, b'{"error": "invalid_grant"}', "application/json")
            return
        now, email = int(time.time()), asked["email"]
        claims = {"iss": self.url, "aud": CLIENT, "sub": hashlib.sha256(email.encode()).hexdigest()[:16], "iat": now}
        claims |= {"exp": now + 300, "nonce": asked["nonce"], "email": email, "email_verified": True}
        token = jwt.encode({"alg": "RS256", "kid": "one"}, claims | self.claims.get(email, {}), self.key)
        _json(
            request,
            {"access_token": secrets.token_hex(8), "token_type": "Bearer", "expires_in": 300, "id_token": token},
        )


def _json(request: BaseHTTPRequestHandler, content: Any) -> None:
    _send(request, 200, json.dumps(content).encode(), "application/json")


def _redirect(request: BaseHTTPRequestHandler, url: str) -> None:
    request.send_response(302)
    request.send_header("Location", url)
    request.send_header("Content-Length", "0")
    request.end_headers()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
