"""The drawing step of the pages on encodings.

What is drawn along which axis, in which unit, told by what besides colour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from helpers.make_runs import PERPLEXITY, make_run
from helpers.redundant import family_of, model_of

from gptailor.results.charts import compare as compare_charts
from gptailor.results.charts import fidelity as fidelity_charts
from gptailor.results.charts import files, theme
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import progress as progress_charts
from gptailor.results.charts import ratios as ratio_charts
from gptailor.results.charts import redundancy as redundancy_charts
from gptailor.results.charts import tradeoffs as front_charts
from gptailor.results.frames import compare, fidelity, layers, progress, redundancy, tradeoffs
from gptailor.results.frames.importance import importance
from gptailor.results.frames.view import View
from gptailor.results.redundancy import Agreement
from gptailor.store import queries

FAMILY = family_of(model_of([0.5, 0.99, 0.98, 0.97]), model_of([0.5, 0.99, 0.6, 1.01], 0.9), cosine=-0.4)
HOSTILE = "</script><script>alert(1)</script> [x](y) datum.z"


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    folder = make_run(
        tmp_path_factory.mktemp("charts"),
        "a run",
        n_trials=90,
        benchmarks=("piqa", f"{HOSTILE}/acc", f"wiki/{PERPLEXITY}"),
    )
    return View(queries.read_run(folder))


@pytest.fixture(scope="module")
def drawn(view: View) -> dict[str, Any]:
    """Every chart of the analysis pages, by name."""
    facts, trials, plans = view.facts, view.trials, view.plans
    best = int(plans["config_id"].iloc[0])
    axes = {axis.column: axis for axis in tradeoffs.axes(view.tables, plans, facts)}
    x, y = axes["piqa/acc_norm"], axes[f"wiki/{PERPLEXITY}"]
    so_far = progress.best_so_far(trials, facts)
    one = layers.strip(view.layers, best)
    runs = compare.entries([("one", view), (HOSTILE, view)])
    labels = [entry.label for entry in runs]
    found = importance(view.layers, trials, facts)
    assert found is not None
    origins, everybody = compare.best_origins(runs)
    ends = tradeoffs.ends(plans, facts)
    return {
        "best": progress_charts.best_so_far(so_far, "trials", "Mean retention", True),
        "best by hours": progress_charts.best_so_far(so_far, "hours", "Mean score", False),
        "hypervolume": progress_charts.hypervolume_so_far(so_far, "hours"),
        "timeline": progress_charts.timeline(progress.timeline(trials, None), facts.rungs),
        "workers": progress_charts.worker_lanes(progress.worker_lanes(trials.assign(worker="cpu-1 + cpu-2"))),
        "seconds": progress_charts.seconds(
            pd.DataFrame([("start", 2.0, 0.25), ("score", 6.0, 0.75)], columns=["part", "seconds", "share"])
        ),
        "shares": fidelity_charts.shares(fidelity.share_rows(fidelity.rung_shares(trials, facts)), facts.rungs),
        "ladder": fidelity_charts.ladder(
            fidelity.ladder_rows(fidelity.ladder(trials, facts), facts), facts.rungs, "Mean retention", True
        ),
        "agreement": fidelity_charts.agreement(fidelity.agreement(trials, facts), facts.names, "Mean retention"),
        "moves": fidelity_charts.rank_moves(fidelity.rank_moves(trials, 111, 1000), 111, 1000),
        "front": front_charts.front(tradeoffs.front(plans, x, y), x, y, best),
        "parallel": front_charts.parallel(tradeoffs.parallel(plans, facts, best), ends, "Mean retention", True),
        "scores": front_charts.scores_at_rungs(tradeoffs.scores_of(trials, facts, best), facts.rungs, True),
        "origins": layer_charts.origins(layers.origin_grid(view.layers, plans.head(5), facts), facts),
        "strip": layer_charts.strip(one, facts),
        "left": layer_charts.left_of_layers(layers.left_of_layers(one.assign(heads=1.0, channels=0.5, weights=0.7))),
        "lanes": layer_charts.lanes(layers.strip_sources(one, view.tables.layers, facts), facts),
        "frequencies": layer_charts.frequencies(layers.frequencies(view.layers, plans["config_id"], facts), facts),
        "importance": layer_charts.importance(found.rows, facts.names),
        "undo": layer_charts.undo_one(layers.undo_one(view.layers, trials, best), facts),
        "costs": redundancy_charts.costs(redundancy.by_layer(FAMILY)),
        "influence": redundancy_charts.influence(redundancy.by_layer(FAMILY)),
        "distances": redundancy_charts.distances(redundancy.by_layer(FAMILY)),
        "pairs": redundancy_charts.agreement(redundancy.agreement(FAMILY)),
        "blocks": redundancy_charts.blocks(redundancy.blocks(FAMILY, 2)),
        "states": redundancy_charts.similarity(redundancy.similarity(FAMILY, "a", "cka"), "cka"),
        "curves": progress_charts.best_of_runs(compare.curves(runs), "trials", "Mean retention", True, labels),
        "fronts": front_charts.fronts_of_runs(compare.fronts(runs, x, y), x, y, labels),
        "best origins": layer_charts.origins(origins, everybody),
        "overlap": compare_charts.overlap(compare.removed_overlap(runs), labels),
        "ratios": ratio_charts.by_ratio(_curve()),
    }


def _curve() -> pd.DataFrame:
    """Two series over three ratios; the second meets guessing at the last."""
    row = {"runs": 3, "error": 0.02, "dense": 0.8, "chance": 0.5, "retention": 0.9}
    places = [(series, removed, removed / 8) for series in ("search", HOSTILE) for removed in (2, 4, 6)]
    found = pd.DataFrame(places, columns=["series", "removed", "ratio"]).assign(average=0.8 - 0.3 * 0.5, **row)
    found["average"] = [0.75, 0.7, 0.6, 0.7, 0.6, 0.5]
    return found.assign(low=found["average"] - 0.04, high=found["average"] + 0.04, limit=found["average"] == 0.5)


NAMES = [
    "best",
    "best by hours",
    "hypervolume",
    "timeline",
    "workers",
    "shares",
    "ladder",
    "agreement",
    "moves",
    "front",
    "parallel",
    "scores",
    "origins",
    "strip",
    "lanes",
    "left",
    "frequencies",
    "importance",
    "undo",
    "costs",
    "influence",
    "distances",
    "pairs",
    "blocks",
    "states",
    "curves",
    "fronts",
    "best origins",
    "overlap",
    "ratios",
]


def parts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every layer of a chart, with its encodings completed by those of the charts around it."""
    for layer in spec.get("layer", [spec]):
        outer = spec.get("encoding", {}) if layer is not spec else {}
        yield layer | {"encoding": {**outer, **layer.get("encoding", {})}}


def encoding(spec: dict[str, Any], mark: str, channel: str) -> dict[str, Any]:
    """The first encoding of a channel by a mark."""
    for part in parts(spec):
        kind = part["mark"]["type"] if isinstance(part["mark"], dict) else part["mark"]
        if kind == mark and channel in part["encoding"]:
            return part["encoding"][channel]
    raise AssertionError(f"no {mark} with {channel}")


def title_of(channel: dict[str, Any]) -> str | None:
    axis = channel.get("axis") or {}
    return channel.get("title") or (axis.get("title") if isinstance(axis, dict) else None)


@pytest.mark.parametrize("name", NAMES)
def test_every_chart_is_valid_small_and_drawable(drawn: dict[str, Any], name: str) -> None:
    spec = drawn[name].to_dict()  # Altair checks it against Vega-Lite's schema
    assert sum(len(rows) for rows in spec["datasets"].values()) <= 4000
    assert spec["height"] > 60 and "width" not in spec


@pytest.mark.parametrize("name", NAMES)
def test_other_peoples_text_is_data_or_plain_text(drawn: dict[str, Any], name: str) -> None:
    """No field name, filter or expression is made of what somebody wrote into a run file."""
    spec = drawn[name].to_dict()

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for inner_key, inner in value.items():
                if inner_key != "datasets":
                    walk(inner, inner_key)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, key)
        elif isinstance(value, str) and "alert(1)" in value:
            assert key in {"title", "domain", "sort"}, f"{key}: {value}"

    walk(spec, "")


@pytest.mark.parametrize(
    ("name", "mark", "channel", "field", "title"),
    [
        ("best", "circle", "x", "trials", "Trials ended"),
        ("best by hours", "line", "x", "hours", "Minutes since the start (min)"),
        ("best", "circle", "y", "average", "Mean retention"),
        ("hypervolume", "line", "y", "hypervolume", "Hypervolume (product of scores)"),
        ("timeline", "bar", "x", "start_hours", "Minutes since the start (min)"),
        ("timeline", "bar", "y", "budget", None),
        ("workers", "bar", "y", "worker", None),
        ("shares", "bar", "x", "share", "Share (%)"),
        ("ladder", "line", "x", "budget", "Rung (examples)"),
        ("ladder", "line", "y", "average", "Mean retention"),
        ("agreement", "rect", "x", "pair", "Rungs compared (examples)"),
        ("moves", "line", "y", "rank", "Rank (1 is best)"),
        ("front", "point", "x", "x", "piqa/acc_norm (higher is better)"),
        ("front", "point", "y", "y", "wiki/word_perplexity (lower is better)"),
        ("scores", "point", "x", "value", None),
        ("origins", "rect", "x", "layer", "Layer of the base"),
        ("origins", "rect", "y", "plan", None),
        ("frequencies", "rect", "y", "name", None),
        ("importance", "rect", "color", "drawn", None),
        ("curves", "line", "y", "best", "Mean retention"),
        ("overlap", "rect", "color", "jaccard", None),
    ],
)
def test_what_is_drawn_where(
    drawn: dict[str, Any], name: str, mark: str, channel: str, field: str, title: str | None
) -> None:
    found = encoding(drawn[name].to_dict(), mark, channel)
    assert found["field"] == field
    if title:
        assert title_of(found) == title


@pytest.mark.parametrize(
    ("last", "units", "title"),
    [
        (0.01, "3600", "Seconds since the start (s)"),
        (0.4, "60", "Minutes since the start (min)"),
        (40, "", "Hours since the start (h)"),
    ],
)
def test_times_are_read_in_the_unit_of_the_run(last: float, units: str, title: str) -> None:
    frame = pd.DataFrame({"trials": [1, 2], "hours": [last / 2, last], "hypervolume": [0.1, 0.2]})
    axis = encoding(progress_charts.hypervolume_so_far(frame, "hours").to_dict(), "line", "x")["axis"]
    assert axis["title"] == title and axis.get("labelExpr", "").startswith(f"format({units} *" if units else "")


@pytest.mark.parametrize(
    ("last", "unit", "ticks"),
    [(148, 1, range(0, 151, 30)), (7.3, 1, range(9)), (0, 1, range(2)), (5300, 60, range(0, 91, 15))],
)
def test_ticks_are_at_round_seconds_and_minutes(last: float, unit: int, ticks: range) -> None:
    """Of the timeline too, whose scale ends at a tick."""
    bars = {"trial_id": [0], "config_id": [0], "budget": [9], "status": ["success"], "seconds": [1.0]}
    frame = pd.DataFrame(bars | {"start_hours": [0.0], "end_hours": [last / 3600]})
    x = encoding(progress_charts.timeline(frame, [9]).to_dict(), "bar", "x")
    seconds = [3600 / unit * hours for hours in x["axis"]["values"]]
    assert seconds == (pytest.approx(list(ticks)) if last else pytest.approx([0, 0.01]))
    assert x["scale"]["domain"] == [0, x["axis"]["values"][-1]]


@pytest.mark.parametrize(
    ("name", "form"), [("best", ".3~%"), ("best by hours", ".4~g"), ("ladder", ".3~%"), ("curves", ".3~%")]
)
def test_shares_are_read_in_percent_and_scores_in_their_unit(drawn: dict[str, Any], name: str, form: str) -> None:
    mark = "circle" if name.startswith("best") else "line"
    assert encoding(drawn[name].to_dict(), mark, "y")["axis"]["format"] == form


@pytest.mark.parametrize(
    ("name", "mark", "channel", "field"),
    [
        ("origins", "text", "text", "code"),
        ("best origins", "text", "text", "code"),
        ("lanes", "text", "text", "text"),
        ("agreement", "text", "text", "label"),
        ("frequencies", "text", "text", "label"),
        ("importance", "text", "text", "label"),
        ("overlap", "text", "text", "label"),
        ("shares", "text", "text", "label"),
        ("timeline", "point", "shape", "status"),
        ("scores", "point", "shape", "budget"),
        ("moves", "line", "strokeDash", "kind"),
        ("curves", "line", "strokeDash", "run"),
        ("fronts", "point", "shape", "run"),
        ("fronts", "line", "strokeDash", "run"),
        ("ratios", "line", "strokeDash", "run"),
    ],
)
def test_colour_never_speaks_alone(drawn: dict[str, Any], name: str, mark: str, channel: str, field: str) -> None:
    assert encoding(drawn[name].to_dict(), mark, channel)["field"] == field


def test_the_limit_is_ringed_between_the_dense_base_and_guessing(drawn: dict[str, Any]) -> None:
    spec = drawn["ratios"].to_dict()
    levels = [data for data in spec["datasets"].values() if "level" in data[0]]
    assert {row["level"]: round(row["at"], 3) for row in levels[0]} == {"dense base": 0.8, "guessing": 0.5}
    [rings] = [part for part in parts(spec) if part.get("transform") == [{"filter": "datum.limit"}]]
    assert rings["mark"]["color"] == theme.ACCENT and rings["encoding"]["y"]["field"] == "average"
    assert encoding(spec, "rule", "y2")["field"] == "high"


def test_a_click_on_the_front_names_the_plan(drawn: dict[str, Any]) -> None:
    spec = drawn["front"].to_dict()
    select = next(p for p in spec["params"] if p["name"] == front_charts.SELECTION)
    assert select["select"]["type"] == "point" and select["select"]["fields"] == ["config_id"]


def test_the_front_is_joined_through_what_was_attained(drawn: dict[str, Any], view: View) -> None:
    def step(chart: Any) -> str:
        marks = [layer["mark"] for layer in chart.to_dict()["layer"]]
        return next(mark["interpolate"] for mark in marks if mark["type"] == "line")

    assert step(drawn["front"]) == "step-before"  # more is better across: the next plan is what is left beyond a plan
    axes = {axis.column: axis for axis in tradeoffs.axes(view.tables, view.plans, view.facts)}
    few, score = axes["parameters"], axes[view.facts.names[0]]
    points = tradeoffs.front(view.plans, few, score)
    assert step(front_charts.front(points, few, score, None)) == "step-after"


def test_the_front_has_error_bars_a_knee_and_faint_dominated_plans(drawn: dict[str, Any]) -> None:
    spec = drawn["front"].to_dict()
    assert encoding(spec, "rule", "x2")["field"] == "x_high" and encoding(spec, "rule", "y2")["field"] == "y_high"
    assert encoding(spec, "point", "shape")["scale"] == {"domain": ["plan", "knee"], "range": ["circle", "diamond"]}
    assert encoding(spec, "point", "opacity")["condition"]["test"] == "datum.on_front"


def test_sources_keep_their_colours_and_codes(drawn: dict[str, Any], view: View) -> None:
    scale = encoding(drawn["origins"].to_dict(), "rect", "color")["scale"]
    shown = theme.source_colours(view.facts.candidates) | {theme.REMOVED: theme.HOLE_COLOUR}
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == shown
    legend = encoding(drawn["origins"].to_dict(), "rect", "color")["legend"]["labelExpr"]
    assert "'math (M)'" in legend and "'removed (×)'" in legend


def test_every_layer_has_its_column_also_where_nothing_is_drawn(drawn: dict[str, Any], view: View) -> None:
    for name in ("frequencies", "importance", "lanes"):
        assert encoding(drawn[name].to_dict(), "rect", "x")["scale"]["domain"] == list(range(view.facts.n_layers))


def test_candidates_have_distinct_short_codes() -> None:
    names = ["math", "maths", "m", "code", "Code2", "日本", "_", "chat"] + [f"x{i}" for i in range(8)]
    codes = theme.source_codes(names)
    assert len(set(codes.values())) == len(codes) and max(map(len, codes.values())) <= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", [*theme.source_colours(["a", "b", "c", "d", "e", "f"]).values(), *theme.RUN_COLOURS])
def test_ink_reads_on_every_colour(colour: str) -> None:
    assert contrast(colour, theme.ink_on(colour)) >= 4.5


@pytest.mark.parametrize("colour", [theme.MUTED, theme.MAIN, *theme.RUN_COLOURS[:1]])
def test_lines_stand_on_light_and_on_dark_ground(colour: str) -> None:
    assert contrast(colour, "#FFFFFF") >= 3 and contrast(colour, "#12161C") >= 3


# --- what leaves the page ---------------------------------------------------------------------------------------------


def test_csv_has_all_rows_and_no_formulas() -> None:
    frame = pd.DataFrame({"=name": ["=cmd()", "fine"], "score": [-1.5, 2.0]})
    assert files.csv_bytes(frame).decode("utf-8-sig") == "'=name,score\n'=cmd(),-1.5\nfine,2.0\n"


def test_a_picture_carries_its_title_and_note(drawn: dict[str, Any]) -> None:
    spec = files.picture_spec(drawn["best"], "Best so far", "word " * 60)
    assert spec["title"]["text"] == "Best so far" and len(spec["title"]["subtitle"]) == 3
    assert spec["width"] == files.PICTURE_WIDTH and spec["config"]["background"] == "#FFFFFF"


@pytest.mark.parametrize("name", ["front", "origins", "parallel"])
def test_pictures_are_drawn(drawn: dict[str, Any], name: str) -> None:
    assert files.png_bytes(drawn[name], "A title", "A note").startswith(b"\x89PNG")
    svg = files.svg_bytes(drawn[name], HOSTILE, "A note")
    assert svg.startswith(b"<svg") and b"<script" not in svg


def test_charts_survive_json(drawn: dict[str, Any]) -> None:
    """It is how the browser gets them: no NaN, no numpy, no dates."""
    for chart in drawn.values():
        json.loads(json.dumps(chart.to_dict(), allow_nan=False))


def test_cells_of_cheap_layers_have_a_frame_and_costs_are_percent(drawn: dict[str, Any]) -> None:
    cells, frames, words = drawn["costs"].to_dict()["layer"]
    assert {"filter": "datum['cheap']"} in frames["transform"] and frames["mark"]["filled"] is False
    assert cells["encoding"]["color"]["scale"]["domain"] == [0, redundancy_charts.MOST_COST]
    rows = redundancy.by_layer(FAMILY)
    assert rows[rows["model"] == "a"]["cheap"].tolist() == [False, True, False, True]
    assert "round(100 * datum.drawn)" in str(words["transform"])
    pairs = drawn["pairs"].to_dict()["layer"][0]["encoding"]["color"]["scale"]
    assert pairs["domain"] == [-0.5, 0.5] and pairs["scheme"] == theme.SIGNED


def test_of_many_pairs_those_are_shown_that_agree_or_conflict_most() -> None:
    pairs = [Agreement("a", f"c{n}", [0.01 * n, None, 0.0, -0.001 * n]) for n in range(30)]
    shown = redundancy.agreement(replace(FAMILY, agreement=pairs))
    assert shown["pair"].unique().tolist() == [f"a and c{n}" for n in range(29, 8, -1)]
    assert len(redundancy.text(replace(FAMILY, agreement=pairs))[0]) == 1 + 3 + 3 + 2
