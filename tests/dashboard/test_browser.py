"""The dashboard in a real browser: a search launched, watched, understood, compared and taken home.

Debian's Chromium, driven by Playwright; skipped where there is none. Screenshots of every page go to `screenshots/`,
which git ignores: look at them. Waits are for what must come to be seen, and generous: the machine may be busy.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, PAGES, Server, Visitor, run_called, until
from helpers.make_runs import make_run

from gptailor.dashboard import readers
from gptailor.launch.engine import EngineLock, delete_run, is_alive, stop
from gptailor.store.folder import RunFolder, run_folders
from gptailor.store.notes import Notes, write_notes
from gptailor.trial import RunStatus

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

SCRIPT = "<script>alert(1)</script>"
HOSTILE = f"{SCRIPT} **b** :red[x] $y$ \u202eمرحبا [l](http://e.vil) ![i](http://e.vil/x.png) " + "long " * 40  # noqa: RUF001 (Arabic)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dashboard over two finished runs."""
    runs = tmp_path_factory.mktemp("dashboard") / "runs"
    make_run(runs, "first", n_trials=80, seed=1)
    make_run(runs, "second", n_trials=60, seed=2)
    started = Server(runs)
    started.start()
    yield started
    started.kill()
    for folder in run_folders(runs):
        stop(folder, patience=1.0)


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    made = Visitor(browser, server.url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def demo(browser: Any, server: Server) -> RunFolder:
    """The demo search, shortened to Hyperband's first bracket, survives its server.

    Launched from the Launch page with a double click, orphaned by the server's death, found again by a new server, and
    watched to its end.
    """
    visitor = Visitor(browser, server.url)
    visitor.open("Launch", preset="demo")
    page = visitor.page
    page.get_by_text("Budget and time").click()
    page.get_by_label("Trials", exact=True).fill("13")
    page.get_by_label("Trials", exact=True).press("Enter")
    visitor.says("--set trials=13")
    visitor.says("The models fit together")
    visitor.settle()
    visitor.shoot("launch-checked")
    visitor.button("Start the search").dblclick()
    visitor.says("demo is (queued|running)")
    visitor.no_complaints()
    visitor.close()
    folder = run_called(server, "demo")  # one run, though it was asked for twice

    server.kill()
    until(lambda: is_alive(folder) or "finished" in readers.status(folder))
    server.start()
    visitor = Visitor(browser, server.url)
    visitor.open("Progress", run=folder.run_id)
    visitor.says("\\d+ of 13")
    visitor.shoot("progress-live")
    visitor.says("Finished")
    visitor.says("13 of 13")
    visitor.settle()
    visitor.shoot("progress-demo")
    visitor.close()
    return folder


def test_a_search_launched_once_outlives_the_server_and_is_watched_to_its_end(demo: RunFolder) -> None:
    assert readers.status(demo) == "finished"
    until(lambda: not is_alive(demo))  # its process ends a moment after its run


def test_a_model_is_exported_and_answers(server: Server, demo: RunFolder, visitor: Visitor) -> None:
    visitor.open("Models", run=demo.run_id)
    visitor.button("Export as a Hugging Face folder").click()
    visitor.says("Exported, reloaded and compared")
    [out] = [path for path in (server.runs.parent / "exports").iterdir() if not path.name.startswith(".")]
    assert (out / "model.safetensors").is_file() and (out / "README.md").is_file()
    visitor.page.get_by_label("Your text").fill("<b>12 + 7 =</b>")
    visitor.button("Generate").click()
    visitor.says(r"Dense base[\s\S]*tokens/s[\s\S]*tokens/s[\s\S]*of memory")
    visitor.button("Cancel").wait_for(state="detached")
    visitor.settle()
    visitor.shoot("models-answers")


@pytest.mark.parametrize("title", PAGES)
def test_every_page_by_its_link(server: Server, visitor: Visitor, title: str) -> None:
    first, second = run_called(server, "first"), run_called(server, "second")
    visitor.open(title, run=first.run_id, runs=f"{first.run_id},{second.run_id}")
    for width in (1280, 1920):
        for theme in ("light", "dark"):
            visitor.shoot(f"{title.lower()}-{theme}-{width}", dark=theme == "dark", width=width)


def test_every_page_by_navigation_keeps_the_run(server: Server, visitor: Visitor) -> None:
    run = run_called(server, "second")
    visitor.open("Progress", run=run.run_id)
    for title in ("Fidelity", "Trade-offs", "Layers", "Models", "Progress"):
        visitor.go(title)
        assert visitor.chosen("run") == run.run_id
    for title in ("Launch", "Compare", "Home"):
        visitor.go(title)


def test_a_click_on_the_front_picks_the_plan_and_its_data_can_be_taken(server: Server, visitor: Visitor) -> None:
    visitor.open("Trade-offs", run=run_called(server, "first").run_id)
    before = visitor.chosen("config")
    points = visitor.page.locator('[data-testid="stVegaLiteChart"]').first.locator("path[aria-roledescription='point']")
    other = next(p for p in points.all() if f"Plan: {before};" not in str(p.get_attribute("aria-label")))
    other.click(force=True)
    visitor.page.wait_for_function("old => !location.search.includes(`config=${old}`)", arg=before, polling=100)
    visitor.says(f"Layers of plan {visitor.chosen('config')}")
    visitor.settle()
    visitor.page.get_by_text("Data and downloads").first.click()
    for kind, start in (("CSV", b"\xef\xbb\xbfconfig_id,"), ("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with visitor.page.expect_download() as coming:
            visitor.button(kind).click()
        assert Path(coming.value.path()).read_bytes().startswith(start)
    visitor.no_complaints()


def test_two_ticked_runs_are_compared(server: Server, visitor: Visitor) -> None:
    first, second = run_called(server, "first"), run_called(server, "second")
    visitor.open("Home")
    visitor.tick(second, first)
    visitor.button("Compare").click()
    visitor.arrived("Compare")
    assert set(visitor.chosen("runs").split(",")) == {first.run_id, second.run_id}
    visitor.says("Scores of the best plans")


def test_name_download_delete_and_import(server: Server, visitor: Visitor) -> None:
    folder = make_run(server.runs, "short lived", n_trials=4)
    visitor.open("Home")
    visitor.tick(folder)
    visitor.button("Name, note, tags").click()
    visitor.dialog().get_by_label("Name").fill("Doomed")
    visitor.dialog().get_by_role("button", name="Save").click()
    visitor.dialog().wait_for(state="detached")
    visitor.settle()
    with visitor.page.expect_download() as coming:
        visitor.button("Download").click()
    archive = coming.value.path()
    assert zipfile.ZipFile(archive).testzip() is None
    visitor.button("Delete").click()
    field = visitor.dialog().get_by_label("Type the run's name")
    field.fill("Doomed")
    field.press("Tab")
    visitor.dialog().get_by_role("button", name="Delete for good").click()
    until(lambda: not folder.path.exists())
    visitor.dialog().wait_for(state="detached")
    visitor.settle()
    before = set(run_folders(server.runs))
    visitor.page.get_by_text("Import a run").click()
    visitor.page.locator('input[type="file"]').set_input_files(
        {"name": "run.zip", "mimeType": "application/zip", "buffer": Path(archive).read_bytes()}
    )
    until(lambda: set(run_folders(server.runs)) - before)
    visitor.settle()
    [back] = set(run_folders(server.runs)) - before
    visitor.shows("Doomed")
    delete_run(back)


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
