"""What a plan is worth in use: measured on a real export of a tiny family, stored, and shown wherever one looks."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.run_tables import run_tables
from helpers.tiny_run import CONFIG, PLAN, make_tiny_run

from gptailor.__main__ import main
from gptailor.commands.export import facts_of
from gptailor.commands.measure import _asked, bytes_of, measure, quantities
from gptailor.errors import UserError
from gptailor.evaluate.speed import Setting, opened, prompt_of, timings
from gptailor.launch.events import Event
from gptailor.results import worth
from gptailor.results.report import write_report
from gptailor.spec.files import load_spec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import Measurement, Quantity, Subject

FEW = Setting(batches=(1, 2), prompt=6, new=4, rounds=3)
AT = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_tiny_run(tmp_path_factory.mktemp("runs"), tiny_family)


@pytest.fixture(scope="module")
def told(run: RunFolder) -> list[Event]:
    said: list[Event] = []
    (run.path / "measure-killed" / "model").mkdir(parents=True)
    measure(run, said.append)
    return said


def test_a_plan_is_measured_beside_the_dense_base_and_stored(run: RunFolder, told: list[Event]) -> None:
    tables = queries.read_run(run)
    found = worth.measured(tables)
    each = {(row.quantity, row.batch): row for row in found.itertuples()}
    assert set(each) == {(q, b) for q in ("decode", "prefill", "first_token") for b in (1, 8)} | {
        ("memory", 8),
        ("disk", 1),
    }
    assert set(found["config_id"]) == {CONFIG} and set(found["plan_hash"]) == {PLAN.hash}
    assert set(found["device"]) == {"cpu, float32"}
    disk = each["disk", 1]
    assert 0.6 < disk.ratio < 0.95 and disk.value / disk.dense == pytest.approx(disk.ratio), "4 of 6 layers"
    assert all(row.value > 0 and row.ratio > 0 and row.ratio_spread >= 0 for row in found.itertuples())
    results = [event for event in told if event.result is not None and "quantity" in event.result]
    assert len(results) == len(found) and "x dense" in results[0].text
    assert not list(run.path.glob("measure-*")), "the export is taken away, and what one that was killed had left"


def test_it_is_on_the_card_in_the_report_and_an_axis(run: RunFolder, told: list[Event], tmp_path: Path) -> None:
    from gptailor.results.frames import tradeoffs
    from gptailor.results.frames.view import View

    assert told
    tables = queries.read_run(run)
    shown = worth.of_plan(tables, CONFIG)
    assert shown["Quantity"].iloc[0] == "Decode speed, batch 1" and " x" in shown["Against dense"].iloc[0]
    card = facts_of(tables, load_spec(run.spec), CONFIG)
    assert "tokens/s beside" in card["Decode speed, batch 1, beside the dense base"]
    page = write_report(run, tmp_path / "report.html").read_text()
    assert f"What plan {CONFIG} is worth in use" in page and shown["Against dense"].iloc[0] in page
    view = View(tables)
    names = {axis.label: axis for axis in tradeoffs.axes(tables, view.plans, view.facts)}
    assert names["Decode speed, batch 8, x dense"].maximise and not names["Peak memory, batch 8, x dense"].maximise


def test_bytes_are_of_what_transformers_reads(tmp_path: Path) -> None:
    """Mistral's folders hold consolidated.safetensors, all weights once more, beside the shards."""
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 20), ("consolidated.safetensors", 30)):
        (tmp_path / name).write_bytes(bytes(size))
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert bytes_of(tmp_path) == 30


def test_medians_of_rounds_and_of_their_ratios() -> None:
    """A machine that slows down in one round slows both models, and moves no ratio."""
    rounds = [(0, 1.0, 3.0), (1, 0.5, 2.0), (0, 1.0, 3.0), (1, 0.5, 2.0), (1, 5.0, 20.0), (0, 10.0, 30.0)]
    lines = [{"model": m, "batch": 2, "prompt": 8, "new": 4, "first": f, "rest": r} for m, f, r in rounds]
    found = quantities(lines)
    decode = found[Quantity.DECODE, 2]
    assert decode[0].tolist() == [2.0, 3.0], "2 texts x 3 tokens in 3 s and in 2 s"
    assert found[Quantity.PREFILL, 2][0].tolist() == [16.0, 32.0]
    ratio = decode[:, 1] / decode[:, 0]
    assert np.allclose(ratio, 1.5) and np.ptp(decode[:, 1]) > 0


def test_models_take_turns(tiny_family: Path) -> None:
    models = [opened(str(tiny_family / name), FEW) for name in ("base", "math")]
    found = list(timings(models, FEW))
    assert [one.model for one in found if one.batch == 1] in ([1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1])
    assert all(one.first > 0 and one.rest > 0 for one in found) and len(found) == 2 * 2 * 3


def test_a_prompt_fits_into_the_window(tiny_family: Path) -> None:
    model = opened(str(tiny_family / "base"), FEW)
    window = model.config.max_position_embeddings
    assert prompt_of(model, Setting(prompt=10 * window, new=4)) == window - 4
    assert prompt_of(model, FEW) == FEW.prompt


def test_memory_is_at_least_the_weights(tiny_family: Path) -> None:
    model = opened(str(tiny_family / "base"), FEW)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    [told] = _asked(
        "memory", [str(tiny_family / "base")], FEW
    )  # in a process of its own: this one frees others' memory
    assert told["bytes"] > 0.5 * weights
    assert torch.get_default_dtype() is torch.float32


def test_several_plans_are_compared_by_their_ratios() -> None:
    def one(config_id: int, ratio: float) -> Measurement:
        subject = Subject.config(config_id)
        rest = (60 * ratio, 1.0, 60.0, ratio, 0.02, AT)
        return Measurement(subject, config_id, f"h{config_id}", "cpu, float32", Quantity.DECODE, 1, *rest)

    tables = run_tables(measurements=[one(1, 1.3), one(2, 1.1)])
    frame = worth.ratios(tables)
    assert frame["Decode speed, batch 1, x dense"].to_dict() == {1: 1.3, 2: 1.1}
    assert frame["Decode speed, batch 1, x dense ±"].tolist() == [0.02, 0.02]
    assert worth.line(one(1, 1.3)) == (
        "Decode speed, batch 1: 1.30 ± 0.02 x dense (78 tokens/s beside 60 tokens/s) on cpu, float32"
    )


def test_what_cannot_be_measured_is_refused(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--subjects nobody: expected dense, candidates"):
        measure(run, print, ["nobody"])
    with pytest.raises(UserError, match="block_influence: has no plan in this run"):
        measure(run, print, ["baseline:block_influence"])
    assert main(["measure", run.run_id, "--runs", str(run.root), "--device", "cuda:9", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"]["error"]
