"""A run as one HTML page that can be sent to a colleague: what was asked, what was found, what that proves.

It needs nothing but the file (see `document.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gptailor import wording
from gptailor.plan import BASE
from gptailor.results import document, scores, statistics, worth
from gptailor.results.charts import held_out as held_out_charts
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import progress as progress_charts
from gptailor.results.charts import redundancy as redundancy_charts
from gptailor.results.charts import tradeoffs as front_charts
from gptailor.results.frames import held_out, layers, progress, redundancy, tradeoffs, trials
from gptailor.results.frames.view import View
from gptailor.results.outlook import outlook
from gptailor.results.redundancy import Redundancy, of_run
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.queries import Answers
from gptailor.store.stored_spec import StoredBenchmark, StoredSpec
from gptailor.trial import Subject, SubjectKind, now
from gptailor.versions import VERSION

MOST_PLANS = 16


def write_report(folder: RunFolder, out: Path) -> Path:
    """Write the page to `out`. Raises StoreError where the run cannot be read, UserError where the file cannot be."""
    tables = queries.read_run(folder)
    view = View(tables)
    answers = queries.answers_of(folder, set(scores.judged(tables)["plan_hash"].dropna()))
    return document.write(out, html(view, answers, of_run(folder)))


def html(view: View, answers: Answers, family: Redundancy | None = None) -> str:
    """The page.

    answers: of the plans that were judged on held-out benchmarks, for the paired tests. family: what was measured of it
    before the search, if it was.
    """
    facts = view.facts
    title = wording.plain(facts.name, 120)
    parts = [
        f"<h1>{escape(title)}</h1>",
        document.note(
            f"{facts.removed_text} of {facts.base_model} removed. Run {facts.run_id}, "
            f"{facts.status}. Written by gptailor {VERSION} on {wording.moment(now())}."
        ),
        "<h2>What was asked</h2>",
        _asked(view.tables.spec),
        *(_family(view, family) if family is not None else ()),
        "<h2>What was found</h2>",
        *_found(view),
        "<h2>What it proves</h2>",
        *_proves(view, answers),
        "<h2>How it was made</h2>",
        _how(view),
    ]
    return document.page(title, parts)


def _asked(spec: StoredSpec) -> str:
    def named(benchmarks: Sequence[StoredBenchmark]) -> str:
        return "; ".join(f"{one.benchmark} {one.metric} ({one.split})" for one in benchmarks) or "none"

    budget = spec.budget
    rows = [
        ("Base model", spec.base_model),
        ("Candidates", "; ".join(f"{name}: {place}" for name, place in spec.candidates.items()) or "none"),
        ("How much goes", spec.removal),
        ("Operations", ", ".join(spec.operations)),
        ("Objectives", named(spec.objectives)),
        ("Selection", named(spec.selection)),
        ("Held out", named(spec.held_out)),
        ("Examples a benchmark", f"{budget.min} to {budget.max}, by {budget.eta}"),
        ("Trials", spec.trials),
        ("Seed", spec.seed),
    ]
    if spec.baselines:
        rows.append(("Baselines instead of a search", ", ".join(spec.baselines)))
    return document.table(["", ""], rows)


def _family(view: View, family: Redundancy) -> Iterable[str]:
    """What was known of the family before the search."""
    seen = outlook(family, view.facts.n_removed, view.tables.spec.operations)
    yield "<h2>What the family promised</h2>"
    yield from map(document.note, [seen.headline, *seen.reasons])
    table, pairs = redundancy.by_layer(family), redundancy.agreement(family)
    if table["kept"].notna().any():
        yield document.picture(redundancy_charts.costs(table), "What leaving out one layer costs; framed: looks cheap")
    yield document.picture(redundancy_charts.influence(table), "How much each layer changes what it gets")
    if family.candidates:
        yield document.picture(redundancy_charts.distances(table), "Where the candidates differ from the base")
    if len(pairs):
        yield document.picture(redundancy_charts.agreement(pairs), "Whether the candidates agree")
    states = redundancy.similarity(family, BASE, "cka")
    yield document.picture(redundancy_charts.similarity(states, "cka"), "How alike the base's states are")


def _found(view: View) -> Iterable[str]:
    facts, plans = view.facts, view.plans
    by_status = view.tables.trials["status"].value_counts()
    counts = ", ".join(f"{wording.count(n)} {status}" for status, n in by_status.items()) or "none yet"
    yield document.note(
        f"Trials: {counts}. Plans are judged at {view.top_budget} examples a benchmark; ± is one standard error."
    )
    if plans.empty:
        yield document.note("No plan has a score yet.")
        return
    best = view.best_row
    assert best is not None  # there are plans
    repaired = ", repaired" if view.best_subject != Subject.config(int(best["config_id"])) else ""
    yield document.note(
        f"The best plan is {best['config_id']:.0f}{repaired}: "
        f"{wording.value(best[trials.AVERAGE], best[trials.AVERAGE_ERROR], percent=facts.average_is_share)} "
        f"({facts.average_label.lower()})."
    )
    if view.choice is not None:
        yield document.note(scores.choice_text(view.choice))
    on_front = plans[tradeoffs.front_of_all(plans, facts)].head(MOST_PLANS)
    header = ["Plan", facts.average_label, *facts.names, "Layers"]
    stored = dict(zip(view.tables.plans["config_id"], view.tables.plans["plan"], strict=True))
    rows = [
        [
            f"{row['config_id']:.0f}",
            wording.value(row["average"], row["average ±"], percent=facts.average_is_share),
            *(wording.value(row[o.name], row[o.error]) for o in facts.objectives),
            _describe(stored.get(row["config_id"])),
        ]
        for _, row in on_front.iterrows()
    ]
    yield document.note("The front: plans that no other plan beats in every objective, the best average first.")
    yield document.table(header, rows)
    grid = layers.origin_grid(view.layers, on_front, facts)
    yield document.picture(layer_charts.origins(grid, facts), "Where the layers of the front's plans come from")
    curve = progress.best_so_far(view.trials, facts)
    if len(curve):
        label, percent = facts.average_label, facts.average_is_share
        picture = progress_charts.best_so_far(curve, progress_charts.TRIALS, label, percent)
        yield document.picture(picture, f"Best {label.lower()} so far")
    axes = tradeoffs.axes(view.tables, plans, facts)
    x, y = tradeoffs.first_axes(axes, facts)
    if facts.has_range or {x.column, y.column} <= set(facts.names):
        picture = front_charts.front(tradeoffs.front(plans, x, y), x, y, None)
        yield document.picture(picture, f"{x.label} against {y.label}")
    if facts.has_range:
        yield document.note("The best plan of each size, chosen as the run chooses its best:")
        yield document.frame(tradeoffs.of_sizes(view.tables, plans, facts))
    yield from _worth(view)


def _worth(view: View) -> Iterable[str]:
    """Measured speed and memory, for the plans that have any."""
    plans = sorted(set(worth.measured(view.tables)["config_id"].dropna().astype(int)))
    for config_id in plans:
        found = worth.of_plan(view.tables, config_id)
        yield document.note(f"What plan {config_id} is worth in use, measured in turns with the dense base:")
        yield document.table(list(found.columns), found.itertuples(index=False, name=None))


def _proves(view: View, answers: Answers) -> Iterable[str]:
    table = held_out.averages(view.tables)
    if table.empty:
        yield document.note(
            "No subject was judged on every held-out benchmark yet, so the scores above are those that the search "
            "looked at: they flatter. `python -m gptailor evaluate` judges the dense base, the candidates, one-shot "
            "cuts, the best plan and the front."
        )
        return
    yield document.note(
        "Benchmarks and splits that the search never saw. Without calibration: the average less the benchmarks that "
        "the search was calibrated on, on any split. Above chance: retention counted from the score of guessing. Gap: "
        "what the search's own scores promise more than the held-out ones keep."
    )
    if table["average"].notna().any():
        yield document.picture(held_out_charts.averages(table.head(document.MOST_ROWS)), "Held-out averages")
    yield document.frame(held_out.shown(table))
    best, control = scores.judged_best(table, view.best_subject), scores.strongest(table, SubjectKind.BASELINE)
    if best and control:
        tests = statistics.paired(scores.judged(view.tables), answers, best, control)
        yield document.note(held_out.verdict(tests, best, control))
        yield document.frame(tests.drop(columns=["metric", "split"]))
    yield from map(document.note, held_out.changes(view.tables, answers))
    yield document.frame(held_out.by_benchmark(view.tables))


def _how(view: View) -> str:
    run_id = view.facts.run_id
    commands = "\n".join(f"python -m gptailor {command} {run_id}" for command in ("show", "evaluate", "report"))
    known = view.tables.versions
    return f"<pre>{escape(commands)}</pre>" + (
        document.table(["Made with", ""], sorted(known.items())) if known else ""
    )


def _describe(plan: Any) -> str:
    from gptailor.plan import StitchPlan

    try:
        return StitchPlan.from_json(json.loads(plan)).describe()
    except (TypeError, ValueError):  # a plan of another version, or none
        return "–"
