"""The dashboard in a real browser: a search launched, watched, understood, compared and taken home.

Debian's Chromium, driven by Playwright; skipped where there is none. Screenshots of every page go to `screenshots/`,
which git ignores: look at them. Waits are for what must come to be seen, and generous: the machine may be busy.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, Server, Visitor, run_called, until
from helpers.make_runs import make_run

from gptailor.dashboard import readers
from gptailor.launch.engine import delete_run, is_alive
from gptailor.store.folder import RunFolder, run_folders

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


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
