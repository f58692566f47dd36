"""Several runs as one HTML page: the Compare page's tables and charts, to be sent, or at the end of an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from gptailor import wording
from gptailor.results import document
from gptailor.results.charts import compare as charts
from gptailor.results.charts import held_out as held_out_charts
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import progress as progress_charts
from gptailor.results.charts import ratios as ratio_charts
from gptailor.results.charts import theme
from gptailor.results.charts import tradeoffs as front_charts
from gptailor.results.frames import compare as frames
from gptailor.results.frames import held_out, ratios
from gptailor.results.frames.compare import Entry
from gptailor.results.frames.view import View
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.queries import Answers
from gptailor.trial import now
from gptailor.versions import VERSION

IN_ONE_CHART = len(theme.RUN_COLOURS)
"""Runs that a chart can tell apart."""


def write_comparison(title: str, folders: Sequence[RunFolder], out: Path, labels: Sequence[str] = ()) -> Path:
    """Write the page to `out`; runs are called by `labels`, or by their names.

    Raises StoreError, and UserError as document.write.
    """
    views = [View(queries.read_run(folder)) for folder in folders]
    names = labels or [view.facts.name for view in views]
    runs = frames.entries(list(zip(names, views, strict=True)))
    return document.write(out, html(title, runs, frames.answers_of(runs, folders)))


def html(title: str, runs: Sequence[Entry], answers: Mapping[str, Answers]) -> str:
    """The page. answers: what the examples gave that the limits are told by, by run."""
    title = wording.plain(title, 120)
    at = wording.moment(now())
    written = f"{wording.plural(len(runs), 'run')}. Written by gptailor {VERSION} on {at}."
    parts = [f"<h1>{escape(title)}</h1>", document.note(written)]
    if frames.share_objectives(runs) and any(entry.best is not None for entry in runs):
        parts += [
            "<h2>Which is better?</h2>",
            *_scores(runs),
            *_ratios(runs, answers),
            "<h2>How they came there</h2>",
            *_curves(runs),
        ]
    else:
        parts.append(document.note("These runs share no objective, or none has scored a plan yet."))
    parts += ["<h2>The best plans, layer by layer</h2>", *_layers(runs)]
    asked = frames.settings(runs)
    same = document.note("These runs were asked for the very same thing.")
    parts += ["<h2>What was asked</h2>", document.frame(asked) if len(asked) else same]
    return document.page(title, parts)


def _scores(runs: Sequence[Entry]) -> Iterable[str]:
    labels = [entry.label for entry in runs]
    yield document.note(frames.verdict(runs))
    yield document.note(frames.meaning(runs))
    yield document.frame(frames.score_table(frames.best_scores(runs), labels))
    of_sizes = frames.of_sizes(runs)
    if len(of_sizes):
        yield document.note(f"{runs[0].facts.average_label} of the best plan of each size:")
        yield document.frame(of_sizes)
    outside = frames.held_out_scores(runs)
    if len(outside):
        yield document.note("Held-out results, not seen by the search:")
        yield document.frame(frames.score_table(outside, labels))
    everybody = frames.averages_of_runs(runs)
    if len(everybody):
        yield document.picture(
            held_out_charts.averages(everybody.head(document.MOST_ROWS)), "Held-out averages of every run"
        )
    if len(everybody):
        yield document.frame(held_out.shown(everybody))


def _ratios(runs: Sequence[Entry], answers: Mapping[str, Answers]) -> Iterable[str]:
    points = ratios.points(runs)
    if len(points):
        curve = ratios.curve(points)
        yield "<h2>How far can it be cut?</h2>"
        yield document.picture(ratio_charts.by_ratio(curve), "Held-out average against the share of layers removed")
        yield document.frame(curve)
        yield from (document.note(limit.text) for limit in ratios.limits(points, answers))


def _curves(runs: Sequence[Entry]) -> Iterable[str]:
    chosen = frames.ranked(runs)[:IN_ONE_CHART]
    labels, facts = [entry.label for entry in chosen], runs[0].facts
    if len(chosen) < len(runs):
        yield document.note(f"The {IN_ONE_CHART} runs with the best averages.")
    by = progress_charts.TRIALS
    so_far = progress_charts.best_of_runs(
        frames.curves(chosen), by, facts.average_label, facts.average_is_share, labels
    )
    yield document.picture(so_far, f"Best {facts.average_label.lower()} so far")
    if (pair := frames.first_axes(chosen)) is not None:
        x, y = pair
        yield document.picture(
            front_charts.fronts_of_runs(frames.fronts(chosen, x, y), x, y, labels), f"{x.label}, {y.label}"
        )


def _layers(runs: Sequence[Entry]) -> Iterable[str]:
    origins, everybody = frames.best_origins(runs)
    if origins.empty:
        yield document.note("No plan has a score yet.")
        return
    yield document.note("× is removed, · is the base's own layer, letters are candidates.")
    yield document.picture(layer_charts.origins(origins, everybody), "Source of each layer of every run's best plan")
    yield document.note("Jaccard overlap of the removed layers: those removed by both, of those removed by either.")
    yield document.picture(charts.overlap(frames.removed_overlap(runs), [entry.label for entry in runs]), "Overlap")
