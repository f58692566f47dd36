"""What scripts and notebooks ask for: the example of the documentation, as it stands, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gptailor
from gptailor import notebooks

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "notebooks.md"


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTAILOR_RUNS", raising=False)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    run, table = names["run"], names["table"]
    assert run.best in run.plans and run.best in run.front and len(run.tables.trials) == 2
    assert run.spec == names["spec"] and run.folder.root.resolve() == tmp_path / "data" / "runs"
    assert list(table.plan) == [name for name in ("dense", "shorter", "mixed", "searched") for _ in run.spec.objectives]
    assert set(table[table.plan == "dense"].retention) == {1.0} and set(table.n) == {30}
    assert (tmp_path / "mixed-model" / "model.safetensors").is_file()
    assert len(names["model"].get_decoder().layers) == names["family"].n_layers - 3


def test_a_saved_run_is_read_without_torch_or_smac() -> None:
    code = (
        "import sys, gptailor\n"
        "assert not {'torch', 'pandas', 'pydantic', 'duckdb'} & set(sys.modules), 'importing it costs nothing'\n"
        "run = gptailor.open_run('data/demo/run')\n"
        "assert run.best in run.front and len(run.judged()) and gptailor.make_plan(12, remove=[3]).removed == (3,)\n"
        "assert not {'torch', 'smac', 'streamlit', 'transformers', 'lm_eval'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_the_page_names_every_name() -> None:
    told = re.findall(r"^\| `(\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(gptailor.__all__) and set(told) <= set(dir(gptailor))
    assert all(getattr(gptailor, name).__doc__ for name in told)
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        gptailor.serach  # noqa: B018 (asking is the test)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"remove": [12]}, "layer 12 is none of the base's 12"),
        ({"sources": {-1: "math"}}, "layer -1 is none of the base's 12"),
        ({"remove": [3], "sources": {3: "math"}}, "layer 3 is removed and taken from math at once"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(gptailor.UserError, match=problem):
        gptailor.make_plan(12, **asked)


def test_a_plan_by_hand_says_what_was_asked() -> None:
    plan = gptailor.make_plan(5, remove=[1], sources={0: "base", 2: "math", 3: ["math", "code"]}, factor=0.25)
    assert plan.describe() == "0 base | 2 math | 3 math+code x0.25 | 4 base | removed 1"


def test_benchmarks_that_are_not_there_are_refused(tiny_family: Path, make_spec: Any) -> None:
    spec = make_spec(tiny_family)
    with pytest.raises(gptailor.UserError, match="the run file lists nothing under held_out"):
        notebooks._benchmarks(spec, "held_out")
    with pytest.raises(gptailor.UserError, match="expected one of objectives, held_out, selection, got 'all'"):
        notebooks._benchmarks(spec, "all")


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gptailor.UserError):
        gptailor.open_run("none", tmp_path)
