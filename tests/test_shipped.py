"""What travels with gptailor: a wheel that is built here holds it, and works in a folder that holds nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from gptailor import shipped
from gptailor.dashboard import access
from gptailor.spec.files import load_spec

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("data/presets", "data/demo", "data/benchmarks", "data/experiments", "pages", ".streamlit")
"""Folders beside the package from which a wheel takes something."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of this checkout (setuptools builds beside its sources), unpacked as pip unpacks it."""
    copy, built, place = (tmp_path_factory.mktemp(name) for name in ("checkout", "wheel", "site"))
    for folder in ("gptailor", *BESIDE):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "secrets.toml"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE", "streamlit_app.py"):
        shutil.copy(ROOT / name, copy / name)
    stale = copy / "build" / "lib" / "gptailor" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=120)
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(place)
    return place


@pytest.fixture
def elsewhere(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, whose child processes find gptailor in the wheel alone."""
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    monkeypatch.delenv("GPTAILOR_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_wheel_holds_every_module_and_what_is_beside_the_package(wheel: Path) -> None:
    committed = subprocess.run(
        ["git", "ls-files", "gptailor", *BESIDE, "streamlit_app.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {name if name.startswith("gptailor/") else f"gptailor/files/{name}" for name in committed}
    expected -= {f"gptailor/files/{name}" for name in committed if name.startswith("data/") and name.endswith(".py")}
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert expected - held == set()
    assert {name for name in held - expected if not name.startswith("gptailor-")} == set()


def test_it_says_what_it_needs_and_under_which_licence(wheel: Path) -> None:
    (about,) = wheel.glob("gptailor-*.dist-info")
    text = (about / "METADATA").read_text()
    asked = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert text.count("\nRequires-Dist: ") == len(asked) and "\nRequires-Dist: torch==" in text
    assert "\nLicense-Expression: Apache-2.0" in text and (about / "licenses" / "LICENSE").is_file()
    assert "gptailor = gptailor.__main__:entry" in (about / "entry_points.txt").read_text()


def test_a_search_on_the_demo_from_an_empty_folder(elsewhere: Path) -> None:
    changes = ("trials=1", "budget.min=5", "budget.max=5", "candidates={}", "operations=[remove]")
    command = [sys.executable, "-m", "gptailor", "search", "data/presets/demo.yaml"]
    done = subprocess.run(
        [*command, *(word for change in changes for word in ("--set", change))],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    (asked,) = (elsewhere / "data" / "runs").glob("*/run.yaml")
    assert "base_model: data/demo/models/base" in asked.read_text(), "a run names no place of a machine"


def test_the_dashboard_offers_the_demo_from_an_empty_folder(elsewhere: Path) -> None:
    own = elsewhere / "data" / "presets"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# Mine\n" + load_spec("data/presets/demo.yaml").to_yaml())
    code = """
import sys
from streamlit.testing.v1 import AppTest
from gptailor import shipped
from gptailor.dashboard import form
assert shipped.ROOT.parts[-2:] == ("gptailor", "files"), shipped.ROOT
home = AppTest.from_file(str(shipped.ROOT / "streamlit_app.py"), default_timeout=60).run()
assert not home.exception and any("demo" in str(table.value) for table in home.dataframe), home
demo, *others = form.presets()
assert demo.path.stem == "demo" and "mine" in [preset.path.stem for preset in others]
assert "search data/presets/demo.yaml" in form.command_line(demo.spec, demo, form.Path("data/runs"))
"""
    environment = os.environ | {access.OPEN: "1"}  # AppTest reads no configuration beside the script
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("elsewhere")
def test_the_dashboard_command_serves() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "gptailor", "dashboard", "--port", str(port)], stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                    assert b'"ready":true' in answer.read()
                    assert answer.headers["x-frame-options"] == "DENY", "our own server, not Streamlit's plain one"
                    return
            except OSError:
                assert server.poll() is None, Path("log").read_text()
                time.sleep(0.1)
        raise AssertionError(Path("log").read_text())
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_ones_own_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = "data/presets/demo.yaml"
    assert shipped.find(demo) == ROOT / demo and shipped.name_of(ROOT / demo) == demo
    own = tmp_path / demo
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\n")
    assert shipped.find(demo) == Path(demo) and shipped.name_of(ROOT / demo) == str(ROOT / demo)


@pytest.mark.parametrize("name", ["README.md", "data/none.yaml", "data/../README.md", "/data/presets/demo.yaml"])
def test_nothing_but_data_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find(name) == Path(name)
