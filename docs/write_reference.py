"""Write docs/reference/ anew, from the fields of the run file and the command line's own parser: `make reference`.

What a key or an option means is said where it is defined, and nowhere else; tests say that these files are up to date.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from gptailor.__main__ import command_parser
from gptailor.spec.files import describe
from gptailor.spec.records import fields_of, record_of
from gptailor.spec.run import RunSpec

DOCUMENT_END = "...\n"  # YAML's, after a single value
FOLDER = Path(__file__).with_name("reference")
SCHEMA = "run-file.schema.json"
RUN_FILE = f"""# The run file

What a search is asked, as YAML. Every key is checked before anything starts; an unknown one is refused. Any key may be
changed on the command line, dotted where it stands below another: `--set trials=60 --set budget.max=243`. Paths count
from the folder the command is run in; those that begin with `data/` are also found among the files that travel with
gptailor.

Editors that read JSON schemas complete and check run files by [{SCHEMA}]({SCHEMA}). For VS Code's YAML extension, write
`# yaml-language-server: $schema=PATH` above the first key.
"""
COMMAND_LINE = """# The command line

`gptailor COMMAND`, or `python -m gptailor COMMAND`. `-h` after any command says what stands here. Commands end with 0
when done, with 1 when the run failed, with 2 when something asked is wrong (one line says what), and with 130 when
interrupted or stopped.
"""
END = "\nWritten by [docs/write_reference.py](../write_reference.py) (`make reference`) from the sentences in `{}`.\n"


def files() -> dict[str, str]:
    """Every file of docs/reference/ by its name."""
    return {
        "run-file.md": run_file() + END.format("gptailor/spec/"),
        SCHEMA: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        "command-line.md": command_line() + END.format("gptailor/__main__.py"),
    }


# --- the run file -----------------------------------------------------------------------------------------------------


class _Plain(GenerateJsonSchema):
    """Without titles that only repeat the names of keys, and with each description on one line."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 (pydantic's signature)
        return False

    def generate_inner(self, schema: Any) -> Any:
        found = super().generate_inner(schema)
        if "description" in found:
            found["description"] = " ".join(found["description"].split())
        return found


def json_schema() -> dict[str, Any]:
    """The run file's JSON schema (2020-12)."""
    return {"$schema": _Plain.schema_dialect} | RunSpec.model_json_schema(schema_generator=_Plain)


def keys(record: type[BaseModel] = RunSpec, above: str = "") -> Iterator[str]:
    """Every key of the run file, dotted."""
    for name, field in fields_of(record).items():
        yield above + name
        if below := record_of(field.annotation):
            yield from keys(below, f"{above}{name}.")


def run_file() -> str:
    """The page of keys: a table for the whole file and one for each kind of record in it."""
    schema = json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    sections: dict[str, list[str]] = {}  # name of a record -> the keys that hold it
    for key in keys():
        if name := _reference(_property(schema, key)):
            sections.setdefault(name, []).append(key)
    parts = [RUN_FILE, _table("", schema, definitions)]
    for name, holders in sections.items():
        if "properties" in definitions[name]:
            heading = " and ".join(f"`{key}`" for key in holders)
            parts += [f"\n## {heading}\n", f"{definitions[name]['description']}\n"]
            parts.append(_table(f"{holders[0]}.", definitions[name], definitions))
    return "\n".join(parts) + "\n"


def _property(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    here = schema
    for part in key.split("."):
        name = _reference(here)
        here = (schema["$defs"][name] if name else here)["properties"][part]
    return here


def _reference(schema: Any) -> str | None:
    """The name of the record, or of the set of words, that a property refers to, however deep."""
    if isinstance(schema, Mapping) and "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    forms = [*schema.get("anyOf", ()), *schema.get("oneOf", ())] if isinstance(schema, Mapping) else []
    below = [*forms, schema.get("items")] if isinstance(schema, Mapping) else []
    return next(filter(None, map(_reference, below)), None)


def _table(above: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    rows = ["| key | value | default | what it means |", "|---|---|---|---|"]
    for name, found in schema["properties"].items():
        default = _default(found["default"]) if "default" in found else "**required**"
        rows.append(f"| `{name}` | {_values(found, definitions)} | {default} | {describe(above + name)} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value in (None, [], {}):
        return "none"
    if isinstance(value, dict):
        return "its defaults"
    text = yaml.safe_dump(value, default_flow_style=True, width=200)
    return f"`{text.removesuffix(DOCUMENT_END).strip()}`"


def _values(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What may be written, in words."""
    if "$ref" in schema:
        found = definitions[_reference(schema) or ""]
        return "see below" if "properties" in found else _values(found, definitions)
    if forms := schema.get("anyOf") or schema.get("oneOf"):
        words = [_values(one, definitions) for one in forms if one.get("type") != "null"]
        return " or ".join(word for word in words if not (word == "whole number" and "number" in words))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        pair = schema.get("prefixItems")
        return "`[least, greatest]`" if pair else f"list of {_values(schema['items'], definitions)}"
    if schema["type"] == "object":
        return f"names, each with {_values(schema['additionalProperties'], definitions)}"
    word = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}[schema["type"]]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return word
    return f"{word}, {low:,} to {high:,}" if high is not None else f"{word}, {low} or more"


# --- the command line -------------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by its name, in the order of `gptailor --help`."""
    (found,) = (action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What a command takes, but for -h: first what must stand in its place, then options."""
    own = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return sorted(own, key=lambda action: bool(action.option_strings))


def written(action: argparse.Action) -> str:
    """An argument as it is written on the command line: `RUN_ID`, `--set KEY=VALUE`."""
    choices = "|".join(map(str, action.choices)) if action.choices else ""
    value = "" if action.nargs == 0 else str(action.metavar or choices or action.dest.upper())
    return " ".join(filter(None, [*action.option_strings[:1], value]))


def command_line() -> str:
    """The page of commands: a table of all of them, then each with what it takes."""
    found = commands()
    parts = [COMMAND_LINE, "| command | what it does |", "|---|---|"]
    parts += [f"| [`{name}`](#{name}) | {_cell(parser.description)} |" for name, parser in found.items()]
    for name, parser in found.items():
        asked = arguments(parser)
        must = [written(action) for action in asked if action.required]
        parts += [f"\n## {name}\n", f"{parser.description}\n", f"    gptailor {' '.join([name, *must, '[OPTIONS]'])}\n"]
        parts += ["| | |", "|---|---|", *(f"| `{_cell(written(a))}` | {_cell(a.help)} |" for a in asked)]
    return "\n".join(parts) + "\n"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
