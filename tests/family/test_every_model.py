"""The script that writes docs/models.md, on a dozen model types: what works, and what is refused by check."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers.every_model import Tried, Trying

DOCS = Path(__file__).resolve().parents[2] / "docs"
WORK = {
    "olmo2": "tree",
    "stablelm": "rows",
    "falcon": "rows",
    "mamba": "rows",
    "exaone_moe": "tree",
    "granitemoehybrid": "rows",
    "got_ocr2": "direct",
    "zamba": "rows",
    "rwkv": "rows",
}
REFUSED = {
    "minimax": "would be another one at place",
    "zaya": "they depend on their number, or on each other",
    "xlm": "only architectures whose layers form one list can be stitched",
    "marian": "config.json does not say how many layers there are",
}


@pytest.fixture(scope="module")
def trying(tmp_path_factory) -> Trying:
    return Trying(tmp_path_factory.mktemp("every"))


@pytest.mark.parametrize("model_type", WORK)
def test_what_works_is_scored_generates_and_is_exported(trying, model_type):
    tried = trying.attempt(model_type)
    assert (tried.result, tried.path) == ("works", WORK[model_type]), tried.why


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_shortened_is_refused_by_check(trying, model_type):
    tried = trying.attempt(model_type)
    assert tried.result == "refused" and REFUSED[model_type] in tried.why


def test_the_page_counts_and_lists():
    found = importlib.util.spec_from_file_location("write_models", DOCS / "write_models.py")
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    page = script.page_of(
        [Tried("a", "works", "tree"), Tried("b", "refused", why="x | y"), Tried("c", "works", "rows")]
    )
    assert "| works | 2 |\n| refused | 1 |\n| all | 3 |" in page
    assert "| `b` | refused |  | x \\| y |" in page
    assert script.rows_of(page)["b"] == Tried("b", "refused", why="x | y") and len(script.rows_of(page)) == 3
    shown = (DOCS / "models.md").read_text()
    assert script.page_of(list(script.rows_of(shown).values())) == shown, "made by the script, and by nobody's hand"
    assert all(f"| `{name}` | works | {path} |" in shown for name, path in WORK.items()), "the page is of this version"
    assert all(f"| `{name}` | refused |" in shown for name in REFUSED)
