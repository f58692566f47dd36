"""The text of run files and their like.

YAML read strictly, `key=value` changes, and what is wrong said in a person's words.

YAML lets a key stand twice and keeps the last one, so that a candidate or a budget would vanish without a word; here it
is refused. pydantic speaks of tuples and dictionaries, which a run file has not.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gptailor import shipped
from gptailor.errors import UserError
from gptailor.wording import gigabytes

MAX_BYTES = 256 * 1024
_WORDS = {
    "string_type": "must be text (in quotes, where YAML would read a number, a date or true)",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "tuple_type": "must be a list such as [A, B]",
    "dict_type": "must be keys with values, such as {NAME: VALUE}",
} | dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "must be a whole number")


class _Loader(yaml.SafeLoader):
    """Plain YAML whose keys stand once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        found = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in found.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return found


def read_text(path: Path, what: str) -> str:
    """The text of a file that a person wrote, or of a shipped one; what: "run file". Raises UserError."""
    path = shipped.find(path)
    if not path.is_file():
        raise UserError(f"{what} {path}: {'is a folder; name a YAML file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{what} {path}: larger than {gigabytes(MAX_BYTES)}; is it a {what}?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def load_yaml(text: str, where: str) -> Any:
    """Plain data of a YAML text. Raises UserError with the place of what is wrong."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}: not valid YAML{at}: {getattr(error, 'problem', None) or error}") from error


def apply_change(data: dict[str, Any], change: str) -> None:
    """Change one key in place: `budget.max=243`, `objectives.0.metric=acc`. Raises UserError where it has no place."""
    key, separator, value = change.partition("=")
    if not separator or not key:
        raise UserError(f"--set {change}: expected key=value, such as --set trials=60 or --set budget.max=243")
    *parents, last = key.split(".")
    here: Any = data
    for part in parents:
        here = _child(here, part, change)
    parsed = load_yaml(value, f"--set {key}")
    if isinstance(here, list):
        here[_index(here, last, change)] = parsed
    elif isinstance(here, dict):
        here[last] = parsed
    else:
        raise UserError(f"--set {change}: {'.'.join(parents)} is a single value, it has no {last!r}")


def _child(here: Any, part: str, change: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, change)]
    if not isinstance(here, dict):
        raise UserError(f"--set {change}: nothing is found under {part!r}")
    if here.get(part) is None:
        here[part] = {}
    return here[part]


def _index(here: list[Any], part: str, change: str) -> int:
    if not part.isdecimal() or int(part) >= len(here):
        raise UserError(f"--set {change}: {part!r} must be a list index from 0 to {len(here) - 1}")
    return int(part)


def explain(problem: Mapping[str, Any], keys_at: Callable[[Sequence[str]], Sequence[str]]) -> str:
    """One of pydantic's problems as `path: what is wrong, got VALUE`.

    keys_at: the keys that are accepted below a path's parts; of the whole file for none.
    """
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location) or "(whole file)"
    message, value = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"  {path}: unknown key{_did_you_mean(location[-1], keys_at(location[:-1]))}"
    if problem["type"] == "missing":
        return f"  {path}: is required but missing"
    if path == "(whole file)":
        return f"  {message}"
    if problem["type"] == "model_type":
        message = f"must be keys with values: {', '.join(keys_at(location))}"
    message = _WORDS.get(problem["type"], message).replace("Input should", "must").replace("after validation, ", "")
    return f"  {path}: {message[0].lower() + message[1:]}, got {_short(value)}"


def kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"


def _did_you_mean(key: str, accepted: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; accepted here: {', '.join(accepted)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
