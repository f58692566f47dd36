"""`make soak` in small: engines that need no imports, and less of everything."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.warm_engines import shared

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.soak import soak

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("gptailor.launch.engine.spawn", shared().spawn)
    rows = soak(minutes=0.3, pause=0.5)
    assert [row for row in rows if not row[3]] == []
    assert int(rows[2][1]) > 20, "browsers were answered"
