"""`make gpu-check` on a CPU: what it can do there is right, and what is wrong makes it fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import gpu_check


def test_its_cpu_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {name: gpu_check.ARCHITECTURES[name] for name in ("qwen3", "gemma2")}
    monkeypatch.setattr(gpu_check, "ARCHITECTURES", kinds)
    parts = [part for part in gpu_check.PARTS if part != "whole"]
    asked = ["--device", "cpu", "--small", "--parts", ",".join(parts), "--out", str(tmp_path / "found.json")]
    assert gpu_check.main(asked) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(dict.fromkeys(check["part"] for check in found["checks"])) == parts
    right = [check["name"] for check in found["checks"] if check["ok"]]
    assert "qwen3, bfloat16, direct" in right and "gemma2, float32, tree" in right and len(right) == 14
    assert "x our time at its best batch" in capsys.readouterr().out


def test_a_wrong_number_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks that let an option see its neighbours change the numbers of trees, and leave those of rows."""
    from gptailor.evaluate import attention

    monkeypatch.setattr(gpu_check, "ARCHITECTURES", {"gemma2": gpu_check.ARCHITECTURES["gemma2"]})
    monkeypatch.setattr(attention.PackMasks, "of_block", lambda _self, _number, _keys, _window: None)
    asked = ["--device", "cpu", "--small", "--parts", "paths", "--out", str(tmp_path / "found.json")]
    assert gpu_check.main(asked) == 1
    said = capsys.readouterr().out
    assert "WRONG   paths: gemma2, float32, tree" in said and "ok      paths: gemma2, float32, rows" in said


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "torch sees no GPU here; `--device cpu --small`" in capsys.readouterr().out


def test_what_no_time_is_left_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--device",
        "cpu",
        "--small",
        "--parts",
        "merging",
        "--minutes",
        "0",
        "--out",
        str(tmp_path / "found.json"),
    ]
    assert gpu_check.main(asked) == 0
    assert "skipped: 0 minutes are over" in capsys.readouterr().out
