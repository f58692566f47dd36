"""The command line as tests use it, and small benchmarks for run files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import yaml

from gptailor.store.folder import RunFolder
from helpers import families
from helpers.warm_engines import shared

ROOT = Path(__file__).resolve().parents[2]

WORDS = families.WORDS[:18]


def write_benchmark(folder: Path, name: str, n: int, offset: int) -> None:
    rows = []
    for i in range(n):
        words = [WORDS[(i * 7 + offset + k) % len(WORDS)] for k in range(4)]
        choices = [words[3], WORDS[(i + 5 + offset) % len(WORDS)] + " " + WORDS[i % 5], WORDS[(i * 3 + 1) % len(WORDS)]]
        rows.append({"query": " ".join(words[:3]), "choices": choices, "gold": i % 3})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path), "test": str(path)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def gptailor(*arguments: str | Path, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, forked from one that has imported everything: no command waits for torch."""
    return shared().command(list(map(str, arguments)), timeout, environment)


def only_run(runs: Path) -> RunFolder:
    (folder,) = [path for path in runs.iterdir() if not path.name.startswith(".")]
    return RunFolder.of(runs, folder.name)
