"""Parts of a page that look again by themselves.

They have no parts of their own within. Where a poll overtakes the page's first run, Streamlit (1.67) drops what the
outer part had still to send and sends the inner one's, whose place is then missing: the browser's page stays empty.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec

import streamlit as st

P = ParamSpec("P")
_polled: ContextVar[bool] = ContextVar("polled", default=False)


def poll(seconds: float | None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorates a part of a page that is run again every so many seconds; None: only when somebody clicks in it."""

    def decorate(part: Callable[[], None]) -> Callable[[], None]:
        @wraps(part)
        def polled() -> None:
            token = _polled.set(seconds is not None)
            try:
                part()
            finally:
                _polled.reset(token)

        return st.fragment(polled, run_every=seconds)

    return decorate


def apart(part: Callable[P, None]) -> Callable[P, None]:
    """Decorates what is run again without the page around it when somebody clicks in it, unless that polls."""
    alone = st.fragment(part)

    @wraps(part)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        (part if _polled.get() else alone)(*arguments, **named)

    return run
