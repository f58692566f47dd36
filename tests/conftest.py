"""Tiny real models, made once a test session: the whole engine runs on them in seconds and without a network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes side by side share the processors
from helpers.command_line import write_benchmark
from helpers.families import save_family, tiny_config

pytest_plugins = ["helpers.slow_tests"]


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `math`, `code` and `prose`: Llamas of 6 layers, float32. Read it, do not change it."""
    return save_family(tmp_path_factory.mktemp("tiny_family"), tiny_config())


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., object]:
    """make_spec(folder, remove=2): a run over a family's folder, whose every sub-folder but `base` is a candidate."""
    from gptailor.spec.files import build_spec

    def make(folder: Path, **changes):
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "base")
        data = {
            "name": "tiny",
            "base_model": str(folder / "base"),
            "candidates": {name: str(folder / name) for name in names},
            "remove": 1,
            "objectives": [{"benchmark": "none"}],
            "device": "cpu",
        }
        return build_spec(data | changes)

    return make


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_family("qwen3", tie_word_embeddings=True): a family of another architecture (see tiny_config)."""

    def make(model_type: str, *, dtype: str = "float32", candidates: tuple[str, ...] = ("math", "code"), **changes):
        folder = tmp_path_factory.mktemp(model_type)
        return save_family(folder, tiny_config(model_type, **changes), dtype=dtype, candidates=candidates)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB. Mounting needs rights that a developer's machine may not give."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; a file size limit stands in for it in test_store_faults.py")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dashboard's folder of runs, empty, and no shipped example beside it."""
    from gptailor.dashboard import readers

    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run_file(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of the tiny family: two benchmarks, three rungs, 24 trials."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmark(folder, "first_words", 60, 0)
    write_benchmark(folder, "other_words", 40, 3)  # fewer examples than the highest rung
    spec = {
        "name": "tiny search",
        "base_model": str(tiny_family / "base"),
        "candidates": {name: str(tiny_family / name) for name in ("math", "code")},
        "remove": 2,
        "objectives": [
            {"benchmark": "first_words", "metric": "acc"},
            {"benchmark": "other_words", "metric": "acc_norm"},
        ],
        "include_path": [str(folder)],
        "budget": {"min": 6, "max": 54},
        "trials": 24,
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path
