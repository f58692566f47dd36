"""A run whose models and benchmarks are files of its own, so that a test may change any of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from helpers.command_line import write_benchmark


def spec_of_own_files(tiny_family: Path, folder: Path, n_examples: int, **keys: Any) -> RunSpec:
    """Two of six layers removed, one candidate, a benchmark each that is learnt from, chosen by and judged on.

    keys: of the run file, beside these; the metrics among them.
    """
    for name in ("base", "math"):
        shutil.copytree(tiny_family / name, folder / "m" / name)
    for number, name in enumerate(("learnt", "chosen", "judged")):
        write_benchmark(folder, name, n_examples, 3 * number)
    return build_spec(
        {
            "base_model": str(folder / "m" / "base"),
            "candidates": {"math": str(folder / "m" / "math")},
            "remove": 2,
            "operations": ["remove", "select"],
            "include_path": [str(folder)],
            "budget": {"min": 10, "max": 20, "eta": 2},
            "device": "cpu",
        }
        | keys
    )
