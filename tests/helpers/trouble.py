"""A run in this process whose scoring meets trouble."""

from __future__ import annotations

from pathlib import Path

import yaml

from gptailor.launch.engine import prepare
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder
from helpers.command_line import write_benchmark
from helpers.warm_engines import WarmEngines

# A run in this process, whose scoring meets trouble: it sees the tokens of a pack and how many trials began and ended.
SEARCH = """
import threading
import torch
import gptailor.scoring.time_limit
from gptailor.evaluate.evaluator import Evaluator
from gptailor.search.progress import Report
from gptailor.search.engine import run_engine
from gptailor.store.folder import RunFolder
gptailor.scoring.time_limit.LATE_SECONDS = 0.5
folder = RunFolder(__import__("pathlib").Path(arguments[0]))
score = Evaluator._score
def troubled(self, model, benchmark, pack):
    begun, ended = (folder.journal.read_bytes().count(b'"event":"trial_%s"' % e) for e in (b"started", b"finished"))
    trouble(len(pack.tokens), begun, ended)
    return score(self, model, benchmark, pack)
Evaluator._score = troubled
def trouble(tokens, begun, ended):
    TROUBLE
print("ended:", run_engine(folder, Report()))
"""


def small_search(family: Path, folder: Path) -> RunSpec:
    """Twelve trials of two packs or more each; its benchmarks are written into the folder."""
    write_benchmark(folder, "first_words", 60, 0)
    write_benchmark(folder, "few_words", 60, 5)
    asked = {
        "name": "bad luck",
        "base_model": str(family / "base"),
        "candidates": {name: str(family / name) for name in ("math", "code")},
        "operations": ["remove", "select"],
        "remove": 2,
        "objectives": [{"benchmark": name, "metric": "acc"} for name in ("first_words", "few_words")],
        "include_path": [str(folder)],
        "budget": {"min": 6, "max": 54},
        "trials": 12,
        "device": "cpu",
        "batch_size": 2,  # so that a trial has several packs
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(asked))
    return load_spec(path)


def search_with(trouble: str) -> str:
    return SEARCH.replace("TROUBLE", trouble)


def troubled(warm: WarmEngines, root: Path, spec: RunSpec, trouble: str) -> tuple[RunFolder, str]:
    folder = prepare(root, spec)
    return folder, warm.run(search_with(trouble), folder.path)
