"""Pages of a run with a range of sizes: quality against size first, and the best plan of each size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.make_runs import make_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import readers
from gptailor.dashboard.run_table import listing
from gptailor.results import scores
from gptailor.store import queries
from gptailor.store.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "eight", n_trials=40, n_removed=8, run_id="eight")
    return make_run(root, "range", n_trials=90, n_removed=12, fewest_removed=4, run_id="range", failures=0.0)


@pytest.fixture(autouse=True)
def _runs(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("GPTAILOR_RUNS", str(folder.root))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "no-demo")
    yield


def visit(page: str, **choices: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60)
    for name, value in choices.items():
        app.query_params[name] = value
    app.switch_page(page).run()
    assert not app.exception, app.exception[0].message
    return app


def words(app: AppTest) -> str:
    shown = [*app.markdown, *app.caption, *app.info]
    return "\n".join(element.value for element in shown).replace("\\", "").replace("\u2060", "")


def test_trade_offs_draw_quality_against_size(folder: RunFolder) -> None:
    app = visit("pages/4_Trade-offs.py", run="range")
    assert [app.selectbox(key=f"select.{key}").value for key in ("x", "y")] == ["Layers kept", "Mean retention"]
    assert "30 → 18 to 26 layers" in words(app) and "The best plan of each size" in words(app)
    best = scores.best_of_sizes(queries.read_run(folder))
    (table,) = [frame.value for frame in app.dataframe if "Layers kept" in frame.value.columns][:1]
    assert table["Plan"].tolist() == [f"Plan {config}" for config in best["config_id"]]
    assert "Layers kept" in [slider.label.replace("\\", "") for slider in app.slider]
    for index in range(2):  # of the objectives: what is left to choose by is size
        app.slider(key=f"weight.{index}").set_value(0.0)
    app.run()
    shortest = queries.read_run(folder).kept_layers.min()
    chosen = next(text for text in words(app).splitlines() if text.startswith("With these weights"))
    tables = queries.read_run(folder)
    assert tables.kept_layers[int(chosen.split("plan ")[1].split("*")[0])] == shortest
    names = app.selectbox(key="select.config").options
    assert sum("layers, the best of them" in name for name in names) == len(best)


def test_compare_has_a_row_a_size() -> None:
    app = visit("pages/6_Compare.py", runs="range,eight")
    assert "of the best plan of each size" in words(app)
    assert [app.selectbox(key=f"select.{key}").value for key in ("x", "y")] == ["Layers kept", "Mean retention"]


@pytest.mark.parametrize("page", ["2_Progress", "3_Fidelity", "5_Layers", "7_Models"])
def test_every_other_page_opens(page: str) -> None:
    assert "30 → 18 to 26 layers" in words(visit(f"pages/{page}.py", run="range"))


def test_the_table_of_runs_says_the_range() -> None:
    assert {row["layers"] for row in listing(readers.runs(), {}).to_dict("records")} == {"4 to 12 of 30", "8 of 30"}
