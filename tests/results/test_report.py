"""The report: one file, nothing fetched, nothing run, and every figure of a run's story in it."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree

import pytest
from helpers.redundant import family_of, model_of
from helpers.run_tables import SPEC, run_tables

from gptailor.__main__ import main
from gptailor.plan import StitchPlan
from gptailor.results import comparison
from gptailor.results.charts import held_out as charts
from gptailor.results.frames import held_out as frames
from gptailor.results.frames.compare import Entry, averages_of_runs, entries
from gptailor.results.frames.view import View
from gptailor.results.report import html
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.queries import Answers
from gptailor.trial import ItemKey

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert("x")</script><img src=http://example.com/a>'
RUN = SPEC | {
    "name": HOSTILE,
    "candidates": {"math": f"models/{HOSTILE}"},
    "held_out": [
        {"benchmark": "piqa", "metric": "acc", "split": "test"},
        {"benchmark": "arc", "metric": "acc", "split": "test"},
    ],
}
PLAN = StitchPlan.without([2], 4)
SUBJECTS = {"dense": 0.8, "candidate:math": 0.82, "baseline:sleb@math": 0.6, "config:7": 0.7}


def view(held_out: bool = True) -> View:
    found = [
        {
            "subject": subject,
            "name": f"{name}/acc",
            "score": score,
            "n_samples": 40,
            "split": "test",
            "plan_hash": subject,
        }
        for subject, score in SUBJECTS.items()
        for name in ("piqa", "arc")
        if held_out
    ]
    trials = [{"config_id": 7, "budget": 900, "scores": {"piqa/acc": 0.76, "wiki/ppl": 9.0}}]
    found += [{"subject": "dense", "name": name, "score": s, "n_samples": 900} for name, s in DENSE.items()]
    return View(run_tables(trials, {7: PLAN}, found, spec=RUN))


DENSE = {"piqa/acc": 0.8, "wiki/ppl": 8.0}
ITEMS = {
    ItemKey(subject, name, "acc", "test"): [1] * round(40 * score) + [0] * (40 - round(40 * score))
    for subject, score in SUBJECTS.items()
    for name in ("piqa", "arc")
}


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page() -> Tags:
    return Tags(html(view(), Answers(ITEMS)))


def test_nothing_of_the_run_becomes_markup(page: Tags) -> None:
    assert page.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "table",
        "tr",
        "th",
        "td",
        "img",
        "pre",
    }
    assert page.links and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    for link in page.links:
        picture = base64.b64decode(link.partition(",")[2]).decode()
        assert "<script" not in picture and not re.search(r'(href|src)="(?!#)', picture)
    assert any('<script>alert("x")</script>' in words for words in page.words), "it is shown letter for letter"


def test_it_tells_what_was_proven(page: Tags) -> None:
    text = "\n".join(page.words)
    assert "Plan 7 is ahead of sleb on math by 0.100" in text and "noise explains" in text
    assert "math, dense" in text and "McNemar" in text
    without = "\n".join(Tags(html(view(held_out=False), Answers())).words)
    assert "they flatter" in without and "What it proves" in without
    assert "No plan has a score yet" in "\n".join(Tags(html(View(run_tables(spec=RUN)), Answers())).words)


def test_what_was_known_of_the_family_is_told(page: Tags) -> None:
    family = family_of(model_of([0.5, 0.99, 0.98, 0.97]), model_of([0.5, 0.99, 0.6, 0.6], 0.9), cosine=-0.4)
    pair = replace(family.agreement[0], one=HOSTILE)
    told = Tags(html(view(), Answers(ITEMS), replace(family, agreement=[pair])))
    text = "\n".join(told.words)
    assert "A search looks promising: 3 of 4 layers look cheap" in text and "conflict in every layer" in text
    assert "script" not in told.tags and len(told.links) == len(page.links) + 5


def test_the_command_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main(["report", "run", "--runs", str(ROOT / "data" / "demo"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = Tags(out.read_text(encoding="utf-8"))
    name = queries.read_run(RunFolder(ROOT / "data" / "demo" / "run")).runs["name"].iloc[0]
    assert name in "".join(page.words) and len(page.links) >= 2
    assert main(["report", "run", "--runs", str(ROOT / "data" / "demo"), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_several_runs_side_by_side() -> None:
    said = Tags(comparison.html(HOSTILE, entries([("one", view()), (HOSTILE, view(held_out=False))]), {}))
    words = "".join(said.words)
    assert "script" not in said.tags and HOSTILE in words, "names are text"
    assert all(link.startswith("data:image/svg+xml;base64,") for link in said.links) and len(said.links) == 5
    assert "one is ahead of" in words and "wiki/ppl" in words and "Held-out results" in words
    many = Tags(comparison.html("x", entries([(f"run {n}", view()) for n in range(8)]), {}))
    assert "The 6 runs with the best averages" in "".join(many.words)
    nothing = View(run_tables(spec=RUN))
    said = Tags(comparison.html("x", entries([("a", nothing), ("b", nothing)]), {}))
    assert "none has scored a plan yet" in "".join(said.words) and not said.links


def test_the_command_sets_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        copytree(ROOT / "data" / "demo" / "run", tmp_path / name)
    out = tmp_path / "both.html"
    assert main(["report", "one", "two", "--runs", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = Tags(out.read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "demo (1)" in words and "demo (2)" in words and "the very same thing" in words and len(page.links) == 5
    assert main(["report", "one", "three", "--runs", str(tmp_path), "--out", str(out)]) == 2
    assert "run three: there is none in" in capsys.readouterr().err


def test_held_out_frames_and_chart() -> None:
    table = frames.averages(view().tables)
    assert list(table["label"]) == ["math, dense", "Dense base", "Plan 7", "sleb on math"]
    assert list(table["kind"]) == ["candidate", "dense base", "plan of the search", "one-shot cut"]
    shown = frames.shown(table)
    assert "above_chance" not in shown, "no chance is known here"
    assert shown["retention"].tolist() == pytest.approx([0.82 / 0.8, 1, 0.7 / 0.8, 0.6 / 0.8])
    assert shown["gap"].tolist()[2] == pytest.approx(0.76 / 0.8 - 0.7 / 0.8)
    wide = frames.by_benchmark(view().tables)
    assert wide["Plan 7"].tolist() == ["0.700 ± 0.010"] * 2
    spec = charts.averages(table, "config:7").to_dict()
    assert spec["layer"][0]["encoding"]["y"]["sort"] == list(table["label"])
    *searched, repaired, healed = frames.KINDS.values()
    assert spec["layer"][1]["encoding"]["color"]["scale"]["domain"] == searched, "named where there is one"
    for later in (repaired, healed):
        encoding = charts.averages(table.assign(kind=later)).to_dict()["layer"][1]["encoding"]
        assert encoding["color"]["scale"]["domain"] == [*searched, later]
        assert len(encoding["shape"]["scale"]["range"]) == len(encoding["color"]["scale"]["range"]) == 5
    data = next(iter(d for d in spec["datasets"].values() if len(d) == 1))
    assert data[0]["subject"] == "config:7"


def test_runs_are_told_apart() -> None:
    both: list[Entry] = entries([("one", view()), ("two", view())])
    table = averages_of_runs(both)
    assert len(table) == 8 and {"Plan 7 · one", "Plan 7 · two"} <= set(table["label"])
    assert averages_of_runs(entries([("one", view(held_out=False))])).empty
