"""What a benchmark's task file may not do: run code.

An lm-eval task file is YAML, but `!function` imports and calls Python beside it, a metric of Hugging Face's `evaluate`
(where lm-eval looks for any name that it does not know) or a pickled data set brings its own code, and some tasks
execute what the model wrote. lm-eval's own package is trusted as installed; any other folder, this project's own
included, is data until the operator of the machine says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gptailor.errors import UserError

ALLOW_VARIABLE = "GPTAILOR_ALLOW_TASK_CODE"
"""Environment variable by which the operator of a machine allows task files that run code (set to 1)."""
_PICKLED = {"pandas"}  # dataset builders that unpickle what they read


def code_is_allowed() -> bool:
    return os.environ.get(ALLOW_VARIABLE) == "1"


def check_task_file(path: Path, trusted: Path) -> None:
    """Refuse a task file (or one that it includes) which would run code. Reads text only. Raises UserError.

    `trusted` is lm-eval's own folder of tasks: files in it are as trustworthy as the installed package.
    """
    for file in _with_includes(path.resolve(), set()):
        if file.is_relative_to(trusted.resolve()):
            continue
        reason = _reason_to_refuse(file)
        if reason and not code_is_allowed():
            raise UserError(
                f"benchmark file {file}: {reason}. Files outside lm-eval's own package may hold data only; "
                f"an operator who trusts them can set {ALLOW_VARIABLE}=1 on this machine"
            )


def _reason_to_refuse(file: Path) -> str | None:
    content = _plain(file)
    for event in yaml.parse(file.read_text(encoding="utf-8")):
        tag = getattr(event, "tag", None)
        if tag is not None and (not tag.startswith("tag:yaml.org,2002:") or "python" in tag):
            line = event.start_mark.line + 1 if event.start_mark else "?"
            return f"it names `{tag}` on line {line}, which runs Python code"
    for part in _dicts(content):  # a group's file may define tasks inside it
        if part.get("dataset_path") in _PICKLED:
            return f"its dataset_path `{part['dataset_path']}` reads pickled files, which can run code"
        for metric in _listed(part.get("metric_list")):
            if isinstance(metric, dict) and _is_fetched(metric):
                return f"its metric `{metric.get('metric')}` loads a program from the hub: it is not one of lm-eval's"
    return None


def _is_fetched(metric: dict[str, Any]) -> bool:
    """Whether lm-eval would look for a metric's program elsewhere."""
    import lm_eval.api.metrics  # noqa: F401, fills the registry
    from lm_eval.api.registry import metric_registry

    name = metric.get("metric")
    return bool(metric.get("hf_evaluate")) or not isinstance(name, str) or name not in metric_registry


def _with_includes(path: Path, seen: set[Path]) -> Iterator[Path]:
    if path in seen:
        return
    seen.add(path)
    yield path
    for part in _dicts(_plain(path)):
        for include in _listed(part.get("include")):
            yield from _with_includes((path.parent / str(include)).resolve(), seen)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in plain data, however deep, each once (YAML's aliases can make a list its own member)."""
    todo, seen = [value], set()
    while todo:
        part = todo.pop()
        if not isinstance(part, (dict, list)) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            yield part
        todo += part.values() if isinstance(part, dict) else part


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class _Plain(yaml.SafeLoader):
    """Reads any tag as nothing, so that a file can be looked at before it is trusted."""


_Plain.add_multi_constructor("", lambda _loader, _suffix, _node: None)


def _plain(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"benchmark file {path}: cannot be read: {reason}") from error
    return content if isinstance(content, dict) else {}


def use_sandboxed_templates() -> None:
    """Render task files' Jinja templates in Jinja's sandbox, compiled once each; lm-eval does neither. Same results."""
    from functools import lru_cache

    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    sandbox.from_string = lru_cache(maxsize=1024)(sandbox.from_string)  # type: ignore[method-assign,assignment]
    utils.env = sandbox
