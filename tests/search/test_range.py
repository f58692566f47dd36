"""A range of sizes: the number of layers is a part of the plan, size an objective, and every size has its best plan."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from helpers.make_runs import make_run
from helpers.suggestions import N_LAYERS, WORTH, costs_of, make_spec

from gptailor.baselines.registry import cuts
from gptailor.commands.check import check
from gptailor.commands.subjects import find_subjects
from gptailor.launch.engine import prepare
from gptailor.measures import hypervolume, pareto_front
from gptailor.plan import evenly
from gptailor.results import scores
from gptailor.results.frames import compare, tradeoffs
from gptailor.results.frames.view import View
from gptailor.results.report import write_report
from gptailor.results.story import run_json
from gptailor.results.story_text import run_text, runs_text
from gptailor.results.summary import run_summary
from gptailor.schedule import n_examples
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.search.selection import FINALISTS, finalists
from gptailor.search.space import build_space, initial_design
from gptailor.search.suggest import Suggester, size_of
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Baseline
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import RunStatus


@pytest.mark.parametrize("aim", ["front", "mean"])
def test_the_search_looks_at_every_size(tmp_path: Path, aim: str) -> None:
    """Deeper layers cost less to remove: of each size that was tried at all, and of each number, plans of the model."""
    spec = make_spec(remove={"from": 2, "to": 8}, trials=66, aim=aim)
    space = build_space(spec, N_LAYERS)
    initial = initial_design(space, [("base", list(range(N_LAYERS)))])[:8]
    suggester = Suggester(spec, space, initial, tmp_path)
    assert suggester._smac.scenario.count_objectives() == (3 if aim == "front" else 2)
    numbers, best = list[int](), dict[int, float]()
    for _ in range(spec.trials):
        asked = suggester.ask()
        assert asked is not None
        costs = costs_of(asked.plan, 2)
        suggester.tell(asked, costs)
        numbers.append(len(asked.plan.removed))
        best[numbers[-1]] = min(best.get(numbers[-1], 9.0), sum(costs))
    assert set(numbers) == set(space.removals)
    told = [value.cost for value in suggester._smac.runhistory.values()]
    plans = [space.decode(config) for config in suggester._smac.runhistory.get_configs()]
    assert {row[-1] for row in told} == {size_of(plan) for plan in plans}  # type: ignore[index]
    shallow = WORTH[:4].sum() / WORTH.sum()  # what a cut of the first four layers loses: far from the best of its size
    assert best[4] / 2 < shallow


def test_spread_has_both_ends() -> None:
    assert evenly(range(4, 13), 5) == [4, 6, 8, 10, 12] and evenly(range(4, 13), 3) == [4, 8, 12]
    assert evenly(range(3, 5), 3) == [3, 4] and evenly(range(8, 9), 3) == [8]
    for low in range(1, 5):
        for high in range(low, 30):
            found = evenly(range(low, high + 1), 5)
            assert found[0] == low and found[-1] == high and found == sorted(set(found)) and len(found) <= 5


@pytest.fixture(scope="module")
def ranged(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A search of the tiny family's plans less 1 to 4 of 6 layers, gone on with after 6 trials; with a selection."""
    changes = ["remove={from: 1, to: 4}", "trials=6", "budget={min: 6, max: 12, eta: 2}"]
    folder = prepare(tmp_path_factory.mktemp("runs"), load_spec(run_file, changes))
    assert run_engine(folder, Report(io.StringIO())) is RunStatus.FINISHED
    before = queries.read_run(folder).trials
    more = ["trials=12", "selection=[{benchmark: first_words, split: 'validation[12:40]'}]"]
    folder.spec.write_text(load_spec(folder.spec, more).to_yaml())
    told = io.StringIO()
    assert run_engine(folder, Report(told)) is RunStatus.FINISHED
    assert "was stored for another configuration" not in told.getvalue(), "its trials are asked for again, and told"
    after = queries.read_run(folder).trials
    assert after.config_id[: len(before)].tolist() == before.config_id.tolist() and len(after) == 12
    return folder


def test_the_engine_searches_a_range(ranged: RunFolder) -> None:
    tables = queries.read_run(ranged)
    assert (tables.runs.n_layers.iloc[0], tables.runs.n_removed.iloc[0]) == (6, 4)
    assert set(tables.kept_layers) <= {2, 3, 4, 5} and len(set(tables.kept_layers)) > 2
    references = {s for s in tables.evaluations.subject if s.startswith("baseline:")}
    assert references == {f"baseline:block_influence_less_{number}" for number in (1, 3, 4)}
    judged = tables.evaluations[tables.evaluations.split == "validation[12:40]"]
    judged_sizes = {int(tables.kept_layers[config]) for config in judged.config_id.dropna()}
    assert judged_sizes == {int(tables.kept_layers[config]) for config in scores.searched(tables).average.index}


def test_baselines_cut_at_the_ends_and_the_middle(ranged: RunFolder) -> None:
    spec = load_spec(ranged.spec, ["operations=[remove]", "candidates={}"])
    found = cuts(spec, [Baseline.LAST, Baseline.BESA], 6)
    assert [(cut.n_removed, str(cut.subject)) for cut in found[:3]] == [
        (number, f"baseline:last_less_{number}") for number in (1, 3, 4)
    ]
    assert found[-1].subject.label == "besa_less_4 (zeros, not smaller) on base"
    plain = load_spec(ranged.spec, ["operations=[remove]", "candidates={}", "remove=2"])
    assert [str(cut.subject) for cut in cuts(plain, [Baseline.LAST], 6)] == ["baseline:last"]


def test_the_check_says_it(ranged: RunFolder) -> None:
    spec = load_spec(ranged.spec)
    found = check(spec)
    assert found.problems == () and found.family is not None
    assert found.family.removal.startswith("1 to 4 of 6 layers go, ") and found.family.removal.endswith("an objective")
    assert found.family.longest == found.family.most_kept
    one = load_spec(ranged.spec, ["budget.min=12"])
    two_more = 2 * 2 * 12  # one-shot cuts, on 12 examples of two objectives
    assert n_examples(one) - n_examples(one.removing(2)) == two_more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of plans less 4 to 12 of 30 layers, which used a selection."""
    return make_run(
        tmp_path_factory.mktemp("made"),
        n_trials=120,
        n_removed=12,
        fewest_removed=4,
        failures=0.0,
        selection=("boolq_local",),
    )


def test_every_size_has_one_best_plan(made: RunFolder) -> None:
    tables = queries.read_run(made)
    found, best = scores.searched(tables), scores.best_of_sizes(tables)
    assert best["kept_layers"].tolist() == sorted(set(tables.kept_layers[found.average.index]), reverse=True)
    for row in best.itertuples():
        same_size = found.average[tables.kept_layers[found.average.index] == row.kept_layers]
        if row.selection != row.selection:  # NaN: nobody of this size was judged
            assert row.average == same_size.max()
    chosen = scores.best(tables)
    assert chosen is not None and chosen.config_id in set(best["config_id"]), "the best of all is the best of its size"
    plain = make_run(made.root.parent / "plain", n_trials=20)
    assert scores.best_of_sizes(queries.read_run(plain)).empty


def test_size_is_an_objective_everywhere_alike(made: RunFolder) -> None:
    tables = queries.read_run(made)
    view, found = View(tables), scores.searched(tables)
    assert found.size is not None
    points = found.rising.assign(size=-found.size).to_numpy(float)
    assert sorted(found.front) == sorted(found.average.index[pareto_front(points)])
    assert {tables.kept_layers[config] for config in found.front} >= {18}, "the shortest size is on the front"
    on_page = view.plans.loc[tradeoffs.front_of_all(view.plans, view.facts), "config_id"].astype(int).tolist()
    assert on_page == found.front == [plan["config_id"] for plan in run_json(made)["front"]]
    assert found.knee == tradeoffs.knee_of_all(view.plans, view.facts)
    gone = found.gains.assign(size=1 - tables.kept_layers[found.gains.index] / 30)
    volume = hypervolume(gone.to_numpy(float), [0.0] * 3)
    assert [found.hypervolume, tradeoffs.hypervolume_of_all(view.plans, view.facts)] == pytest.approx([volume] * 2)
    assert run_summary(made).hypervolume == pytest.approx(volume)


def test_the_best_of_each_size_are_told_alike(made: RunFolder, tmp_path: Path) -> None:
    tables = queries.read_run(made)
    view, best = View(tables), scores.best_of_sizes(tables)
    configs = best["config_id"].tolist()
    story = json.loads(json.dumps(run_json(made)))
    assert [plan["config_id"] for plan in story["sizes"]] == configs
    text = run_text(story)
    assert "4 to 12 of 30 layers removed" in text and "The best plan of each size:" in text
    assert f"{best['kept_layers'].iloc[-1]} layers  config {configs[-1]}" in text
    assert "-4 to 12 of 30" in runs_text(made.root)
    assert [one.config_id for one in find_subjects(made, ["sizes"])] == configs
    shown = tradeoffs.of_sizes(tables, view.plans, view.facts)
    assert shown["Plan"].tolist() == [f"Plan {config}" for config in configs]
    assert set(configs) <= set(finalists(made)) and len(finalists(made)) >= FINALISTS
    report = write_report(made, tmp_path / "report.html").read_text()
    assert "4 to 12 of 30 layers" in report and "best plan of each size" in report and "Layers kept against" in report
    plain = make_run(tmp_path / "plain", n_trials=40, n_removed=8, failures=0.0)
    both = compare.entries([("range", view), ("eight", View(queries.read_run(plain)))])
    table = compare.of_sizes(both)
    assert table["Layers kept"].tolist() == best["kept_layers"].tolist()
    assert table.set_index("Layers kept")["eight"].ne("–").tolist() == [kept == 22 for kept in best["kept_layers"]]
    axes = compare.first_axes(both)
    assert axes is not None and [axis.column for axis in axes] == ["kept_layers", "average"]
