"""The dashboard in a real browser: every page by its link, other people's text, runs that went otherwise, no runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, PAGES, Server, Visitor, run_called
from helpers.make_runs import make_run

from gptailor.launch.engine import EngineLock
from gptailor.store.notes import Notes, write_notes
from gptailor.trial import RunStatus

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

SCRIPT = "<script>alert(1)</script>"
HOSTILE = f"{SCRIPT} **b** :red[x] $y$ \u202eمرحبا [l](http://e.vil) ![i](http://e.vil/x.png) " + "long " * 40  # noqa: RUF001 (Arabic)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


@pytest.mark.parametrize("title", PAGES)
def test_every_page_by_its_link(server: Server, visitor: Visitor, title: str) -> None:
    first, second = run_called(server, "first"), run_called(server, "second")
    visitor.open(title, run=first.run_id, runs=f"{first.run_id},{second.run_id}")
    for width in (1280, 1920):
        for theme in ("light", "dark"):
            visitor.shoot(f"{title.lower()}-{theme}-{width}", dark=theme == "dark", width=width)


def test_other_peoples_text_is_shown_as_text(server: Server, visitor: Visitor) -> None:
    benchmarks = (SCRIPT, "**b** :red[x] $y$ [l](http://e.vil)", "مرحبا/acc", "long" * 48)
    odd = make_run(
        server.runs, "odd", n_trials=60, benchmarks=benchmarks, base_model=f"../{SCRIPT}/**m**/{'deep/' * 40}"
    )
    write_notes(odd, Notes(HOSTILE[:80], HOSTILE, ("=cmd()", SCRIPT, "مرحبا")))
    for title in ("Home", "Progress", "Trade-offs", "Compare", "Fidelity", "Layers", "Models"):
        visitor.open(title, run=odd.run_id, runs=f"{odd.run_id},{run_called(server, 'first').run_id}")
        visitor.shows(SCRIPT)
        made = "main script, img[src*='e.vil'], a[href*='e.vil'], .katex"
        assert visitor.page.locator('[data-testid="stMain"]').locator(made).count() == 0, title
        assert not [found for found in visitor.page.locator("strong").all_inner_texts() if found in ("b", "m")], title
        visitor.shoot(f"{title.lower()}-hostile")
    visitor.open("Trade-offs", run=odd.run_id)
    points = visitor.page.locator('[data-testid="stVegaLiteChart"]').first.locator("path[aria-roledescription='point']")
    points.first.hover(force=True)
    visitor.page.locator("#vg-tooltip-element.visible").wait_for()
    assert SCRIPT in visitor.page.locator("#vg-tooltip-element").inner_text()
    visitor.no_complaints()


def test_no_text_becomes_a_script_and_nothing_is_fetched_elsewhere(server: Server, visitor: Visitor) -> None:
    visitor.open("Trade-offs", run=run_called(server, "first").run_id)
    made = """async () => {
        await new Promise((done) => setTimeout(done));  // what the driver itself runs is above the policy
        const name = async (act) => { try { return await act() } catch (error) { return error.name } };
        const script = document.createElement('script');
        script.text = 'window.made = 1';
        document.body.append(script);
        return [await name(() => new Function('return 1')()), await name(() => fetch('http://else.where/')),
            typeof window.made];
    }"""
    assert visitor.page.evaluate(made) == ["EvalError", "TypeError", "undefined"]
    assert len(visitor.complaints) >= 3 and all("Content Security Policy" in said for said in visitor.complaints)


def test_runs_that_went_otherwise(server: Server, visitor: Visitor) -> None:
    runs = server.runs
    failed = make_run(runs, "failed", n_trials=12, failures=1.0, status=RunStatus.FAILED)
    lost = make_run(runs, "lost", n_trials=30, status=RunStatus.RUNNING)
    single = make_run(runs, "single", n_trials=1, status=RunStatus.STOPPED)
    three = make_run(runs, "three", n_trials=60, benchmarks=("piqa", "csqa", "wiki/word_perplexity"))
    running = make_run(
        runs, "running", n_trials=60, status=RunStatus.RUNNING, started=datetime.now(UTC) - timedelta(minutes=16)
    )
    with EngineLock(running):
        for folder, titles, said in (
            (failed, ("Progress", "Trade-offs"), "trials (so far )?failed"),
            (lost, ("Progress",), "its engine is gone"),
            (single, ("Progress", "Fidelity", "Layers"), "1 plan|Too few plans|1 of 1"),
            (three, ("Trade-offs", "Layers"), "3 objectives"),
            (running, ("Progress",), "Running"),
        ):
            for title in titles:
                visitor.open(title, run=folder.run_id)
                visitor.says(said)
                visitor.shoot(f"{title.lower()}-{folder.run_id.split('-')[2]}")


def test_a_fresh_clone_has_the_example(browser: Any, tmp_path: Path) -> None:
    fresh = Server(tmp_path / "runs")
    fresh.start()
    try:
        visitor = Visitor(browser, fresh.url)
        for title in ("Home", "Compare", "Trade-offs", "Layers"):
            visitor.open(title)
            visitor.shoot(f"{title.lower()}-fresh")
        visitor.close()
    finally:
        fresh.kill()
