"""Engine processes in small."""

from __future__ import annotations

import time

from gptailor.launch.process import spawn
from gptailor.spec.files import build_spec
from gptailor.store.folder import RunFolder

SPEC = build_spec(
    {
        "name": "Tiny Süß",
        "base_model": "no/such/model",
        "remove": 2,
        "operations": ["remove"],
        "objectives": [{"benchmark": "piqa"}],
    }
)


def eventually(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


def shell_engine(folder: RunFolder, script: str) -> int | None:
    """A stand-in for the engine that starts at once: it holds the lock that it was handed."""
    return spawn(["/bin/sh", "-c", script], folder.lock, folder.log)
