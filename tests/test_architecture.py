"""The house: imports point down only, the heavy libraries stay on their floors, and SQL lives in the store alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "pages").glob("*.py"))
SOURCES = [*sorted((ROOT / "gptailor").rglob("*.py")), *PAGES, ROOT / "streamlit_app.py"]

# First match wins: (module prefix, floor, third parties it may not touch).
FLOORS: list[tuple[str, float, set[str]]] = [
    ("gptailor.errors", 0, {"torch", "smac", "duckdb", "streamlit", "pandas"}),
    ("gptailor.shipped", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit", "numpy", "pandas", "pydantic"}),
    ("gptailor.spec", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit"}),
    ("gptailor.plan", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit", "numpy", "pandas"}),
    ("gptailor.runfile", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit", "numpy", "pandas", "pydantic"}),
    ("gptailor.trial", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit", "numpy", "pandas", "pydantic"}),
    ("gptailor.watch", 0, {"torch", "smac", "ConfigSpace", "duckdb", "streamlit", "numpy", "pandas", "pydantic"}),
    ("gptailor.pace", 1, {"smac", "ConfigSpace", "duckdb", "streamlit", "altair"}),
    ("gptailor.workers", 1, {"smac", "ConfigSpace", "duckdb", "streamlit"}),
    ("gptailor.space", 1, {"torch", "duckdb", "streamlit"}),
    ("gptailor.pareto", 1, {"torch", "duckdb", "streamlit", "smac", "altair"}),
    ("gptailor.published", 1, {"torch", "smac", "duckdb", "streamlit", "pandas"}),
    ("gptailor.mergekit_config", 1, {"torch", "smac", "duckdb", "streamlit", "mergekit"}),
    ("gptailor.family", 2, {"smac", "ConfigSpace", "duckdb", "streamlit", "lm_eval"}),
    ("gptailor.stitch", 2, {"smac", "ConfigSpace", "duckdb", "streamlit", "lm_eval"}),
    ("gptailor.evaluate", 2, {"smac", "ConfigSpace", "duckdb", "streamlit"}),
    ("gptailor.baselines", 2, {"smac", "ConfigSpace", "duckdb", "streamlit"}),
    ("gptailor.store", 2, {"torch", "smac", "ConfigSpace", "streamlit", "altair"}),
    ("gptailor.surrogate", 2.5, {"torch", "duckdb", "streamlit", "altair"}),
    ("gptailor.suggest", 2.5, {"torch", "duckdb", "streamlit", "altair"}),
    ("gptailor.replay", 2.7, {"torch", "smac", "ConfigSpace", "streamlit", "altair", "duckdb"}),
    ("gptailor.ledger", 2.4, {"smac", "streamlit", "altair", "duckdb", "distributed"}),
    ("gptailor.informative", 2.5, {"smac", "streamlit", "altair", "duckdb", "distributed"}),
    ("gptailor.scorer", 2.7, {"smac", "streamlit", "altair", "duckdb", "distributed"}),
    ("gptailor.recording", 3, {"smac", "streamlit", "altair", "duckdb"}),
    ("gptailor.cluster", 3, {"smac", "ConfigSpace", "streamlit", "altair", "duckdb"}),
    ("gptailor.search", 3, {"streamlit", "altair", "duckdb"}),
    ("gptailor.selection", 3, {"smac", "streamlit", "altair", "duckdb"}),
    ("gptailor.controls", 3, {"streamlit", "altair", "duckdb"}),
    ("gptailor.workbench", 2.5, {"smac", "streamlit", "altair", "duckdb"}),
    ("gptailor.progress", 1, {"torch", "smac", "duckdb", "streamlit"}),
    ("gptailor.schedule", 1, {"torch", "smac", "duckdb", "streamlit"}),
    ("gptailor.extend", 3.2, {"torch", "smac", "duckdb", "streamlit"}),
    ("gptailor.held_out", 3.2, {"smac", "duckdb", "streamlit"}),
    ("gptailor.judgement", 2.5, {"torch", "smac", "duckdb", "streamlit", "altair"}),
    ("gptailor.show", 3, {"torch", "smac", "duckdb", "streamlit"}),
    ("gptailor.memory", 3, {"smac", "duckdb", "streamlit"}),
    ("gptailor.check", 3.2, {"smac", "duckdb", "streamlit"}),
    ("gptailor.experiment", 3.2, {"torch", "smac", "duckdb", "streamlit"}),
    ("gptailor.take_home", 3.2, {"smac", "duckdb", "streamlit"}),
    ("gptailor.launch", 3, {"torch", "streamlit", "smac", "ConfigSpace", "duckdb", "altair"}),
    ("gptailor.interchange", 3, {"smac", "ConfigSpace", "streamlit", "duckdb"}),
    ("gptailor.__main__", 6, {"streamlit", "duckdb", "altair"}),
    ("gptailor.dashboard", 4, {"torch", "smac", "ConfigSpace", "lm_eval", "transformers", "duckdb"}),
    ("streamlit_app", 5, {"torch", "smac", "duckdb", "altair", "pandas"}),
    ("pages", 5, {"torch", "smac", "duckdb", "altair", "pandas"}),
]
# Besides pointing down, the dashboard may not reach the engine.
NOT_FOR_DASHBOARD = ("gptailor.search", "gptailor.family", "gptailor.stitch", "gptailor.evaluate", "gptailor.baselines")
SQL = re.compile(r"\b(SELECT\s.+\sFROM|INSERT INTO|CREATE TABLE|UPDATE\s\w+\sSET|DELETE FROM|ATTACH\s)", re.S)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> tuple[float, set[str]]:
    for prefix, floor, banned in FLOORS:
        if module == prefix or module.startswith(prefix + "."):
            return floor, banned
    return (0, set()) if module == "gptailor" else (-1, set())


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("gptailor")}
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if p.exists()], ids=module_name)
def test_floors(path: Path) -> None:
    module = module_name(path)
    floor, banned = floor_of(module)
    assert floor >= 0, f"{module} has no floor: add it to FLOORS"
    for name in imports_of(path):
        assert name.split(".")[0] not in banned, f"{module} may not import {name}"
        if name.startswith("gptailor"):
            assert floor_of(name)[0] <= floor, f"{module} (floor {floor}) imports {name} from a higher floor"
            if 4 <= floor < 6:  # the command line starts everything, engine and report alike
                assert not name.startswith(NOT_FOR_DASHBOARD), f"the dashboard's {module} may not import {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.exists()], ids=module_name)
def test_sql_is_in_the_store_alone(path: Path) -> None:
    if module_name(path).startswith("gptailor.store"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not SQL.search(node.value), f"SQL outside the store: {node.value[:80]!r}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pages_draw_through_the_dashboard(path: Path) -> None:
    assert "alt." not in path.read_text(encoding="utf-8"), "charts are built in gptailor/dashboard/charts.py"


def test_the_table_of_floors_names_every_module() -> None:
    table = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("## Floors")[1].split("## ")[0]
    named = set(re.findall(r"`(?:gptailor/)?([\w.]+)/?`", table))
    house = {p.name for p in (ROOT / "gptailor").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert house - named == {"__init__.py"}


def test_the_dashboard_imports_neither_torch_nor_smac_nor_dask() -> None:
    modules = [module_name(p) for p in SOURCES if module_name(p).startswith("gptailor.dashboard")]
    code = (
        f"import sys\nfor m in {modules!r}: __import__(m)\n"
        "bad = {'torch', 'smac', 'transformers', 'lm_eval', 'distributed', 'dask'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
