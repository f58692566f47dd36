"""Signing in at a real OpenID provider, in a real browser: who may look, who may launch, who may not enter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, Server, Visitor, run_called, until
from helpers.make_runs import make_run
from helpers.oidc_provider import CLIENT, CLIENT_SECRET, Provider

from gptailor.dashboard import audit
from gptailor.launch.engine import stop
from gptailor.store.folder import run_folders

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]
SECRETS = """
[auth]
redirect_uri = "{server}/oauth2callback"
cookie_secret = "0123456789abcdef0123456789abcdef"
client_id = "{client}"
client_secret = "{secret}"
server_metadata_url = "{provider}/.well-known/openid-configuration"

[access]
operators = ["ada@lab.example", "group:ml"]
viewers = ["@lab.example"]
"""


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    found = Provider()
    found.claims["grace@far.example"] = {"groups": ["ml"], "email_verified": False}
    found.claims["mallory@lab.example"] = {"email_verified": False}
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("signed")
    found = Server(folder / "runs", "--secrets.files", str(folder / "secrets.toml"))
    text = SECRETS.format(server=found.url, client=CLIENT, secret=CLIENT_SECRET, provider=provider.url)
    (folder / "secrets.toml").write_text(text)
    make_run(found.runs, "theirs", n_trials=12)
    found.start()
    yield found
    for run in run_folders(found.runs):
        stop(run, patience=2.0)
    found.kill()


@pytest.fixture
def visitor(browser: Any, server: Server, provider: Provider) -> Iterator[Visitor]:
    found = Visitor(browser, server.url, provider.url)
    yield found
    found.close()


def sign_in(visitor: Visitor, email: str) -> None:
    visitor.page.goto(visitor.url)
    visitor.button("Sign in").click()
    visitor.page.get_by_label("E-mail").fill(email)
    visitor.page.get_by_role("button", name="Continue").click()
    visitor.button("Sign out").wait_for()
    visitor.settle()


def log(server: Server) -> list[dict[str, str]]:
    file = server.runs / audit.NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_without_a_sign_in_there_is_a_button_and_nothing_else(server: Server, visitor: Visitor) -> None:
    for path in ("", f"Progress?run={run_called(server, 'theirs').run_id}"):
        visitor.page.goto(f"{server.url}/{path}")
        visitor.button("Sign in").wait_for()
        visitor.settle()
        assert visitor.text().split() == ["gptailor", "login", "Sign", "in"]
        assert visitor.page.locator('[data-testid="stSidebar"] a').count() == 0
    visitor.shoot("sign-in")


def test_a_viewer_looks_and_cannot_launch(server: Server, visitor: Visitor) -> None:
    sign_in(visitor, "bob@lab.example")
    assert "lab.example, viewer" in visitor.page.locator('[data-testid="stSidebar"]').inner_text()
    visitor.open("Trade-offs", run=run_called(server, "theirs").run_id)
    visitor.page.goto(f"{server.url}/Launch")
    visitor.says("Only operators can do this")
    visitor.settle()
    assert visitor.button("Start the search").is_disabled()
    visitor.shoot("launch-viewer")


def test_an_operator_launches(server: Server, visitor: Visitor) -> None:
    before = set(run_folders(server.runs))
    sign_in(visitor, "ada@lab.example")
    visitor.open("Launch")
    visitor.says("The models fit together")
    visitor.button("Start the search").click()
    visitor.says("is (queued|running)")
    [run] = set(run_folders(server.runs)) - before
    stop(run, patience=2.0)
    [line] = until(lambda: [line for line in log(server) if line["action"] == "launch"])
    assert (line["who"], line["outcome"]) == ("ada@lab.example", f"done: {run.run_id}")


def test_a_group_makes_an_operator(visitor: Visitor) -> None:
    sign_in(visitor, "grace@far.example")
    visitor.page.get_by_text("operator", exact=False).wait_for()


@pytest.mark.parametrize("email", ["eve@else.where", "mallory@lab.example"], ids=["unknown", "unverified"])
def test_somebody_else_is_refused(visitor: Visitor, email: str) -> None:
    sign_in(visitor, email)
    assert f"{email.partition('@')[2]}, who has no rights here" in visitor.text()
    assert visitor.page.locator('[data-testid="stSidebar"] a').count() == 0


def test_signing_out(server: Server, visitor: Visitor) -> None:
    sign_in(visitor, "bob@lab.example")
    visitor.button("Sign out").click()
    visitor.button("Sign in").wait_for()
    visitor.page.goto(f"{server.url}/Progress")
    visitor.button("Sign in").wait_for()
    assert not [cookie for cookie in visitor.page.context.cookies() if cookie["name"].startswith("_streamlit_user")]


def test_a_cookie_of_ones_own_making_is_no_sign_in(server: Server, visitor: Visitor) -> None:
    sign_in(visitor, "bob@lab.example")
    [cookie] = [c for c in visitor.page.context.cookies() if c["name"] == "_streamlit_user"]
    for value in (cookie["value"].replace("b", "c"), cookie["value"][:-4], "null"):
        visitor.page.context.add_cookies([{**cookie, "value": value}])
        visitor.page.goto(f"{server.url}/Progress")
        visitor.button("Sign in").wait_for()


def test_the_engine_never_sees_the_secrets(server: Server) -> None:
    for run in run_folders(server.runs):
        for file in Path(run.path).rglob("*"):
            assert not file.is_file() or CLIENT_SECRET.encode() not in file.read_bytes()
