"""The house: imports point down only, the heavy libraries stay on their floors, and SQL lives in the store alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "pages").glob("*.py"))
SOURCES = [*sorted((ROOT / "gptailor").rglob("*.py")), *PAGES, ROOT / "streamlit_app.py"]


@dataclass(frozen=True)
class Layer:
    """Rooms of one height: they may import lower ones, and nothing of each other. without: libraries kept out."""

    name: str
    rooms: tuple[str, ...]
    without: frozenset[str]


def layer(name: str, rooms: str, without: str) -> Layer:
    return Layer(name, tuple(rooms.split()), frozenset(without.split()))


PLAIN = "torch smac ConfigSpace duckdb streamlit altair pandas"
LAYERS = (
    layer(
        "words and arithmetic",
        "errors trial measures threads heap versions wording shipped stopwatch",
        "smac ConfigSpace duckdb streamlit altair pandas",
    ),
    layer("plans and the text of run files", "plan runfile", PLAIN + " numpy pydantic"),
    layer("what is asked", "spec", PLAIN),
    layer("what is on disk", "store family schedule", "smac ConfigSpace streamlit altair"),
    layer("the method's parts", "launch stitch evaluate", "smac ConfigSpace duckdb streamlit altair"),
    layer(
        "what came of it, rivals, others' formats",
        "results baselines formats heal",
        "smac ConfigSpace duckdb streamlit",
    ),
    layer("who scores, who looks", "scoring redundancy dashboard", "smac ConfigSpace duckdb"),
    layer("the engine, commands, pages", "search commands pages streamlit_app", "duckdb altair"),
    layer("the command line, notebooks", "__main__ notebooks", "torch smac duckdb streamlit altair"),
)
"""From the ground up: the whole order, of which docs/how-it-works.md shows the table."""
WITHOUT = {  # beside what their layer keeps out
    "store": "torch",
    "family": "duckdb lm_eval",
    "stitch": "lm_eval",
    "launch": "torch",
    "results": "torch transformers lm_eval",
    "scoring": "streamlit altair",
    "dashboard": "torch lm_eval transformers",
    "search": "streamlit",
    "commands": "smac streamlit",
    "pages": "torch smac pandas",
    "streamlit_app": "torch smac pandas",
}
NOT_FOR_DASHBOARD = ("family", "stitch", "evaluate", "baselines", "formats", "heal", "scoring", "search", "commands")
SQL = re.compile(r"\b(SELECT\s.+\sFROM|INSERT INTO|CREATE TABLE|UPDATE\s\w+\sSET|DELETE FROM|ATTACH\s)", re.S)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The part of the house that a module stands in: a package's or a flat module's name."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gptailor" and len(parts) > 1 else parts[0]


def height_of(room: str) -> int:
    heights = [height for height, layer in enumerate(LAYERS, start=1) if room in layer.rooms]
    assert len(heights) == 1, f"{room} stands in {len(heights)} layers: put it into one of LAYERS"
    return heights[0]


def imports_of(path: Path, types: bool = True) -> set[str]:
    """types: those under `if TYPE_CHECKING` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = (
        set() if types else {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    )
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("gptailor")}
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if p != ROOT / "gptailor" / "__init__.py"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    height = height_of(room)
    banned = LAYERS[height - 1].without | set(WITHOUT.get(room, "").split())
    for name in imports_of(path):
        assert name.split(".")[0] not in banned, f"{module} may not import {name}"
        other = room_of(name)
        if (
            name.startswith("gptailor.")
            and other != room
            and (ROOT / "gptailor" / other).with_suffix(".py").exists() | (ROOT / "gptailor" / other).is_dir()
        ):
            assert height_of(other) < height, f"{module} (layer {height}) imports {name} (layer {height_of(other)})"
            if room in ("dashboard", "pages", "streamlit_app"):
                assert other not in NOT_FOR_DASHBOARD, f"the dashboard's {module} may not import {name}"


def test_no_circles() -> None:
    """Imports inside functions count like any other; those for type checkers alone are not made at run time."""
    modules = {module_name(path): path for path in SOURCES}
    arrows = {
        name: {other for other in imports_of(path, types=False) if other in modules} - {name}
        for name, path in modules.items()
    }
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_packages_bring_nothing() -> None:
    """A package's __init__ is a docstring: nobody pays for a neighbour."""
    for path in (ROOT / "gptailor").rglob("__init__.py"):
        if path.parent != ROOT / "gptailor":
            (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr), path


@pytest.mark.parametrize("path", list(SOURCES), ids=module_name)
def test_sql_is_in_the_store_alone(path: Path) -> None:
    if module_name(path).startswith("gptailor.store"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not SQL.search(node.value), f"SQL outside the store: {node.value[:80]!r}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pages_draw_through_the_dashboard(path: Path) -> None:
    assert "alt." not in path.read_text(encoding="utf-8"), "charts are built in gptailor/results/charts"


def test_the_docs_show_the_layers() -> None:
    table = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("## Layers")[1].split("## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if re.match(r"\| \d", line)
    ]
    shown = [(int(number), name, set(re.findall(r"`([\w.]+?)(?:\.py|/)?`", rooms))) for number, name, rooms, _ in rows]
    assert shown == [
        (height, layer.name, set(layer.rooms)) for height, layer in reversed([*enumerate(LAYERS, start=1)])
    ]
    house = {p.stem for p in (ROOT / "gptailor").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert house - {"__init__"} == {room for layer in LAYERS for room in layer.rooms} - {"pages", "streamlit_app"}


def test_the_dashboard_imports_neither_torch_nor_smac_nor_dask() -> None:
    modules = [module_name(p) for p in SOURCES if module_name(p).startswith("gptailor.dashboard")]
    code = (
        f"import sys\nfor m in {modules!r}: __import__(m)\n"
        "bad = {'torch', 'smac', 'transformers', 'lm_eval', 'distributed', 'dask'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
