"""The dashboard in a real browser: a search launched, watched, understood, compared and taken home.

Debian's Chromium, driven by Playwright; skipped where there is none. Screenshots of every page go to `screenshots/`,
which git ignores: look at them. Waits are for what must come to be seen, and generous: the machine may be busy.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from make_runs import make_run

from gptailor import launch
from gptailor.dashboard import readers
from gptailor.store import RunFolder, run_folders
from gptailor.store.notes import Notes, write_notes
from gptailor.trial import RunStatus

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "screenshots"
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 600_000
"""Milliseconds until something is given up."""
PAGES = ("Home", "Launch", "Compare", "Progress", "Fidelity", "Trade-offs", "Layers", "Models")
SCRIPT = "<script>alert(1)</script>"
HOSTILE = f"{SCRIPT} **b** :red[x] $y$ \u202eمرحبا [l](http://e.vil) ![i](http://e.vil/x.png) " + "long " * 40
# Streamlit's client looks for its server under the page's own path before it looks at the root.
HARMLESS = re.compile(r"/[\w-]+/_stcore/(health|host-config)$")
SETTLED = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    const all = (name, part) =>
        [...document.querySelectorAll(`[data-testid="${name}"]`)].every((found) => found.querySelector(part));
    return app && app.dataset.testScriptState === 'notRunning' && app.dataset.testConnectionState === 'CONNECTED'
        && !document.querySelector('[data-testid="stSkeleton"]')
        && all('stVegaLiteChart', 'svg, canvas') && all('stDataFrame', 'canvas');
}"""
EVERYTHING = """() => {
    const all = (part, of) => [...document.querySelectorAll(part)].map(of);
    return [document.body.innerText, ...all('input, textarea', (field) => field.value),
        ...all('canvas table, svg text', (drawn) => drawn.textContent)].join('\\n');
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


class Server:
    """`streamlit run` on a port of its own, over a runs folder."""

    def __init__(self, runs: Path, *options: str) -> None:
        self.runs, self._options = runs, options
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py", "--server.port", str(self._port)]
        command += ["--server.headless", "true", "--server.fileWatcherType", "none", *self._options]
        environment = {**os.environ, "GPTAILOR_RUNS": str(self.runs), "HF_HUB_OFFLINE": "1"}
        with open(self.runs.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE / 1000
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


class Visitor:
    """A browser tab, and everything it complained about."""

    def __init__(self, browser: Any, url: str, *friends: str) -> None:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", timezone_id="UTC")
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.url, self.friends, self.complaints = url, friends, list[str]()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.page.on("request", self._request)
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not HARMLESS.search(message.location.get("url", "")):
            self.complaints.append(f"console: {message.text} {message.location.get('url', '')}")

    def _request(self, request: Any) -> None:
        """Nothing may be asked of anybody else: the dashboard works offline and tells nobody."""
        known = (self.url, "data:", "blob:", self.url.replace("http", "ws", 1), *self.friends)
        if not request.url.startswith(known):
            self.complaints.append(f"asked elsewhere: {request.url}")

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"a script spoke: {dialog.message}")
        dialog.dismiss()

    def open(self, title: str, **query: str) -> None:
        """A page by its link."""
        self.page.goto(f"{self.url}/{'' if title == 'Home' else title}?{urlencode(query)}")
        self.arrived(title)

    def go(self, title: str) -> None:
        """To another page, by the navigation."""
        self.page.locator('[data-testid="stSidebar"]').get_by_role("link", name=title, exact=True).click()
        self.arrived(title)

    def arrived(self, title: str) -> None:
        self.page.get_by_role("heading", name=title, exact=True, level=1).wait_for()
        if title == "Launch":
            self.says("Check again|Some fields need a change")
        self.settle()

    def settle(self) -> None:
        """Until the page's script has run, everything it sent is drawn, and nothing broke."""
        self.page.wait_for_function(SETTLED, polling=100)
        self.no_complaints()

    def no_complaints(self) -> None:
        assert self.page.locator('[data-testid="stException"]').count() == 0, self.text()
        assert self.complaints == []

    def says(self, pattern: str) -> None:
        """Until the page's text has the pattern."""
        found = "pattern => new RegExp(pattern).test(document.querySelector('[data-testid=\"stMain\"]').innerText)"
        self.page.wait_for_function(found, arg=pattern, polling=100)

    def text(self) -> str:
        return str(self.page.locator('[data-testid="stMain"]').inner_text())

    def shows(self, words: str) -> None:
        """Until the words are somewhere on the page, letter for letter: also in fields, tables and charts."""
        self.page.wait_for_function(f"words => ({EVERYTHING})().includes(words)", arg=words, polling=100)

    def chosen(self, name: str) -> str:
        """A choice in the URL."""
        return parse_qs(urlsplit(self.page.url).query).get(name, [""])[0]

    def button(self, name: str) -> Any:
        """One whose whole label is `name`; an icon's name comes before it."""
        return self.page.get_by_role("button", name=re.compile(rf"^(\w+ )?{re.escape(name)}( …)?$"))

    def dialog(self) -> Any:
        return self.page.get_by_role("dialog")

    def tick(self, *runs: RunFolder) -> None:
        """Tick runs in Home's table, which is drawn on a canvas."""
        box = self.page.locator('[data-testid="stDataFrame"] canvas').first.bounding_box()
        shown = [found.run_id for found in reversed(run_folders(runs[0].root))]
        for ticked, run in enumerate(runs, start=1):
            self.page.mouse.click(box["x"] + 17, box["y"] + 36 + 35 * shown.index(run.run_id) + 17)
            self.says(f"{ticked} runs? ticked")
        self.settle()

    def shoot(self, name: str, dark: bool = False, width: int = 1280) -> None:
        """A picture of the whole page, on which nothing is wider than the window."""
        SHOTS.mkdir(exist_ok=True)
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_timeout(400)  # drawing has no end that a page tells
        tall = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": width, "height": max(900, min(tall, 8000))})
        self.page.wait_for_timeout(400)
        self.settle()
        self.page.screenshot(path=SHOTS / f"{name}.png")
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} is wider than the window by {wide} px"

    def close(self) -> None:
        self.page.context.close()


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
        launch.stop(folder, patience=1.0)


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    made = Visitor(browser, server.url)
    yield made
    made.close()


def run_called(server: Server, name: str) -> RunFolder:
    [found] = [folder for folder in run_folders(server.runs) if f"-{name}-" in folder.run_id]
    return found


@pytest.fixture(scope="module")
def demo(browser: Any, server: Server) -> RunFolder:
    """The demo search, shortened to Hyperband's first bracket: launched from the Launch page with a double click,
    orphaned by the server's death, found again by a new server, and watched to its end."""
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
    until(lambda: launch.is_alive(folder) or "finished" in readers.status(folder))
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
    until(lambda: not launch.is_alive(demo))  # its process ends a moment after its run


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
    launch.delete_run(back)


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
    with launch.EngineLock(running):
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
