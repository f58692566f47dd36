"""Who is looking at the dashboard, and what they may do.

With `[auth]` in Streamlit's secrets people sign in at their own provider (OIDC), and `[access]` beside it says who is a
viewer and who an operator. Without it nobody can be told from anybody, so the server answers on this machine alone.
Whatever is not said, or said wrongly, gives no rights. A page asks `enter`; every action asks `why_not` again
(actions.py), because a hidden button keeps nobody from sending its event.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from gptailor.wording import safe

OPEN, READ_ONLY = "GPTAILOR_OPEN", "GPTAILOR_READ_ONLY"
"""Environment variables of whoever starts the server."""
SIGNED_IN_SECONDS = 12 * 3600
"""Streamlit's cookie lasts 30 days; rights and groups are as old as the sign-in, so ours ends earlier."""
LEAST_SECRET = 32
MOST_UPLOADERS = 10_000
HOW_TO_OPEN = (
    "This dashboard has no sign-in, so it answers only on the machine it runs on. To open it, set up sign-in "
    f"([auth] in .streamlit/secrets.toml), or start it with {OPEN}=1 if something before it lets in only people who "
    "may start and delete runs. docs/deploy.md says how."
)


SIGN_IN_FIRST = "Sign in first."
IS_READ_ONLY = "This dashboard is read-only."
NOBODY_KNOWN, LOCAL, ANYBODY = "nobody", "local", "anybody"
"""Names of people who did not sign in: refused; at this machine; let in by whatever stands before the server."""


class Role(IntEnum):
    NOBODY = 0
    VIEWER = 1
    OPERATOR = 2


@dataclass(frozen=True)
class Visitor:
    """name: for the audit log. why: what stands between them and the role of an operator, as a sentence."""

    name: str
    role: Role
    why: str = ""


@dataclass(frozen=True)
class Rules:
    """Who has which role, as `[access]` says it: e-mail addresses, domains as `@example.org`, `group:NAME`."""

    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()
    groups_claim: str = "groups"

    def role(self, claims: Mapping[str, Any]) -> Role:
        """The role of somebody with these claims of an ID token. An e-mail counts if the provider has verified it."""
        marks = {f"group:{group}" for group in _as_list(claims.get(self.groups_claim))}
        email = str(claims.get("email") or "").lower()
        if claims.get("email_verified") is True and email.count("@") == 1:
            marks |= {email, "@" + email.partition("@")[2]}
        if marks & set(self.operators):
            return Role.OPERATOR
        return Role.VIEWER if marks & set(self.viewers) else Role.NOBODY


class Misconfigured(Exception):
    """The operator's settings cannot be what was meant; nobody gets in until they are."""


def read_rules(section: Any) -> Rules:
    """`[access]` of the secrets. Raises Misconfigured for everything that is not understood."""
    if not isinstance(section, Mapping):
        raise Misconfigured("[access] is missing: it names the operators and viewers")
    if unknown := set(section) - set(Rules.__dataclass_fields__):
        raise Misconfigured(f"[access] knows no {', '.join(sorted(unknown))}")
    people = {}
    for name in ("operators", "viewers"):
        entries = section.get(name, [])
        if not isinstance(entries, (list, tuple)) or not all(map(_is_entry, entries)):
            raise Misconfigured(f'[access] {name} is a list of "name@domain", "@domain" or "group:NAME"')
        people[name] = tuple(entry if entry.startswith("group:") else entry.lower() for entry in entries)
    return Rules(**people, groups_claim=str(section.get("groups_claim", Rules.groups_claim)))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, str) and (
        len(entry) > len("group:") if entry.startswith("group:") else entry.count("@") == 1 and entry[-1] != "@"
    )


def _as_list(claim: Any) -> list[Any]:
    return [claim] if isinstance(claim, str) else list(claim) if isinstance(claim, (list, tuple)) else []


# --- who is here ------------------------------------------------------------------------------------------------------


def visitor() -> Visitor:
    """Whoever this script runs for, judged anew on each call."""
    try:
        settings = _settings()
        if "auth" in settings:
            found = _signed_in(settings)
        elif problem := closed():
            found = Visitor(NOBODY_KNOWN, Role.NOBODY, problem)
        else:
            found = Visitor(ANYBODY if _is_open() else LOCAL, Role.OPERATOR)
    except Misconfigured as error:
        return Visitor(NOBODY_KNOWN, Role.NOBODY, f"This dashboard's settings are wrong: {error}.")
    if found.role is Role.OPERATOR and is_read_only():
        return replace(found, role=Role.VIEWER, why=IS_READ_ONLY)
    return found


def _signed_in(settings: Mapping[str, Any]) -> Visitor:
    if len(str(settings["auth"].get("cookie_secret", ""))) < LEAST_SECRET:
        raise Misconfigured(f"[auth] cookie_secret must be {LEAST_SECRET} or more random characters")
    rules, claims = read_rules(settings.get("access")), st.user.to_dict()
    issued = claims.get("iat")
    fresh = isinstance(issued, (int, float)) and time.time() - issued < SIGNED_IN_SECONDS
    if claims.get("is_logged_in") is not True or not fresh:
        return Visitor(NOBODY_KNOWN, Role.NOBODY, SIGN_IN_FIRST)
    name = str(claims.get("email") or claims.get("sub"))
    role = rules.role(claims)
    if role is Role.NOBODY:
        return Visitor(name, role, f"You are signed in as {name}, who has no rights here. Ask its operator.")
    why = "" if role is Role.OPERATOR else "Only operators can do this; you are signed in as a viewer."
    return Visitor(name, role, why)


def _settings() -> Mapping[str, Any]:
    """Streamlit's secrets; empty where there is no file of them. One that cannot be read must not mean "no sign-in"."""
    if st.secrets.load_if_toml_exists():
        return st.secrets
    if found := next((path for path in st.get_option("secrets.files") if Path(path).exists()), None):
        raise Misconfigured(f"{Path(found).name} cannot be read")
    return {}


def is_read_only() -> bool:
    return os.environ.get(READ_ONLY, "0") not in ("", "0")


def why_not(role: Role = Role.OPERATOR) -> str | None:
    """Why this visitor may not do what takes `role`; None where they may."""
    found = visitor()
    return None if found.role >= role else found.why


# --- from where -------------------------------------------------------------------------------------------------------


def closed(host: str | None = "localhost") -> str | None:
    """Why a request with this Host header is not answered, None where it is.

    Without sign-in both the server's address and the name that it was called by must be this machine's: the second
    keeps out proxies that nobody told us of, and pages elsewhere that give this machine a name of theirs.
    """
    try:
        if "auth" in _settings() or _is_open():
            return None
    except Misconfigured as error:
        return f"This dashboard's settings are wrong: {error}."
    here = _is_loopback(st.get_option("server.address")) and _is_loopback(_without_port(host))
    return None if here else HOW_TO_OPEN


def _is_open() -> bool:
    return os.environ.get(OPEN) == "1"


def _without_port(host: str | None) -> str:
    name, colon, port = (host or "").rpartition(":")
    return name.strip("[]") if colon and port.isdecimal() else (host or "").strip("[]")


def _is_loopback(address: str | None) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "").is_loopback
    except ValueError:
        return False


# --- uploads ----------------------------------------------------------------------------------------------------------

_uploaders: OrderedDict[str, None] = OrderedDict()


def expect_upload() -> None:
    """Take files from this browser tab from now on.

    Streamlit itself takes them from everybody who is connected, signed in or not, and keeps them in memory.
    """
    context = get_script_run_ctx()
    if context is not None:
        _uploaders[context.session_id] = None
        while len(_uploaders) > MOST_UPLOADERS:
            _uploaders.popitem(last=False)


def may_upload(session_id: str) -> bool:
    return session_id in _uploaders


# --- on the page ------------------------------------------------------------------------------------------------------


def enter() -> None:
    """Let a viewer in; stop the page for everybody else, with the one thing that they can do."""
    found = visitor()
    if found.role is not Role.NOBODY:
        return
    st.title("gptailor", anchor=False)
    if found.name != NOBODY_KNOWN:
        st.error(safe(found.why, 600), icon=":material/block:")
        st.button("Sign out", icon=":material/logout:", on_click=st.logout)
    elif found.why == SIGN_IN_FIRST:
        for provider in _providers(st.secrets["auth"]):
            name = "Sign in" if provider is None else f"Sign in with {safe(provider)}"
            st.button(name, icon=":material/login:", type="primary", on_click=st.login, args=(provider,), key=name)
    else:
        st.error(safe(found.why, 600), icon=":material/lock:")
    st.stop()


def _providers(auth: Mapping[str, Any]) -> list[str | None]:
    if "client_id" in auth:
        return [None]
    return [name for name, section in auth.items() if isinstance(section, Mapping) and "client_id" in section]


def badge() -> None:
    """Who is signed in and as what, where that is not "whoever sits here"."""
    found = visitor()
    if found.why == IS_READ_ONLY:
        st.caption(":material/lock: Read-only")
    if found.name not in (LOCAL, ANYBODY):
        st.caption(f":material/person: {safe(found.name)}, {found.role.name.lower()}")
        st.button("Sign out", icon=":material/logout:", type="tertiary", on_click=st.logout)
