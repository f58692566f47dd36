"""What the runs of one folder share: answers of the same models to the same texts, which are read once.

The dense base, one-shot cuts and plans that are judged are the same for many runs of a family. What they answered is
kept in files beside the runs, each named by a digest of all that determines it: the tensors of the models whose layers
the plan has, the tokens and the right answers of every example that is computed together with them, settings, the way
of scoring, this package's code, versions of libraries, the device and what of the environment changes its arithmetic.
So what is taken from here is to the last bit what would be computed, and a changed weight or text has another name.

Nothing is kept before its models' files were found to be the same once more: `publish` is called after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.digests import example_digests
from gptailor.plan import BASE, StitchPlan
from gptailor.shipped import PACKAGE
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.trial import Digests
from gptailor.versions import installed_versions

FOLDER = ".shared"
"""Beside the runs. It can be deleted at any time, and costs what it saved."""
MOST_BYTES = 256 << 20
"""Of all files; those that were not used for longest go first."""
SCHEME = 2
"""Raised when the files' form changes."""
CHANGES_ARITHMETIC = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "ONEDNN_", "PYTORCH_", "TORCH_")
"""Beginnings of names of environment variables."""


class Shared:
    """One run's way to what others computed. digests: of the run's models and settings, as they are now.

    device: that the run computes on; equal ones share.
    """

    def __init__(self, folder: RunFolder, digests: Digests, device: torch.device) -> None:
        self._place = folder.root / FOLDER
        self._digests = digests
        here = [_device(), torch.cuda.get_device_name(device) if device.type == "cuda" else device.type]
        self._here = [SCHEME, code_digest(), installed_versions(), here, sorted(digests.settings.items())]
        self._fresh: dict[str, Any] = {}
        self._examples: dict[int, tuple[OpenBenchmark, list[str]]] = {}

    def key(self, what: str, plan: StitchPlan, of: object) -> str:
        """The name of something that this plan's model determines together with `of` (any JSON)."""
        names = {BASE, *(name for choice in plan.kept for name in choice.sources)}
        weights = [
            [*file, digest] for file, digest in sorted(self._digests.weights.items()) if plan.edits or file[0] in names
        ]
        return _digest([what, plan.hash, weights, self._here, of])

    def examples(self, benchmark: OpenBenchmark, first: int, end: int) -> str:
        """One digest of these examples, in their present order."""
        if id(benchmark) not in self._examples:  # the benchmark is held, so that no other can get its id
            self._examples[id(benchmark)] = benchmark, example_digests(benchmark)
        return _digest(self._examples[id(benchmark)][1][first:end])

    def take(self, key: str) -> Any | None:
        """What is kept under this name; None where nothing is, or where its file is not whole."""
        file = self._place / f"{key}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            value = kept["value"] if kept["digest"] == _digest(kept["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with suppress(OSError):  # a folder of somebody else's
            os.utime(file)
        return value

    def offer(self, key: str, value: Any) -> None:
        """Keep this (any JSON) under its name, once it is published."""
        self._fresh[key] = value

    def publish(self) -> None:
        """Let others have what was offered: the models' files are what they were before it was computed."""
        with suppress(OSError):  # what cannot be kept is computed again
            self._place.mkdir(parents=True, exist_ok=True)
            for key, value in self._fresh.items():
                text = json.dumps({"digest": _digest(value), "value": value})
                write_atomically(self._place / f"{key}.json", text, durable=False)
            if self._fresh:
                _make_room(self._place)
        self._fresh = {}


@lru_cache
def code_digest() -> str:
    """Of this package's Python files, some megabyte: whatever computes an answer is among them."""
    made = hashlib.blake2b(digest_size=16)
    for file in sorted(PACKAGE.rglob("*.py")):
        made.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return made.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _device() -> list[Any]:
    """What computes here, and how."""
    environment = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(CHANGES_ARITHMETIC))
    gpus = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    kind = [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *gpus]
    return [kind, environment]


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _make_room(place: Path) -> None:
    """Delete what was not used for longest, until all is of a bearable size."""
    files: Sequence[tuple[float, int, Path]] = sorted(_files(place), reverse=True)
    total = 0
    for _, size, file in files:
        total += size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)


def _files(place: Path) -> Iterable[tuple[float, int, Path]]:
    for file in place.glob("*.json"):
        with suppress(OSError):
            of = file.stat()
            yield of.st_mtime, of.st_size, file
