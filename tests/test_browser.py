"""The dashboard in a real browser: a search launched, watched, understood, compared and taken home.

Debian's Chromium, driven by Playwright; skipped where there is none. Screenshots of every page go to `screenshots/`,
which git ignores: look at them.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from make_runs import make_run

from gptailor import launch
from gptailor.store import RunFolder, run_folders
from gptailor.store.notes import Notes, write_notes
from gptailor.trial import RunStatus

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "screenshots"
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 600_000
"""Milliseconds for what takes a search or an export; two busy cores may be slow."""
PAGES = ("Home", "Launch", "Compare", "Progress", "Fidelity", "Trade-offs", "Layers", "Models")
# Streamlit's client looks for its server under the page's own path before it looks at the root.
HARMLESS = re.compile(r"/[\w-]+/_stcore/(health|host-config)$")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


class Server:
    """`streamlit run` on a free port, over a runs folder of its own."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py"]
        command += ["--server.port", str(port), "--server.headless", "true", "--server.fileWatcherType", "none"]
        environment = {**os.environ, "GPTAILOR_RUNS": str(self.runs), "HF_HUB_OFFLINE": "1"}
        with open(self.runs.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(f"{self.url}/_stcore/health"), 120)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.25)
    return found


class Visitor:
    """A browser tab, and everything it complained about."""

    def __init__(self, browser: Any, url: str, *, dark: bool = False, width: int = 1280) -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", timezone_id="UTC"
        )
        self.page = context.new_page()
        self.page.set_default_timeout(120_000)
        self.url, self.complaints = url, list[str]()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not HARMLESS.search(message.location.get("url", "")):
            self.complaints.append(f"console: {message.text} {message.location.get('url', '')}")

    def _request(self, request: Any) -> None:
        """Nothing may be asked of anybody else: the dashboard works offline and tells nobody."""
        if not request.url.startswith((self.url, "data:", "blob:", self.url.replace("http", "ws", 1))):
            self.complaints.append(f"asked elsewhere: {request.url}")

    def open(self, path: str = "/") -> None:
        self.page.goto(self.url + path)
        self.settle()

    def settle(self) -> None:
        """Until the page's script has run, everything it sent is drawn, and nothing broke."""
        self.page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
        self.page.wait_for_selector('[data-testid="stSkeleton"]', state="detached")
        self.page.wait_for_timeout(300)
        self.no_complaints()

    def no_complaints(self) -> None:
        assert self.page.locator('[data-testid="stException"]').count() == 0, self.text()
        assert self.complaints == []

    def text(self) -> str:
        return str(self.page.locator('[data-testid="stMain"]').inner_text())

    def go(self, title: str) -> None:
        """To another page, by the navigation."""
        self.page.locator('[data-testid="stSidebar"]').get_by_role("link", name=title, exact=True).click()
        self.page.get_by_role("heading", name=title, exact=True, level=1).wait_for()
        self.settle()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=False)

    def tick(self, *rows: int) -> None:
        """Tick rows of the table of runs, which is drawn on a canvas."""
        box = self.page.locator('[data-testid="stDataFrame"] canvas').first.bounding_box()
        for row in rows:
            self.page.mouse.click(box["x"] + 17, box["y"] + 36 + 35 * row + 17)
            self.page.wait_for_timeout(600)
        self.settle()

    def shoot(self, name: str) -> None:
        """A picture of the whole page."""
        SHOTS.mkdir(exist_ok=True)
        size = self.page.viewport_size
        height = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": size["width"], "height": max(900, min(height, 8000))})
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=SHOTS / f"{name}.png")
        self.page.set_viewport_size(size)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dashboard over two finished runs, and one with a hostile name."""
    runs = tmp_path_factory.mktemp("dashboard") / "runs"
    make_run(runs, "first", n_trials=80, seed=1)
    make_run(runs, "second", n_trials=60, seed=2)
    odd = make_run(runs, "odd", n_trials=40, seed=3, benchmarks=("a", "b", "c/word_perplexity"))
    write_notes(
        odd, Notes("<script>alert(1)</script> **b** :red[x] مرحبا", "<img src=x onerror=alert(1)>", ("=cmd()",))
    )
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
    made.page.context.close()


def run_called(server: Server, name: str) -> RunFolder:
    return next(folder for folder in run_folders(server.runs) if f"-{name}-" in folder.run_id)


@pytest.fixture(scope="module")
def demo(browser: Any, server: Server) -> RunFolder:
    """The demo search, shortened to Hyperband's first bracket, launched from the Launch page with a double click."""
    visitor = Visitor(browser, server.url)
    visitor.open("/Launch?preset=demo")
    page = visitor.page
    page.get_by_text("Budget and time").click()
    page.get_by_label("Trials", exact=True).fill("13")
    page.get_by_label("Trials", exact=True).press("Tab")
    page.get_by_label("Name of the run").fill("browser demo")
    page.get_by_label("Name of the run").press("Tab")
    page.get_by_text("The models fit together").wait_for(timeout=PATIENCE)
    visitor.settle()
    visitor.shoot("launch-checked")
    start = visitor.button("Start the search")
    start.dblclick()
    page.get_by_text(re.compile("browser demo is (queued|running)")).wait_for()
    visitor.settle()
    assert len([folder for folder in run_folders(server.runs) if "-browser-demo-" in folder.run_id]) == 1
    page.get_by_role("link", name="Watch it").click()
    page.get_by_role("heading", name="Progress", level=1).wait_for()
    until(lambda: "13" in visitor.text() and "Running" in visitor.text() or "Finished" in visitor.text(), 120)
    visitor.shoot("progress-live")
    page.locator('[data-testid="stMain"]').get_by_text("Finished", exact=True).first.wait_for(timeout=PATIENCE)
    visitor.settle()
    visitor.shoot("progress-finished-demo")
    page.context.close()
    return run_called(server, "browser-demo")


def test_a_search_is_launched_once_and_watched_to_its_end(server: Server, demo: RunFolder, visitor: Visitor) -> None:
    visitor.open(f"/Progress?run={demo.run_id}")
    assert "13" in visitor.text() and "Finished" in visitor.text()
    assert not launch.is_alive(demo)


def test_a_model_is_exported_and_answers(server: Server, demo: RunFolder, visitor: Visitor) -> None:
    visitor.open(f"/Models?run={demo.run_id}")
    visitor.button("Export as a Hugging Face folder").click()
    visitor.page.get_by_text("Exported, reloaded and compared").wait_for(timeout=PATIENCE)
    [out] = [path for path in (server.runs.parent / "exports").iterdir() if not path.name.startswith(".")]
    assert (out / "model.safetensors").is_file() and (out / "README.md").is_file()
    visitor.page.get_by_label("Your text").fill("<b>12 + 7 =</b>")
    visitor.button("Generate").click()
    visitor.page.get_by_text("Dense base", exact=False).first.wait_for(timeout=PATIENCE)
    visitor.page.get_by_text("tokens/s").nth(1).wait_for(timeout=PATIENCE)
    visitor.settle()
    visitor.shoot("models-answers")


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_by_its_link(browser: Any, server: Server, theme: str, width: int) -> None:
    first, second = run_called(server, "first"), run_called(server, "second")
    visitor = Visitor(browser, server.url, dark=theme == "dark", width=width)
    for title in PAGES:
        path = "/" if title == "Home" else f"/{title}?run={first.run_id}&runs={first.run_id},{second.run_id}"
        visitor.open(path)
        assert visitor.page.get_by_role("heading", name=title, exact=True, level=1).count() == 1
        if title == "Launch":
            visitor.button("Check again").wait_for(timeout=PATIENCE)
            visitor.settle()
        visitor.page.wait_for_timeout(1200)  # charts draw themselves after the script
        visitor.shoot(f"{title.lower()}-{theme}-{width}")
        visitor.no_complaints()
        wide = visitor.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{title} is wider than the window by {wide} px"
    visitor.page.context.close()


def test_every_page_by_navigation_keeps_the_run(server: Server, visitor: Visitor) -> None:
    run = run_called(server, "second")
    visitor.open(f"/Progress?run={run.run_id}")
    for title in ("Fidelity", "Trade-offs", "Layers", "Models", "Progress"):
        visitor.go(title)
        assert f"run={run.run_id}" in visitor.page.url
    for title in ("Launch", "Compare", "Home"):
        visitor.go(title)


def test_hostile_names_are_text_everywhere(server: Server, visitor: Visitor) -> None:
    odd, first = run_called(server, "odd"), run_called(server, "first")
    asked: list[str] = []
    visitor.page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    for title in PAGES:
        path = "/" if title == "Home" else f"/{title}?run={odd.run_id}&runs={odd.run_id},{first.run_id}"
        visitor.open(path)
        visitor.page.wait_for_timeout(800)
    assert asked == []
    assert visitor.page.locator('[data-testid="stMain"] script').count() == 0


def test_a_click_on_the_front_picks_the_plan(server: Server, visitor: Visitor) -> None:
    run = run_called(server, "first")
    visitor.open(f"/Trade-offs?run={run.run_id}")
    before = re.search(r"config=(\d+)", visitor.page.url)
    points = visitor.page.locator('[data-testid="stVegaLiteChart"]').first.locator("path[aria-roledescription='point']")
    points.first.wait_for()
    for index in range(points.count()):
        points.nth(index).click(force=True)
        visitor.page.wait_for_timeout(1500)
        visitor.settle()
        after = re.search(r"config=(\d+)", visitor.page.url)
        if after and (before is None or after[1] != before[1]):
            break
    else:
        pytest.fail("no click changed the plan")
    assert f"Layers of plan {after[1]}" in visitor.text()


def test_two_ticked_runs_are_compared(server: Server, visitor: Visitor) -> None:
    visitor.open()
    visitor.tick(0, 1)
    visitor.button("Compare").click()
    visitor.page.get_by_role("heading", name="Compare", level=1).wait_for()
    visitor.settle()
    assert len(re.search(r"runs=([^&]+)", visitor.page.url)[1].split("%2C")) == 2  # type: ignore[index]


def test_naming_and_deleting(server: Server, visitor: Visitor) -> None:
    folder = make_run(server.runs, "short lived", n_trials=4)
    visitor.open()
    row = [found.run_id for found in reversed(run_folders(server.runs))].index(folder.run_id)
    visitor.tick(row)
    visitor.button("Name, note, tags").click()
    visitor.page.get_by_role("dialog").get_by_label("Name").fill("Doomed")
    visitor.page.get_by_role("dialog").get_by_role("button", name="Save").click()
    visitor.page.get_by_role("dialog").wait_for(state="detached")
    visitor.settle()
    visitor.button("Delete").click()
    dialog = visitor.page.get_by_role("dialog")
    field = dialog.get_by_label("Type the run's name")
    field.fill("Doomed")
    field.press("Tab")
    dialog.get_by_role("button", name="Delete for good").click()
    until(lambda: not folder.path.exists(), 60)
    visitor.settle()


def test_a_killed_server_leaves_the_engine_running(browser: Any, tmp_path: Path) -> None:
    server = Server(tmp_path / "runs")
    server.runs.mkdir()
    server.start()
    visitor = Visitor(browser, server.url)
    visitor.open("/Launch?preset=demo")
    visitor.page.get_by_text("The models fit together").wait_for(timeout=PATIENCE)
    visitor.button("Start the search").click()
    visitor.page.get_by_text(re.compile("demo is (queued|running)")).wait_for()
    [folder] = run_folders(server.runs)
    try:
        until(folder.database.exists, 120)
        server.kill()
        visitor.page.context.close()
        time.sleep(1)
        assert launch.is_alive(folder), "the engine died with the server"
        server.start()
        again = Visitor(browser, server.url)
        again.open(f"/Progress?run={folder.run_id}")
        again.page.locator('[data-testid="stMain"]').get_by_text("Running", exact=True).first.wait_for()
        again.button("Stop").first.click()
        again.page.get_by_role("dialog").get_by_role("button", name="Stop the run").click()
        until(lambda: not launch.is_alive(folder), 120)
        again.page.locator('[data-testid="stMain"]').get_by_text("Stopped", exact=True).first.wait_for()
        again.no_complaints()
        again.page.context.close()
    finally:
        server.kill()
        launch.stop(folder, patience=1.0)


def test_an_empty_store_is_not_empty_of_words(browser: Any, tmp_path: Path) -> None:
    server = Server(tmp_path / "runs")
    server.runs.mkdir()
    server.start()
    try:
        visitor = Visitor(browser, server.url)
        for title in PAGES:
            visitor.open("/" if title == "Home" else f"/{title}")
            assert len(visitor.text()) > len(title) + 40
            visitor.shoot(f"{title.lower()}-empty")
        visitor.page.context.close()
    finally:
        server.kill()


def test_failed_and_lost_runs(browser: Any, tmp_path: Path) -> None:
    server = Server(tmp_path / "runs")
    failed = make_run(server.runs, "failed", n_trials=12, failures=1.0, status=RunStatus.FAILED)
    lost = make_run(server.runs, "lost", n_trials=30, status=RunStatus.RUNNING)
    single = make_run(server.runs, "single", n_trials=1)
    server.start()
    try:
        visitor = Visitor(browser, server.url)
        for folder, name in ((failed, "failed"), (lost, "lost"), (single, "single")):
            for title in ("Progress", "Fidelity", "Trade-offs", "Layers", "Models"):
                visitor.open(f"/{title}?run={folder.run_id}")
                visitor.shoot(f"{title.lower()}-{name}")
        visitor.page.context.close()
    finally:
        server.kill()
