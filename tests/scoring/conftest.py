"""A tiny run file for workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.command_line import write_benchmark


@pytest.fixture(scope="module")
def run_file(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmark(folder, "first_words", 60, 0)
    write_benchmark(folder, "other_words", 40, 3)
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
