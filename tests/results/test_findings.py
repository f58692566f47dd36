"""What several runs say together: the limit of removal, where the spread comes from, whether a front is one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.redundant import family_of, model_of
from helpers.run_tables import SPEC, run_tables
from scipy import stats

from gptailor.commands.findings import _components, _correlations, _ends, _families, _pools
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.frames import compare, foretelling, front_ends, pools, ratios, variance
from gptailor.results.frames.compare import Entry
from gptailor.results.frames.view import View
from gptailor.store.queries import Answers
from gptailor.store.screening import Screening
from gptailor.trial import REPAIRED, ItemKey, Subject

HELD_OUT = [{"benchmark": "piqa", "metric": "acc", "split": "test"}]
N = 400


def plan_less(removed: int, n_layers: int = 8) -> StitchPlan:
    return StitchPlan.without(set(range(removed)), n_layers)


def judged(subject: str, score: float, plan: StitchPlan, split: str = "test", name: str = "piqa/acc") -> dict[str, Any]:
    error = float(np.sqrt(abs(score * (1 - score)) / N))
    known = {"plan_hash": plan.hash, "chance": 0.5, "aggregation": "mean", "stderr": error}
    return {"subject": subject, "name": name, "score": score, "n_samples": N, "split": split} | known


def run(
    removed: int, score: float, seed: int = 0, more: list[dict[str, Any]] | None = None, **asked: Any
) -> tuple[str, View]:
    """A run that is judged by one benchmark: the dense base gets 0.8, guessing 0.5, its best plan `score`."""
    spec = SPEC | {"held_out": HELD_OUT, "remove": removed, "seed": seed} | asked
    plan = plan_less(removed)
    trial = {"config_id": 1, "budget": 900, "scores": {"piqa/acc": 0.7, "wiki/ppl": 9.0}}
    evaluations = [judged("dense", 0.8, StitchPlan.dense(8)), judged("config:1", score, plan), *(more or ())]
    tables = run_tables([trial], {1: plan, REPAIRED + 1: plan}, evaluations, spec, n_layers=8, n_removed=removed)
    remark = ", one-shot" if asked.get("baselines") else ""
    return f"{removed / 8:.0%}{remark}, seed {seed}", View(tables)


def entries(*runs: tuple[str, View]) -> list[Entry]:
    return compare.entries(list(runs))


def test_the_curve_and_its_limit() -> None:
    one_shot: dict[str, Any] = {"baselines": ["last"]}
    runs = entries(
        *(run(removed, score, seed) for removed, score in ((2, 0.7), (4, 0.6), (6, 0.5)) for seed in (0, 1)),
        *(run(removed, score, **one_shot) for removed, score in ((2, 0.65), (4, 0.53), (6, 0.51))),
    )
    curve = ratios.curve(ratios.points(runs)).set_index(["series", "ratio"])
    assert list(dict.fromkeys(curve.index.get_level_values(0))) == ["search", "one-shot"]
    assert curve.loc[("search", 0.25), "runs"] == 2 and curve.loc[("one-shot", 0.25), "runs"] == 1
    row = curve.loc[("search", 0.5)]
    assert row["average"] == 0.6 and row["dense"] == 0.8 and row["retention"] == pytest.approx(0.75)
    assert row["error"] == pytest.approx(np.sqrt(0.24 / N)), "both seeds answered the same examples"
    assert row["low"] == pytest.approx(0.6 - 1.96 * row["error"])
    assert curve[curve["limit"]].index.to_list() == [("search", 0.75), ("one-shot", 0.5)]
    assert ratios.points(runs[:2]).empty, "all remove as much"
    long = [(entry.label.replace("%", "% of all the layers of the base are removed"), entry.view) for entry in runs]
    assert set(ratios.points(entries(*long))["series"]) == {"search", "one-shot"}, "by whole names, not by short labels"
    failed = View(run_tables([], {}, [], SPEC | {"held_out": HELD_OUT}, n_layers=0))
    assert len(ratios.points([*runs, *entries(("failed", failed))])) == len(ratios.points(runs)), "one failed early"
    elsewhere = [{"benchmark": "piqa", "metric": "acc", "split": "validation[900:]"}]
    assert ratios.points(entries(run(2, 0.7), run(4, 0.6, held_out=elsewhere))).empty, "judged by others"


def test_seeds_with_examples_of_their_own_share_the_error() -> None:
    part = [{"benchmark": "piqa", "metric": "acc", "split": "test[0:400]"}]

    def on_part(removed: int, score: float, seed: int) -> tuple[str, View]:
        more = [judged("config:1", score, plan_less(removed), "test[0:400]")]
        return run(removed, score, seed, more, held_out=part)

    runs = entries(*(on_part(removed, 0.6, seed) for removed in (2, 4) for seed in range(4)))
    curve = ratios.curve(ratios.points(runs))
    assert curve["error"].tolist() == pytest.approx([np.sqrt(0.24 / N / 4)] * 2)


def test_how_sure_a_limit_is() -> None:
    runs = entries(*(run(removed, score) for removed, score in ((2, 0.7), (4, 0.55), (6, 0.48), (7, 0.47))))
    points = ratios.points(runs)
    answers = {}
    for row in points.itertuples():
        right = round(row.average * N)
        key = ItemKey(row.plan_hash, "piqa", "acc", "test")
        answers[row.run] = Answers({key: [1.0] * right + [0.0] * (N - right)})
    [limit] = ratios.limits(points, answers)
    assert (limit.series, limit.ratio, limit.low, limit.high) == ("search", 0.75, 0.5, 0.75)
    assert limit.share > 0.99 and "the limit is 75% removed" in limit.text and "50% to 75%" in limit.text
    [without] = ratios.limits(points, {})
    assert (without.ratio, without.low) == (0.75, 0.5), "as far as standard errors tell"
    [never] = ratios.limits(ratios.points(entries(run(2, 0.75), run(4, 0.7))), {})
    assert never.ratio is None and never.share == 0.0 and "no limit up to 50% removed" in never.text


def test_repaired_and_healed_plans_are_lines_of_their_own() -> None:
    def both(removed: int) -> tuple[str, View]:
        plan = plan_less(removed)
        return run(
            removed,
            0.6,
            more=[judged(f"config:{REPAIRED + 1}", 0.65, plan), judged("healed:config:1/1M", 0.7, plan)],
        )

    points = ratios.points(entries(both(2), both(4)))
    found = points.groupby("series")["average"].mean().round(3).to_dict()
    assert found == {"search": 0.6, "repaired": 0.65, "healed": 0.7}
    assert set(points["removed"]) == {2, 4}


SEARCHED = {"piqa/acc": 0.75, "wiki/ppl": 8.0}


def test_a_plan_that_the_selection_chose_repaired_is_the_runs_best_everywhere() -> None:
    split, repaired = "validation[900:]", f"config:{REPAIRED + 1}"

    def chosen(removed: int) -> tuple[str, View]:
        plan, dense = plan_less(removed), StitchPlan.dense(8)
        label, view = run(
            removed,
            0.6,
            more=[
                *(judged("dense", score, dense, "validation", name) for name, score in SEARCHED.items()),
                *(judged(repaired, score, plan, "validation", name) for name, score in SEARCHED.items()),
                judged("dense", 0.8, dense, split),
                judged("config:1", 0.6, plan, split),
                judged(repaired, 0.7, plan, split),
                judged(repaired, 0.65, plan),
                judged("healed:config:1/1M", 0.7, plan),
            ],
            selection=[{"benchmark": "piqa", "metric": "acc", "split": split}],
        )
        return label, view

    runs = entries(chosen(2), chosen(4))
    view = runs[0].view
    assert view.best == 1 and str(view.best_subject) == repaired
    believed = scores.calibration(view.tables)[Subject.parse(repaired)]
    assert view.best_row is not None and view.best_row["average"] == pytest.approx(believed), "as Home says"
    assert {name: view.best_row[name] for name in SEARCHED} == SEARCHED
    assert compare.best_scores(runs)["score"].to_list() == [*SEARCHED.values()] * 2
    assert runs[0].best_row is not None and runs[0].best_row["average"] == pytest.approx(believed)
    held_out = compare.held_out_scores(runs)
    assert held_out["score"].to_list() == [0.65, 0.65]
    points = ratios.points(runs)
    assert points.groupby("series")["average"].mean().round(3).to_dict() == {
        "search": 0.6,
        "repaired": 0.65,
        "healed": 0.7,
    }
    assert points["chance"].notna().all() and set(points["removed"]) == {2, 4}
    assert variance.table(runs)["average"].to_list() == [0.65, 0.65]
    assert str(scores.judged_best(scores.averages(scores.judged(view.tables)), view.best_subject)) == repaired
    found = scores.on_objectives(view.tables, Subject.parse(repaired))
    assert found.set_index("name")["score"].to_dict() == SEARCHED


def test_runs_of_one_name_are_told_apart_and_no_run_is_a_column() -> None:
    _, view = run(2, 0.6)
    names = ["demo", "demo", "demo (2)", "measure", "setting", "Layers kept"]
    found = compare.entries([(name, view) for name in names])
    labels = [entry.label for entry in found]
    assert len(set(labels)) == len(names) and labels[0] == "demo (1)" and labels[2] == "demo (2)"
    table = compare.score_table(compare.best_scores(found), labels)
    assert list(table.columns) == ["measure", *labels]
    assert list(compare.settings(found, only_different=False).columns) == ["setting", *labels]


ALGORITHMS: dict[str, dict[str, Any]] = {
    "search": {},
    "random": {"suggester": "random"},
    "greedy": {"baselines": ["greedy"]},
}
OBJECTIVES = {
    metric: [{"benchmark": "piqa", "metric": metric}, {"benchmark": "wiki", "metric": "ppl"}]
    for metric in ("acc", "acc_norm")
}


def test_where_the_spread_comes_from() -> None:
    noise = iter(np.random.default_rng(3).normal(0, 0.01, 18))
    rows = [
        (objective, algorithm, seed, 0.5 + 0.1 * (objective == "acc") + next(noise))
        for objective, algorithm, seed in itertools.product(OBJECTIVES, ALGORITHMS, range(3))
    ]
    found = pd.DataFrame(rows, columns=["objective", "algorithm", "seed", "average"])
    parts = variance.components(found)
    assert parts is not None
    by_source = parts.set_index("source")
    assert by_source["degrees"].to_list() == [1, 2, 2, 2, 10]
    assert by_source["share"].sum() == pytest.approx(1.0) and by_source.loc["objective", "share"] > 0.9
    assert by_source.loc["objective", "deviation"] == pytest.approx(0.1 / np.sqrt(2), abs=0.01)
    assert by_source.loc["left over", "deviation"] == pytest.approx(0.01, abs=0.005)
    assert by_source.loc["algorithm", "p"] > 0.05 > by_source.loc["objective", "p"]
    f = by_source.loc["objective", "F"]
    assert by_source.loc["objective", "p"] == pytest.approx(stats.f.sf(f, 1, 10))
    squares = found.groupby("objective")["average"].mean().var(ddof=0) * len(found)
    whole = found["average"].var(ddof=0) * len(found)
    assert by_source.loc["objective", "share"] == pytest.approx(squares / whole)
    assert variance.components(found.iloc[1:]) is None, "a cell lacks a seed"
    assert _components(parts)[1][0] == "objective"


def test_objectives_and_algorithms_are_read_off_the_run_files() -> None:
    runs = entries(
        *(
            run(2, 0.6, objectives=objectives, **algorithm)
            for objectives, algorithm in itertools.product(OBJECTIVES.values(), ALGORITHMS.values())
        )
    )
    found = variance.table(runs)
    assert set(found["algorithm"]) == {"search", "random search", "greedy"} and found["objective"].nunique() == 2
    assert variance.components(found) is None, "one seed says nothing of chance"


def test_the_ends_of_a_front() -> None:
    held_out = [*HELD_OUT, {"benchmark": "wiki", "metric": "acc", "split": "test"}]
    spec = SPEC | {"held_out": held_out, "objectives": [{"benchmark": b, "metric": "acc"} for b in ("piqa", "wiki")]}
    plans = {config: plan_less(config) for config in (1, 2, 3)}
    searched = {1: (0.7, 0.5), 2: (0.6, 0.6), 3: (0.5, 0.7)}
    trials = [
        {"config_id": config, "budget": 900, "scores": {"piqa/acc": piqa, "wiki/acc": wiki}}
        for config, (piqa, wiki) in searched.items()
    ]
    held = {(1, "piqa"): 0.7, (3, "piqa"): 0.5, (1, "wiki"): 0.6, (3, "wiki"): 0.6}
    evaluations = [judged(f"config:{c}", score, plans[c], name=f"{b}/acc") for (c, b), score in held.items()]
    items = {
        ItemKey(plans[c].hash, b, "acc", "test"): [1.0] * round(score * N) + [0.0] * (N - round(score * N))
        for (c, b), score in held.items()
    }
    [none] = entries(("failed", View(run_tables([], {}, [], spec, n_layers=8))))
    assert front_ends.table(none, Answers({})).empty, "no plan was scored on the highest rung"
    [entry] = entries(("front", View(run_tables(trials, plans, evaluations, spec, n_layers=8))))
    table = front_ends.table(entry, Answers(items)).set_index("benchmark")
    assert table.loc["piqa", ["end", "other", "plans"]].to_list() == [1, 3, 3]
    assert table.loc["piqa", "difference"] == pytest.approx(0.2)
    error = np.sqrt(0.2 * 0.8 / N)  # of the differences, a fifth of which are 1 and the rest 0
    assert table.loc["piqa", "apart"] == pytest.approx(0.2 / error, rel=0.1)
    assert table.loc["wiki", "difference"] == 0.0 and not table.loc["wiki", "apart"] > 0
    assert _ends(table.reset_index())[1][3] == "Plan 1 0.700"
    mean = View(run_tables(trials, plans, evaluations, spec | {"aim": "mean"}, n_layers=8))
    assert front_ends.table(entries(("mean", mean))[0], Answers(items)).empty


def test_pools_side_by_side() -> None:
    names = [f"c{number}" for number in range(8)]
    asked = SPEC | {"operations": ["remove", "select"], "candidates": {name: name for name in names}}
    trials = [
        {"config_id": config, "budget": budget, "scores": {"piqa/acc": piqa, "wiki/ppl": 10.0}}
        for config, budget, piqa in ((1, 100, 0.4), (2, 100, 0.5), (2, 900, 0.4), (3, 900, 0.8))
    ]
    small = asked | {"candidates": {"c0": "c0"}}
    last = [trials[0], {**trials[2], "scores": {"piqa/acc": 0.4, "wiki/ppl": 10.0}}]
    dense = [{"subject": "dense", "name": name, "score": 0.8, "n_samples": 900} for name in ("piqa/acc", "wiki/ppl")]
    views = [
        View(run_tables(trials, {3: plan_less(2)}, dense, asked, n_layers=8, n_removed=2)),
        View(run_tables(last, {2: plan_less(2)}, dense, small, n_layers=8, n_removed=2)),
    ]
    runs = compare.entries(list(zip(("many", "one"), views, strict=True)))
    table = pools.table(runs, {"many": Screening(("c0", "c1"), dict.fromkeys(names[2:], 0.1), 300)}).set_index("run")
    assert table.loc["many", ["candidates", "stay"]].to_list() == [8, 2]
    assert table.loc["many", "plans"] == pytest.approx(np.log10(28 * 3.0**6)), "two of eight gone; base, c0 or c1"
    assert table.loc["many", "examples"] == 300 + 100 + 900, "where it first had what the other ended with"
    assert table.loc["one", "examples"] == 100 + 900
    assert len(_pools(table.reset_index())) == 3
    assert pools.table(runs[:1], {}).empty, "one size of pool"
    alone = View(run_tables(last, {2: plan_less(2)}, dense, asked | {"candidates": {}}, n_layers=8, n_removed=2))
    runs = compare.entries([("many", views[0]), ("alone", alone)])
    assert pools.table(runs, {}).empty, "removal alone has no pool"


SHARES = {"little": 0.99, "some": 0.9, "much": 0.7}
"""What bases of more and more training keep without any one layer but the first."""


def test_what_redundancy_foretells() -> None:
    """Three bases: what single layers cost is in the order of what is kept, Block Influence in the opposite one."""
    kept = {"little": 0.79, "some": 0.74, "much": 0.65}
    runs, found = [], {}
    for place, (base, share) in enumerate(SHARES.items()):
        model = model_of([0.0] + [share] * 7, influence=[0.9] + [0.03 - 0.01 * place] * 7)
        for seed, operations in itertools.product((0, 1), (["remove"], ["remove", "select"])):
            asked: dict[str, Any] = {"base_model": base, "operations": operations, "name": f"{base}, {len(operations)}"}
            _, view = run(2, kept[base] + 0.001 * seed, seed, **asked)
            label = f"{base}, {operations[-1]}, seed {seed}"
            runs.append((label, view))
            if operations == ["remove"]:
                found[label] = family_of(model, model)
    table = foretelling.table(entries(*runs), found)
    assert len(table) == 12 and set(table["series"]) == {"remove", "select"}, "runs of a base share what was measured"
    families = foretelling.by_family(table).set_index("family")
    assert families.index.to_list() == list(SHARES)
    assert families["cheap"].to_list() == [7, 0, 0] and families["lost"].to_list() == pytest.approx([0.02, 0.2, 0.6])
    assert families["influence"].to_list() == pytest.approx([0.06, 0.04, 0.02])
    assert families.loc["much", [("above_chance", "select")]].item() == pytest.approx((0.65 + 0.0005 - 0.5) / 0.3)
    told = foretelling.correlations(table).set_index(["series", "measure"])
    assert told.loc[("remove", "lost"), [("retention", "families")]].item() == pytest.approx(1)
    assert told.loc[("select", "influence"), [("retention", "families")]].item() == pytest.approx(-1)
    assert 0.8 < told.loc[("remove", "lost"), [("above_chance", "runs")]].item() < 1, "seeds tie"
    assert told[("retention", "families")].isna().groupby("measure").all().to_dict()["angular"], "all alike"
    assert _families(families.reset_index())[1][:3] == ("little", "0.800", "7.0")
    assert _correlations(told.reset_index())[0][2] == "retention, 3 families"
    assert foretelling.table(entries(*runs[:4]), found).empty, "one base"
