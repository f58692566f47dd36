"""The documentation holds together: links lead somewhere, every page is reachable, what is quoted is in the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from gptailor.__main__ import command_parser
from gptailor.launch.devices import Device
from gptailor.scoring.memory import Memory, predict_memory
from gptailor.spec.files import load_spec
from gptailor.store.tables import known_tables

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
OURS = [page for page in PAGES if page.parent != DOCS / "reference"]
"""Written by hand; docs/reference/ is generated from sentences that stand in the code."""
LONGEST_SENTENCE = 40
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_PLACE = re.compile(r"`([\w./-]+\.(?:py|sh|sql)|[\w./-]+/[\w.-]+\.yaml)`")
_QUOTE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _CODE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link of a page that leads to a file of the repository."""
    found = (link.partition("#")[::2] for link in _LINK.findall(prose(page)) if not re.match(r"\w+:", link))
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in found]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(page: Path) -> Iterator[str]:
    """Outside tables, headings and code. A link counts as its text, a stretch of code as one word."""
    text = re.sub(r"`[^`\n]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose(page)))
    lines = ("" if re.match(r"\s*[|#]", line) else line for line in text.splitlines())
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
        yield from re.split(r"(?<=[.!?])[)*\"]*\s+", paragraph.strip())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {name(target)}#{anchor}"


def test_every_file_is_reachable_from_the_entrance() -> None:
    reached, waiting = set[Path](), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        if page.suffix == ".md" and page.is_relative_to(ROOT):
            waiting += [target for target, _ in links(page) if target.is_file() and target not in reached]
    files = {path for path in DOCS.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert sorted(name(path) for path in files - reached) == []


@pytest.mark.parametrize("page", OURS, ids=name)
def test_sentences_are_short(page: Path) -> None:
    long = [text for text in sentences(page) if len(re.findall(r"\S*\w\S*", text)) > LONGEST_SENTENCE]
    assert long == []


@cache
def names_of_code() -> frozenset[str]:
    return frozenset(path.name for folder in ("gptailor", "tests", "pages") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """Paths count from the repository or from the package; a bare name may be in any of their folders."""
    named = _PLACE.findall(prose(page))
    missing = [place for place in named if not any((root / place).exists() for root in (ROOT, ROOT / "gptailor"))]
    missing = [place for place in missing if "/" in place or place not in names_of_code()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_one(page: Path) -> None:
    """Commands and options in blocks of code are understood by the command line's own parser."""
    for _, block in _CODE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if asked := re.match(r"(?:python -m )?gptailor +(.*)", line.strip()):
                words = ["1" if word == "CONFIG_ID" else word for word in shlex.split(asked[1], comments=True)]
                try:
                    command_parser().parse_args(words)
                except SystemExit as ended:
                    assert ended.code == 0, f"{name(page)}: {line}"


def rows(page: Path) -> list[list[str]]:
    """Cells of every row of a page's tables."""
    lines = re.findall(r"^\|(?! *-+ *\|)(.*)\|$", prose(page), re.MULTILINE)
    return [[cell.strip(" *") for cell in line.split("|")] for line in lines]


def test_the_readme_says_what_the_verdict_says() -> None:
    verdict = {row[0]: row[2:] for row in rows(DOCS / "proof.md") if len(row) == 4}
    names, held_out, ahead = rows(ROOT / "README.md")[:3]
    for name, *said in list(zip(names, held_out, ahead, strict=True))[1:5]:
        assert verdict[name] == said


def test_the_store_page_has_every_table_and_column() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", prose(DOCS / "store.md"), re.DOTALL | re.MULTILINE))
    told = {table: re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE) for table, text in sections.items()}
    short = {"TIMESTAMP WITH TIME ZONE": "TIMESTAMPTZ"}
    there = {
        table: [(column, short.get(kind, kind)) for column, kind in made.columns.items()]
        for table, made in known_tables().items()
    }
    assert {table: told.get(table) for table in there} == there


def test_the_queries_of_the_store_page_answer_what_they_say() -> None:
    page = (DOCS / "store.md").read_text(encoding="utf-8")
    best, layers = [block for kind, block in _CODE.findall(page) if kind == "sql"]
    with duckdb.connect(str(ROOT / "data" / "demo" / "run" / "run.duckdb"), read_only=True) as con:
        config_id, retention = con.execute(best).fetchall()[0]
        assert (config_id, round(retention, 3)) == (2, 1.034)  # as `show` says of the shipped run
        of_best = [row for row in con.execute(layers).fetchall() if row[0] == config_id]
    assert [row[1] for row in of_best if row[2] == "removed"] == [5, 7, 8]


@pytest.mark.slow
def test_the_gpu_page_says_what_check_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B by its shapes: 32 layers of 4096 units, MLP of 11008, 32,000 tokens; three full fine-tunes."""
    width, mlp, vocabulary, n_layers = 4096, 11008, 32000, 32
    layer = 4 * width**2 + 3 * width * mlp + 2 * width
    n = n_layers * layer + 2 * vocabulary * width + width
    models = {"base": 2 * n, **dict.fromkeys(("math", "chat", "code"), 2 * n_layers * layer)}
    family: Any = SimpleNamespace(  # as much of a preflight as is asked for
        model_bytes=models,
        distinct_bytes=sum(models.values()),
        vocab_size=vocabulary,
        hidden_size=width,
        n_parameters=n,
        layer_parameters=[layer] * n_layers,
    )
    import_module("gptailor.family.models")  # before: what takes the name while it is another's would keep that
    monkeypatch.setattr("gptailor.family.residence.pick_devices", lambda _: ["cuda:0"])

    def predicted(gigabytes: int) -> Memory:
        size = gigabytes << 30
        card = Device("cuda:0", "a card", size - 500_000_000, size)
        monkeypatch.setattr("gptailor.scoring.memory.free_devices", lambda: [card])
        return predict_memory(load_spec("data/presets/llama-2-7b.yaml"), family)

    said = {row[0]: row[1] for row in rows(DOCS / "gpus.md")}
    parts = predicted(24).parts
    named = {"base": "base", "three candidates' layers": "candidates", "working memory": "working memory"}
    assert {row: said[row] for row in named} == {row: f"{parts[part] / 1e9:.2f} GB" for row, part in named.items()}
    assert said["merged layers, a cache"] == f"{parts['merged layers'] / 1e9:.2f} GB at most"
    assert said["needed on the card"] == f"{(sum(parts.values()) - parts['candidates']) / 1e9:.2f} GB"
    for gigabytes in (16, 24, 80):
        assert predicted(gigabytes).verdict.startswith(f"{said[f'{gigabytes} GB']}:")
    assert predicted(48).verdict.startswith(f"{said['24 GB']}:")


@cache
def trees_of_the_code() -> tuple[ast.Module, ...]:
    files = [*(ROOT / "gptailor").rglob("*.py"), *(ROOT / "pages").glob("*.py")]
    return tuple(ast.parse(file.read_text(encoding="utf-8")) for file in files)


def text_of(node: ast.AST) -> str:
    """A text in the code, `…` where a value is put in; empty for any other node."""
    match node:
        case ast.Constant(value=str(value)):
            return re.sub(r"%\w", "…", value)
        case ast.JoinedStr(values=parts):
            return re.sub("…+", "…", "".join(text_of(part) or "…" for part in parts))
        case _:
            return ""


def raised() -> Iterator[str]:
    """Texts of UserError and of the store's kinds of it."""
    for node in (node for tree in trees_of_the_code() for node in ast.walk(tree)):
        match node:
            case ast.Call(func=ast.Name(id=kind), args=[text, *_]) if re.fullmatch(r"UserError|Store[A-Z]\w+", kind):
                yield text_of(text)


def quotes() -> list[str]:
    return [told.strip(" …") for told in _QUOTE.findall(prose(DOCS / "troubleshooting.md"))]


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    said = "\0".join(text_of(node) for tree in trees_of_the_code() for node in ast.walk(tree))
    assert [told for told in quotes() if told not in said] == []


def test_hardly_a_message_is_missing_from_the_troubleshooting_page() -> None:
    """One in twenty may be too plain to need a word."""
    messages = [text for text in raised() if text.strip("… :")]
    missing = [text for text in messages if not any(told in text for told in quotes())]
    assert len(messages) > 150 and len(missing) <= len(messages) / 20, missing
