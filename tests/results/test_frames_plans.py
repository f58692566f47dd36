"""The data step of the pages on values: trade-offs, layers, importances, comparisons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.run_tables import SPEC, run_tables

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.results.frames import compare, layers, tradeoffs
from gptailor.results.frames.importance import LEAST_PLANS, importance
from gptailor.results.frames.view import View

DENSE = [
    {"subject": "dense", "name": "piqa/acc", "score": 0.8, "n_samples": 900},
    {"subject": "dense", "name": "wiki/ppl", "score": 10.0, "n_samples": 900},
]
MIXED = StitchPlan(
    4, (LayerChoice(0), LayerChoice(1, ("math",)), LayerChoice(3, ("math", "code"), "task_arithmetic", 0.5))
)
CUT = StitchPlan.without([1], 4)
CODE = StitchPlan.without([2], 4, "code")


def plan_run(scores: dict[int, tuple[float, float]], plans: dict[int, StitchPlan] | None = None, **more) -> View:
    """Plans at the full budget: config_id -> (piqa, wiki perplexity)."""
    trials = [
        {"config_id": c, "budget": 900, "scores": {"piqa/acc": piqa, "wiki/ppl": ppl}}
        for c, (piqa, ppl) in scores.items()
    ]
    return View(run_tables(trials, plans=plans, evaluations=[*DENSE, *more.pop("evaluations", [])], **more))


def test_what_edits_left_of_layers() -> None:
    view = plan_run({1: (0.6, 20), 2: (0.5, 15)}, {1: MIXED, 2: CUT})
    assert layers.left_of_layers(layers.strip(view.layers, 1)).empty, "nothing was left out"
    stored = view.tables.layers
    mine = (stored.config_id == 1) & stored.position.notna()
    stored.loc[mine, ["heads", "channels", "weights"]] = [[1.0, 0.5, 0.7], [0.5, 0.5, 0.5], [1.0, 1.0, 0.9]]
    left = layers.left_of_layers(layers.strip(layers.label_layers(stored, view.facts), 1))
    assert list(dict.fromkeys(left.part)) == ["Heads", "MLP channels", "Weights that are not 0"]
    assert layers.zeros(stored, 1) == 0.0 == layers.zeros(stored, 2), "narrower layers have none"
    stored.loc[mine, ["heads", "channels", "weights"]] = [[1.0, 1.0, 0.7], [1.0, 1.0, 0.5], [1.0, 1.0, 0.9]]
    assert layers.zeros(stored, 1) == pytest.approx(0.3)
    assert left[left.part == "MLP channels"][["layer", "share"]].to_numpy().tolist() == [[0, 0.5], [1, 0.5], [3, 1.0]]


# --- trade-offs -------------------------------------------------------------------------------------------------------


def test_axes_are_what_the_plans_have_values_of() -> None:
    latency = {"subject": "config:1", "name": "latency/ms", "score": 12.0, "n_samples": 5, "split": "test"}
    view = plan_run({1: (0.6, 20), 2: (0.5, 15)}, {1: MIXED, 2: CUT}, evaluations=[latency])
    axes = {axis.label: axis for axis in tradeoffs.axes(view.tables, view.plans, view.facts)}
    assert list(axes) == [
        "Retention", "piqa/acc", "wiki/ppl", "Layers kept", "Parameters", "Latency, ms an example",
        "latency/ms (test)",
    ]  # fmt: skip
    assert not axes["wiki/ppl"].maximise and not axes["Layers kept"].maximise and axes["piqa/acc"].maximise
    assert view.plans.set_index("config_id")["latency/ms (test)"].to_dict() == {
        1: 12.0,
        2: pytest.approx(np.nan, nan_ok=True),
    }


def test_latency_is_of_all_that_was_scored_of_a_plan() -> None:
    rungs = [{"config_id": 1, "budget": b, "scores": {"piqa/acc": 0.5, "wiki/ppl": 20}} for b in (100, 300, 900)]
    again = {"config_id": 2, "budget": 900, "scores": {"piqa/acc": 0.6, "wiki/ppl": (20, None, 500)}}
    view = View(run_tables([*rungs, {"config_id": 2, "budget": 300, "status": "crashed"}, again], evaluations=DENSE))
    assert view.plans.set_index("config_id")["latency"].to_dict() == pytest.approx(
        {1: 3 * 59_000 / 1800, 2: 59_000 / 1400}
    )


def test_the_front_knows_which_way_is_better() -> None:
    view = plan_run({1: (0.7, 30), 2: (0.5, 12), 3: (0.65, 15), 4: (0.5, 30)})
    axes = {axis.label: axis for axis in tradeoffs.axes(view.tables, view.plans, view.facts)}
    points = tradeoffs.front(view.plans, axes["piqa/acc"], axes["wiki/ppl"]).set_index("config_id")
    assert points["on_front"].to_dict() == {1: True, 2: True, 3: True, 4: False}
    assert points.index[points["knee"]].tolist() == [3]
    assert points.loc[1, ["x_low", "x", "x_high"]].tolist() == pytest.approx([0.69, 0.7, 0.71])
    assert tradeoffs.front_of_all(view.plans, view.facts).sum() == 3
    assert tradeoffs.knee_of_all(view.plans, view.facts) == 3


def test_the_front_leaves_out_plans_without_a_value() -> None:
    latency = {"subject": "config:1", "name": "latency/ms", "score": 12.0, "n_samples": 5}
    view = plan_run({1: (0.6, 20), 2: (0.5, 15)}, evaluations=[latency])
    axes = {axis.column: axis for axis in tradeoffs.axes(view.tables, view.plans, view.facts)}
    points = tradeoffs.front(view.plans, axes["piqa/acc"], axes["latency/ms (validation)"])
    assert points["config_id"].tolist() == [1]


def test_weights_pick_the_plan() -> None:
    view = plan_run({1: (0.7, 30), 2: (0.5, 12), 3: (0.65, 15)})
    pick = {
        name: tradeoffs.pick_by_weights(view.plans, view.facts, weights)
        for name, weights in {
            "piqa": {"piqa/acc": 1.0, "wiki/ppl": 0.0},
            "wiki": {"piqa/acc": 0.0, "wiki/ppl": 1.0},
            "both": {"piqa/acc": 0.5, "wiki/ppl": 0.5},
            "none": {"piqa/acc": 0.0, "wiki/ppl": 0.0},
        }.items()
    }
    assert pick == {"piqa": 1, "wiki": 2, "both": 3, "none": None}


def test_scaled_objectives_run_from_worst_to_best() -> None:
    view = plan_run({1: (0.7, 30), 2: (0.5, 12), 3: (0.6, 21)})
    places = tradeoffs.scaled(view.plans, view.facts).set_index(view.plans["config_id"])
    assert places.loc[1].tolist() == [1, 0] and places.loc[2].tolist() == [0, 1]
    assert places.loc[3].tolist() == pytest.approx([0.5, 0.5])
    equal = plan_run({1: (0.7, 30), 2: (0.7, 12)})
    assert tradeoffs.scaled(equal.plans, equal.facts)["piqa/acc"].tolist() == [0.5, 0.5]


def test_parallel_rows_keep_the_front_and_the_chosen_plan() -> None:
    view = plan_run({c: (0.4 + 0.01 * c, 10 + c) for c in range(10)} | {50: (0.3, 40)})  # type: ignore[arg-type]
    rows = tradeoffs.parallel(view.plans, view.facts, selected=50, limit=11)
    assert rows["config_id"].nunique() == 11 and rows[rows["selected"]]["config_id"].unique().tolist() == [50]
    assert len(rows) == 22
    few = tradeoffs.parallel(view.plans, view.facts, selected=50, limit=3)
    assert few["config_id"].nunique() == 3
    ends = tradeoffs.ends(view.plans, view.facts).set_index("objective")
    assert ends.loc["wiki/ppl", ["best", "worst"]].tolist() == ["10", "40"]


def test_scores_and_place_of_a_plan() -> None:
    trials = [
        {"config_id": 1, "budget": 100, "scores": {"piqa/acc": 0.4, "wiki/ppl": 20}, "origin": "random"},
        {"config_id": 2, "budget": 900, "scores": {"piqa/acc": 0.7, "wiki/ppl": 20}},
        {"config_id": 1, "budget": 900, "scores": {"piqa/acc": 0.6, "wiki/ppl": 20}},
    ]
    view = View(run_tables(trials, evaluations=DENSE))
    scores = tradeoffs.scores_of(view.trials, view.facts, 1)
    assert scores["budget"].tolist() == [100, 100, 900, 900]
    assert scores["retention"].tolist() == pytest.approx([0.5, 0.5, 0.75, 0.5])
    place = tradeoffs.place_of(view.trials, view.plans, 1)
    assert (place.rank, place.of, place.trials, place.seconds, place.origin) == (2, 2, 2, 0.0, "random")


# --- layers -----------------------------------------------------------------------------------------------------------


def test_labels_of_layers() -> None:
    view = plan_run({1: (0.6, 20)}, {1: MIXED})
    one = layers.strip(view.layers, 1)
    assert one["source"].tolist() == ["base", "math", "removed", "merged"]
    assert one["code"].tolist() == ["·", "M", "×", "MC"]
    assert one["made_of"].tolist() == ["the base's own layer", "math", "removed", "math + code"]
    assert one["choice"].tolist() == ["base", "math", "removed", "math+code"]
    assert one["deviates"].tolist() == [False, True, True, True]


def test_the_origin_grid_is_dense_and_in_order() -> None:
    view = plan_run({1: (0.6, 20), 2: (0.7, 20)}, {1: MIXED, 2: CUT})
    grid = layers.origin_grid(view.layers, view.plans, view.facts)
    assert len(grid) == 8 and not grid.duplicated(["row", "layer"]).any()
    assert grid[grid["row"] == 0]["config_id"].unique().tolist() == [2]
    assert grid["plan"].iloc[0] == "Plan 2 · 87.5 %"


def test_one_plan_by_sources() -> None:
    view = plan_run({1: (0.6, 20)}, {1: MIXED})
    lanes = layers.strip_sources(layers.strip(view.layers, 1), view.tables.layers, view.facts)
    assert list(zip(lanes["lane"], lanes["layer"], lanes["text"], strict=True)) == [
        ("base", 0, ""), ("math", 1, ""), ("math", 3, ".50"), ("code", 3, ".50"), ("removed", 2, "×"),
    ]  # fmt: skip


def test_how_often_each_layer_is_what() -> None:
    view = plan_run({1: (0.6, 20), 2: (0.7, 20), 3: (0.5, 20)}, {1: MIXED, 2: CUT, 3: CODE})
    often = layers.frequencies(view.layers, [1, 2], view.facts).set_index(["source", "layer"])["share"]
    assert len(often) == 6 * 4
    assert often[("removed", 1)] == often[("kept", 1)] == often[("math", 1)] == 0.5
    assert often[("base", 0)] == 1 and often[("code", 0)] == 0
    every = layers.frequencies(view.layers, [1, 2, 3], view.facts)
    kinds = every[every["source"] != "kept"]
    assert kinds.groupby("layer")["share"].sum().tolist() == pytest.approx([1, 1, 1, 1])


def test_what_a_deviation_is_worth() -> None:
    removes_1, removes_2 = StitchPlan.without([1], 4), StitchPlan.without([2], 4)
    scores = {c: (0.8 if c < 4 else 0.4, 10.0) for c in range(8)} | {0: (0.72, 10.0)}
    view = plan_run(scores, {c: removes_1 if c < 4 else removes_2 for c in range(8)})
    worth = layers.undo_one(view.layers, view.trials, 1)
    assert worth[["layer", "source", "n_same", "n_base"]].to_numpy().tolist() == [[1, "removed", 4, 4]]
    mean, error = (3 * 1.0 + 0.9) / 4 - 0.5, np.std([1, 1, 1, 0.9], ddof=1) / 2
    assert worth["worth"].iloc[0] == pytest.approx(mean) and worth["error"].iloc[0] == pytest.approx(error)
    assert worth["low"].iloc[0] == pytest.approx(mean - 1.96 * error)


def test_a_deviation_that_was_tried_once_has_no_worth() -> None:
    view = plan_run({1: (0.6, 20), 2: (0.7, 20)}, {1: MIXED, 2: CUT})
    assert layers.undo_one(view.layers, view.trials, 1)["worth"].isna().all()


def test_budgets_are_not_taken_for_worth() -> None:
    """Plans that were scored higher only because of their rung do not make their layers look good."""
    trials = [{"config_id": c, "budget": 100, "scores": {"piqa/acc": 0.2, "wiki/ppl": 10}} for c in range(4)]
    trials += [{"config_id": c, "budget": 900, "scores": {"piqa/acc": 0.7, "wiki/ppl": 10}} for c in range(4, 8)]
    plans = {c: StitchPlan.without([1 if c < 4 else 2], 4) for c in range(8)}
    view = View(run_tables(trials, plans=plans, evaluations=DENSE))
    assert layers.undo_one(view.layers, view.trials, 5)["worth"].tolist() == pytest.approx([0.0])


def planted(n: int, seed: int = 0) -> View:
    """Removing layer 2 costs piqa; taking layer 5 from math helps wiki; nothing else matters."""
    draw = np.random.default_rng(seed)
    scores, plans = {}, {}
    for config in range(n):
        removed = set(draw.choice(8, 2, replace=False).tolist())
        lent = {layer: ("math",) for layer in range(8) if draw.random() < 0.4}
        plans[config] = StitchPlan(8, tuple(LayerChoice(i, lent.get(i, ())) for i in range(8) if i not in removed))
        helped = 5 in lent and 5 not in removed
        noise = draw.normal(0, 0.01)
        scores[config] = (0.7 - 0.2 * (2 in removed) + noise, 20 - 6 * helped + 10 * noise)
    return plan_run(scores, plans, n_layers=8, n_removed=2)


def test_importance_finds_the_layers_that_matter() -> None:
    view = planted(150)
    found = importance(view.layers, view.trials, view.facts)
    assert found is not None and found.plans == 150
    top = found.rows.sort_values("importance").groupby("objective").tail(1).set_index("objective")["layer"]
    assert top.to_dict() == {"piqa/acc": 2, "wiki/ppl": 5}
    assert min(found.explained.values()) > 0.5
    assert found.rows.groupby("objective")["layer"].nunique().tolist() == [8, 8]


def test_importance_waits_for_enough_plans() -> None:
    view = planted(LEAST_PLANS - 1)
    assert importance(view.layers, view.trials, view.facts) is None


# --- comparisons ------------------------------------------------------------------------------------------------------

ONE_OBJECTIVE = {**SPEC, "objectives": SPEC["objectives"][:1]}


def pair() -> list[compare.Entry]:
    both = plan_run({1: (0.60, 12), 2: (0.70, 20)}, {1: MIXED, 2: CUT})
    trials = [{"config_id": 5, "budget": 300, "scores": {"piqa/acc": 0.76}}]
    one = View(run_tables(trials, plans={5: CODE}, evaluations=DENSE, spec=ONE_OBJECTIVE | {"trials": 50}))
    return compare.entries([("twin", both), ("twin", one)])


def test_runs_are_compared_by_what_they_share() -> None:
    first, second = pair()
    assert (first.label, second.label) == ("twin (1)", "twin (2)")
    assert first.facts.names == second.facts.names == ["piqa/acc"]
    assert compare.share_objectives([first, second])
    assert (first.best, second.best) == (2, 5)  # what each run calls so
    assert (first.top_budget, second.top_budget) == (900, 300)


def test_runs_that_share_nothing_are_still_entries() -> None:
    other = {**SPEC, "objectives": [{"benchmark": "boolq", "metric": "acc", "split": "validation"}]}
    alien = View(
        run_tables([{"config_id": 1, "budget": 900, "scores": {"boolq/acc": 0.7}}], plans={1: CUT}, spec=other)
    )
    runs = compare.entries([("a", plan_run({1: (0.6, 20)}, {1: MIXED})), ("b", alien)])
    assert not compare.share_objectives(runs) and [entry.best for entry in runs] == [1, 1]


def test_settings_that_differ() -> None:
    frame = compare.settings(pair()).set_index("setting")
    assert frame.loc["trials"].tolist() == ["20", "50"]
    assert "piqa/acc (validation), wiki/ppl (validation)" in frame.loc["objectives"].tolist()
    assert "base_model" not in frame.index
    assert "base_model" in compare.settings(pair(), only_different=False)["setting"].tolist()


def scores_of_runs(*scores: float, error: float = 0.01, higher: bool = True) -> pd.DataFrame:
    rows = [("m", f"run {i}", i, 900, s, error, s, higher) for i, s in enumerate(scores)]
    return pd.DataFrame(rows, columns=compare._SCORE_COLUMNS)


@pytest.mark.parametrize(
    ("scores", "higher", "lead"),
    [
        ((0.60, 0.70), True, ["", "clear"]),
        ((0.60, 0.61), True, ["", "ahead"]),
        ((0.60, 0.70), False, ["clear", ""]),
        ((0.60, 0.60), True, ["", ""]),
        ((0.50, 0.70, 0.69), True, ["", "ahead", ""]),
        ((0.60, np.nan), True, ["", ""]),
    ],
)
def test_who_leads_and_whether_it_may_be_chance(scores: tuple[float, ...], higher: bool, lead: list[str]) -> None:
    assert compare.marked(scores_of_runs(*scores, higher=higher))["lead"].tolist() == lead


def test_a_lead_without_standard_errors_is_not_called_clear() -> None:
    assert compare.marked(scores_of_runs(0.1, 0.9, error=np.nan))["lead"].tolist() == ["", "ahead"]


def test_the_score_table_in_words() -> None:
    table = compare.score_table(scores_of_runs(0.60, 0.70), ["run 0", "run 1"])
    assert table.to_numpy().tolist() == [["m", "0.600 ± 0.010", "★ 0.700 ± 0.010"]]
    percent = compare.score_table(scores_of_runs(0.60, 0.70), ["run 0", "run 1", "run 2"], retention=True)
    assert percent.iloc[0].tolist() == ["m", "60.0 % ± 1.0", "★ 70.0 % ± 1.0", "–"]


def test_retention_leads_by_itself_not_by_the_score() -> None:
    scores = scores_of_runs(0.60, 0.70).assign(retention=[0.9, 0.7])
    table = compare.score_table(scores, ["run 0", "run 1"], retention=True)
    assert table.iloc[0].tolist() == ["m", "★ 90.0 % ± 1.5", "70.0 % ± 1.0"]


def test_held_out_results_of_the_best_plans() -> None:
    held_out = [
        {"subject": "dense", "name": "arc/acc", "score": 0.5, "n_samples": 800, "split": "test"},
        {"subject": "config:1", "name": "arc/acc", "score": 0.4, "n_samples": 800, "split": "test"},
        {"subject": "config:2", "name": "arc/acc", "score": 0.1, "n_samples": 800, "split": "test"},
    ]
    spec = {**SPEC, "held_out": [{"benchmark": "arc", "metric": "acc", "split": "test"}]}
    view = plan_run({1: (0.7, 20), 2: (0.6, 20)}, {1: MIXED, 2: CUT}, evaluations=held_out, spec=spec)
    runs = compare.entries([("a", view)])
    found = compare.held_out_scores(runs)
    assert found[["measure", "config_id", "score", "retention"]].to_numpy().tolist() == [
        ["arc/acc (test)", 1, 0.4, 0.8]
    ]


def test_overlap_of_what_is_removed() -> None:
    frame = compare.removed_overlap(pair()).set_index(["one", "other"])["jaccard"]
    assert frame["twin (1)", "twin (1)"] == 1.0
    assert frame["twin (1)", "twin (2)"] == 0.0  # plan 2 removes layer 1, plan 5 layer 2
    both = [("a", plan_run({1: (0.6, 20)}, {1: MIXED})), ("b", plan_run({5: (0.6, 20)}, {5: CODE}))]
    alike = compare.removed_overlap(compare.entries(both)).set_index(["one", "other"])["jaccard"]
    assert alike["a", "b"] == 1.0  # both remove layer 2 alone
    deeper = View(run_tables([], n_layers=6))
    other = compare.entries([("a", plan_run({1: (0.6, 20)}, {1: MIXED})), ("b", deeper)])
    assert np.isnan(compare.removed_overlap(other).set_index(["one", "other"])["jaccard"]["a", "b"])


def test_the_best_plans_side_by_side_with_everybodys_candidates() -> None:
    foreign = {**SPEC, "candidates": {"prose": "models/prose"}}
    runs = compare.entries(
        [
            ("a", plan_run({1: (0.6, 20)}, {1: MIXED})),
            ("b", plan_run({7: (0.5, 20)}, {7: StitchPlan.without([0], 4, "prose")}, spec=foreign)),
        ]
    )
    grid, facts = compare.best_origins(runs)
    assert facts.candidates == ("math", "code", "prose")
    assert grid["plan"].unique().tolist() == ["a", "b"] and len(grid) == 8
    assert grid[grid["plan"] == "b"]["code"].tolist() == ["×", "P", "P", "P"]


def test_the_verdict_of_a_comparison() -> None:
    text = compare.verdict(pair())
    assert text.startswith("twin (2) is ahead of twin (1): retention 95.0 % ± ")
    assert "by more than chance explains" in text and "different budgets" in text
    lonely = compare.entries([("a", plan_run({1: (0.6, 20)})), ("b", View(run_tables()))])
    assert "Only one" in compare.verdict(lonely)
