"""Who may do what: roles from a sign-in, asked for inside every action, and a line in the audit log for each.

Widgets are clicked whether they are enabled or not, as somebody would who sends events of their own.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.make_runs import make_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import access, audit, readers, run_table
from gptailor.dashboard.access import Misconfigured, Role, Rules, closed, read_rules
from gptailor.launch.engine import is_alive, stop
from gptailor.store.folder import RunFolder
from gptailor.store.notes import read_notes
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "auth": {"client_id": "gptailor", "cookie_secret": "s" * 32},
    "access": {"operators": ["ada@lab.example", "group:ml"], "viewers": ["@lab.example"]},
}
NOT_AN_OPERATOR = "Only operators can do this; you are signed in as a viewer."


def person(email: str, **claims: Any) -> dict[str, Any]:
    return {"is_logged_in": True, "email": email, "email_verified": True, "iat": time.time(), **claims}


def opened(user: dict[str, Any] | None, page: str = "", secrets: Any = SECRETS, **query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=90)
    app.secrets = dict(secrets)
    app.user = {"is_logged_in": False} if user is None else user
    if page:
        app.run()
        app.switch_page(page)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def button(app: AppTest, label: str) -> Any:
    return next(found for found in app.button if found.label.startswith(label))


def log(store: Path) -> list[dict[str, str]]:
    file = store / audit.NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# --- who gets in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user, said",
    [
        (None, None),
        (person("ada@lab.example", iat=time.time() - access.SIGNED_IN_SECONDS - 1), None),
        (person("ada@lab.example", iat="soon"), None),
        (person("eve@else.where"), "who has no rights here"),
        (person("ada@lab.example", email_verified=False), "who has no rights here"),
        (person("ada@lab.example", email_verified="true"), "who has no rights here"),
        (person("eve@else.where@lab.example"), "who has no rights here"),
    ],
    ids=["nobody", "signed in long ago", "no time", "unknown", "unverified", "verified as text", "two domains"],
)
def test_who_is_not_known_sees_nothing_but_the_way_in(
    store: Path, user: dict[str, Any] | None, said: str | None
) -> None:
    run = make_run(store, "secret name", n_trials=4)
    app = opened(user, "pages/2_Progress.py", run=run.run_id)
    assert [found.label for found in app.button] == ["Sign out" if said else "Sign in"]
    shown = [element.value for element in (*app.markdown, *app.title, *app.error, *app.caption, *app.info)]
    assert shown[:1] == ["gptailor"] and len(shown) == (2 if said else 1), shown
    assert not said or said in app.error[0].value
    assert not app.sidebar.markdown and not app.dataframe


def test_roles_by_address_domain_and_group() -> None:
    rules = read_rules(SECRETS["access"] | {"groups_claim": "roles"})  # type: ignore[operator]
    assert rules.role(person("Ada@Lab.Example")) is Role.OPERATOR
    assert rules.role(person("bob@lab.example")) is Role.VIEWER
    assert rules.role(person("bob@sub.lab.example")) is rules.role(person("bob@notlab.example")) is Role.NOBODY
    assert rules.role({"sub": "1", "roles": ["ml"]}) is rules.role({"roles": "ml"}) is Role.OPERATOR
    assert rules.role({"groups": ["ml"]}) is rules.role({"roles": {"ml": 1}}) is rules.role({}) is Role.NOBODY
    assert rules.role(person("group:ml")) is Role.NOBODY
    assert Rules().role(person("ada@lab.example")) is Role.NOBODY


@pytest.mark.parametrize(
    "section",
    [None, [], {"operator": []}, {"operators": "ada@lab.example"}, {"viewers": ["lab.example"]}, {"viewers": ["a@"]},
     {"operators": ["group:"]}, {"operators": [1]}],
)  # fmt: skip
@pytest.mark.usefixtures("store")
def test_rules_that_are_not_understood_let_nobody_in(section: Any) -> None:
    with pytest.raises(Misconfigured, match="access"):
        read_rules(section)
    app = opened(person("ada@lab.example"), secrets=SECRETS | {"access": section})
    assert "settings are wrong" in app.error[0].value and not app.button


@pytest.mark.usefixtures("store")
def test_a_guessable_cookie_secret_lets_nobody_in() -> None:
    app = opened(person("ada@lab.example"), secrets=SECRETS | {"auth": {"client_id": "x", "cookie_secret": "short"}})
    assert "settings are wrong" in app.error[0].value


def test_secrets_that_cannot_be_read_do_not_mean_no_sign_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from streamlit import config

    assert access.visitor().role is Role.OPERATOR
    broken = tmp_path / "secrets.toml"
    broken.write_text("[auth\n")
    option = config.get_option
    monkeypatch.setattr(config, "get_option", lambda name: [str(broken)] if name == "secrets.files" else option(name))
    monkeypatch.setattr(access.st, "get_option", config.get_option)
    found = access.visitor()
    assert found.role is Role.NOBODY and "secrets.toml cannot be read" in found.why
    assert "secrets.toml cannot be read" in str(closed("localhost"))


# --- from where -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "localhost:8501", "127.0.0.1:8501", "[::1]:8501", "127.0.0.1"])
def test_without_sign_in_this_machine_is_answered(host: str) -> None:
    assert closed(host) is None


@pytest.mark.parametrize("host", ["dash.example", "192.168.0.7:8501", "localhost.evil.example", "", None, "[::]", "0"])
def test_without_sign_in_nobody_else_is(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no sign-in" in str(closed(host))
    monkeypatch.setenv(access.OPEN, "1")
    assert closed(host) is None


@pytest.mark.parametrize("address", ["0.0.0.0", "", None, "192.168.0.7", "::"])
@pytest.mark.usefixtures("store")
def test_an_open_address_without_sign_in_shows_one_message(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    option = access.st.get_option
    monkeypatch.setattr(access.st, "get_option", lambda name: address if name == "server.address" else option(name))
    app = opened({}, secrets={})
    assert len(app.error) == 1 and "start it with GPTAILOR" in app.error[0].value.replace("\\", "")
    assert not app.button and not app.sidebar.markdown
    assert closed("localhost")
    monkeypatch.setenv(access.OPEN, "1")
    assert opened({}, secrets={}).sidebar.markdown


# --- what a viewer may do ---------------------------------------------------------------------------------------------


def tick_first(app: AppTest) -> AppTest:
    key = run_table.table_key(readers.runs())
    app.session_state[key] = {"selection": {"rows": [0], "columns": [], "cells": []}}
    return app.run()


def click_through(app: AppTest, *labels: str) -> AppTest:
    for label in labels:
        found = button(app, label)
        found.proto.disabled = False  # AppTest is as honest as a browser; a forger is not
        found.click().run()
        assert not app.exception
    return app


@pytest.fixture(params=["viewer", "read-only"])
def looker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., AppTest], str]:
    """(opens a page for somebody who may only look, why they may not do more)."""
    if request.param == "viewer":
        return lambda *a, **k: opened(person("bob@lab.example"), *a, **k), NOT_AN_OPERATOR
    monkeypatch.setenv(access.READ_ONLY, "1")
    return lambda *a, **k: opened({}, *a, secrets={}, **k), access.IS_READ_ONLY  # type: ignore[misc]


def test_a_looker_sees_everything_and_changes_nothing(store: Path, looker: Any) -> None:
    look, why = looker
    folder = make_run(store, "mine", n_trials=12, status=RunStatus.STOPPED)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    app = tick_first(look())
    for label in ("Name, note", "Delete"):
        assert button(app, label).disabled and button(app, label).help == why
    assert not app.file_uploader and app.get("download_button")

    for page, labels in (
        ("pages/2_Progress.py", ("Resume",)),
        ("pages/7_Models.py", ("Export as", "Generate")),
        ("pages/1_Launch.py", ("Start the search",)),
    ):
        app = look(page, run=folder.run_id)
        for label in labels:
            assert button(app, label).disabled
        click_through(app, *labels)  # Streamlit drops events of disabled widgets before they reach us
    assert why.split(";")[0] in app.info[0].value.replace("\\", "")
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert [found.run_id for found in readers.runs()] == [folder.run_id] and not (store.parent / "exports").exists()


def test_rights_lost_since_the_page_was_drawn_are_lost(store: Path) -> None:
    folder = make_run(store, "mine", n_trials=12, status=RunStatus.STOPPED)
    for page, label in (
        ("pages/2_Progress.py", "Resume"),
        ("pages/7_Models.py", "Export as"),
    ):
        app = opened(person("ada@lab.example"), page, run=folder.run_id)
        app.user = person("bob@lab.example")
        click_through(app, label)
        assert any("Only operators" in found.value for found in app.error), label
    assert not is_alive(folder) and not (store.parent / "exports").exists()
    assert [(line["who"], line["action"], line["run"], line["outcome"]) for line in log(store)] == [
        ("bob@lab.example", action, folder.run_id, f"refused: {NOT_AN_OPERATOR}") for action in ("resume", "export")
    ]


def test_a_link_asks_for_nothing(store: Path) -> None:
    folder = make_run(store, "mine", n_trials=4)
    app = opened(person("ada@lab.example"), "pages/2_Progress.py", run="../../etc", action="delete", config="-1;DROP")
    assert "which is not saved here" in app.warning[0].value and folder.path.exists()
    assert [(line["action"], line["run"], line["outcome"]) for line in log(store)] == [
        ("open", "../../etc", "refused: no run has such a name")
    ]


def every_action() -> None:
    """Each action by its own name, as if no page stood before it."""
    import streamlit as st

    from gptailor.dashboard import actions, form, readers
    from gptailor.dashboard.jobs import job
    from gptailor.errors import UserError
    from gptailor.store.notes import Notes

    run = readers.runs()[0]
    spec = form.presets()[0].spec
    for act in (
        lambda: actions.start(spec),
        lambda: actions.check(spec),
        lambda: actions.pause(run),
        lambda: actions.extend(run, 10, None),
        lambda: actions.resume(run),
        lambda: actions.stop(run),
        lambda: actions.delete(run, readers.runs_root() / "x"),
        lambda: actions.describe(run, Notes("x", "", ())),
        lambda: actions.bring_in(memoryview(b"PK")),
        lambda: actions.begin(run, readers.runs_root() / "x", ["evaluate"], "x"),
        lambda: actions.cancel(job(run, "x")),
        lambda: actions.take(run),
        lambda: actions.report(run, lambda: b"a report"),
    ):
        try:
            act()
            st.text("done")
        except UserError as error:
            st.text(str(error))


ACTIONS = (
    "launch",
    "pause",
    "extend",
    "resume",
    "stop",
    "delete",
    "describe",
    "import",
    "evaluate",
    "cancel",
    "download",
    "report",
)


@pytest.mark.parametrize("user, may", [(person("bob@lab.example"), 2), (person("eve@else.where"), 0), (None, 0)])
def test_every_action_asks_by_itself(store: Path, user: dict[str, Any] | None, may: int) -> None:
    folder = make_run(store, "mine", n_trials=4)
    app = AppTest.from_function(every_action, default_timeout=90)
    app.secrets, app.user = dict(SECRETS), user or {"is_logged_in": False}
    app.run()
    assert not app.exception
    said = [element.value for element in app.text]
    assert said.count("done") == may and len(said) == len(ACTIONS) + 1
    lines = log(store)
    assert [line["action"] for line in lines] == list(ACTIONS)
    assert [line["outcome"] == "done" for line in lines] == [False] * 10 + [may == 2] * 2
    assert all(line["outcome"].startswith(("refused: ", "done")) for line in lines)
    assert folder.path.exists() and read_notes(folder).name == "" and not is_alive(folder)


def test_an_operator_may(store: Path) -> None:
    first, second = make_run(store, "first", n_trials=4), make_run(store, "second", n_trials=4)
    app = AppTest.from_function(every_action, default_timeout=90)
    app.secrets, app.user = dict(SECRETS), person("ada@lab.example")
    app.run()
    assert not app.exception and not second.path.exists() and first.path.exists()
    outcomes = {line["action"]: line["outcome"] for line in log(store)}
    assert outcomes["delete"] == "done" and outcomes["stop"].startswith("done: ")
    assert outcomes["launch"].startswith("done: 2") and outcomes["import"].startswith(
        "failed: upload.zip: is not a run"
    )
    for folder in (RunFolder.of(store, found.run_id) for found in readers.runs()):
        stop(folder, patience=1.0)


def test_the_shipped_example_stays_whoever_asks(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = make_run(tmp_path / "demo", "example", n_trials=4)
    before = sorted(path.name for path in demo.path.iterdir())
    app = AppTest.from_function(every_action, default_timeout=90)
    app.secrets, app.user = dict(SECRETS), person("bob@lab.example")
    monkeypatch.setitem(SECRETS["access"], "operators", ["@lab.example"])  # type: ignore[arg-type]
    monkeypatch.setattr("gptailor.dashboard.actions._launched_once", lambda _spec: demo)
    app.run()
    assert not app.exception and sorted(path.name for path in demo.path.iterdir()) == before
    stays = [line["action"] for line in log(store) if line["outcome"] == "refused: The shipped example stays as it is."]
    assert stays == ["pause", "extend", "resume", "stop", "delete", "describe"]


# checking.py writes what a check is to read, in a folder of its own; document.py is the command line's too.
DOORKEEPERS = {"actions.py", "audit.py", "checking.py", "document.py"}
CHANGES = {
    "launch": {"launch", "prepare", "start", "resume", "request", "stop", "delete_run", "start_job",
               "stop_job", "supervise"},
    "shutil": {"rmtree", "move", "copy", "copytree"},
    "os": {"remove", "rename", "replace", "unlink"},
}  # fmt: skip
CHANGING = {
    "import_run",
    "write_notes",
    "copy_run",
    "rmtree",
    "write_bytes",
    "write_text",
    "unlink",
    "export_tables",
}


def test_nothing_but_the_door_changes_anything() -> None:
    files = [*(ROOT / "gptailor/dashboard").rglob("*.py"), *(ROOT / "pages").glob("*.py"), ROOT / "streamlit_app.py"]
    for file in files:
        if file.name in DOORKEEPERS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "gptailor.launch.extend"), file.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in CHANGES.get(node.value.id, ()), f"{file.name}: {node.value.id}.{node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                assert name not in CHANGING, f"{file.name} calls {name}"


def test_every_page_asks_who_is_there_before_anything_else() -> None:
    for file in (*(ROOT / "pages").glob("*.py"), ROOT / "streamlit_app.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        first = min((c for c in calls if ast.unparse(c.func) != "st.App"), key=lambda call: call.lineno)
        assert ast.unparse(first.func) == "widgets.open_page", file.name


# --- the audit log ----------------------------------------------------------------------------------------------------


def test_no_value_forges_a_line(tmp_path: Path) -> None:
    nasty = 'a"}\n{"who": "b\u2028\x1b[31m' + "\u202e" + "x" * 1000
    audit.record(tmp_path / "new", nasty, "stop", nasty, nasty)
    text = (tmp_path / "new" / audit.NAME).read_text()
    assert text.count("\n") == 1 and text.isascii() and "\x1b" not in text and len(text) < 4 * audit.LONGEST + 300
    line = json.loads(text)
    assert set(line) == {"time", "who", "action", "run", "outcome"} and line["who"] == nasty[: audit.LONGEST]


def test_it_is_for_its_owner_alone_and_follows_no_link(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit.record(tmp_path, "a", "stop", "r", "done")
    assert stat.S_IMODE((tmp_path / audit.NAME).stat().st_mode) == 0o600
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / audit.NAME).symlink_to(tmp_path / "elsewhere")
    audit.record(tmp_path / "x", "mallory", "stop", "r", "done")
    assert not (tmp_path / "elsewhere").exists() and "mallory" in caplog.text


def _write_many(root: str, who: str) -> None:
    for number in range(100):
        audit.record(Path(root), who, "stop", str(number), "x" * 200)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(audit, "MAX_BYTES", 4000)
    yield


@pytest.mark.usefixtures("small_files")
def test_it_moves_on_by_size_and_loses_no_line_between(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), who)) for who in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    files = sorted(tmp_path.glob("audit.jsonl*"), key=lambda path: (len(path.name), path.name))
    assert len(files) == audit.KEPT_FILES + 1 and all(file.stat().st_size <= 4000 for file in files)
    lines = [json.loads(line) for file in reversed(files) for line in file.read_text().splitlines()]
    for who in ("a", "b"):
        numbers = [int(line["run"]) for line in lines if line["who"] == who]
        assert numbers == list(range(numbers[0], 100))  # but for the oldest, which went with their file
