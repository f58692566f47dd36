"""The reader's choices (which run, which configuration), which live in the URL.

A choice has one home, the URL, so that a link sent to a colleague opens the same view; session state only remembers it
between pages. Values from the URL are hostile until they are found among the runs or configurations that exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from gptailor.wording import plain


def chosen(name: str) -> str | None:
    """The reader's choice as text: from the URL, else as remembered. Not checked: match it against what exists."""
    return st.query_params.get(name) or st.session_state.get(f"choice.{name}")


def choose(name: str, value: str | int | None) -> None:
    """Keep a choice in the URL and for the pages to come; None forgets it."""
    if value is None:
        st.session_state.pop(f"choice.{name}", None)
        st.query_params.pop(name, None)
        return
    st.session_state[f"choice.{name}"] = str(value)
    if st.query_params.get(name) != str(value):
        st.query_params[name] = str(value)


def _adopt(name: str, key: str) -> None:
    choose(name, st.session_state[key])
    if name == "run":
        choose("config", None)


def select(
    name: str, label: str, options: Sequence[Any], shown: Callable[[Any], str], default: Any, help: str | None = None
) -> Any:
    """A select box whose value lives in the URL under `name`. Options are told apart by their text form in the URL."""
    by_text = {str(option): option for option in options}
    current = by_text.get(chosen(name) or "", default)
    key = f"select.{name}"
    st.session_state[key] = current
    st.selectbox(
        label, options, format_func=told_apart(options, shown), key=key, on_change=_adopt, args=(name, key), help=help
    )
    choose(name, current)
    return current


def told_apart(options: Sequence[Any], shown: Callable[[Any], str]) -> Callable[[Any], str]:
    """`shown`, with the option itself added where two show the same.

    Streamlit tells options apart by what they show.
    """
    labels = {option: shown(option) for option in options}
    times = Counter(labels.values())

    def label(option: Any) -> str:
        words = labels.get(option, str(option))
        return words if times[words] < 2 else f"{words}  ·  {plain(option, 120)}"

    return label
