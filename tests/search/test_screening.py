"""Candidates that help nowhere are left out before a search, and those that help somewhere are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.command_line import gptailor, only_run
from helpers.engine_processes import eventually
from safetensors.torch import load_file, save_file

from gptailor.evaluate.scoring import NonFinite
from gptailor.plan import BASE, StitchPlan
from gptailor.schedule import is_screened, n_examples, screening_rounds
from gptailor.scoring.item_cache import ItemCache, items_key
from gptailor.search.screening import screen
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.screening import Screening, read_screening, write_screening

ROOT = Path(__file__).resolve().parents[2]
REMOVED = (3, 4)
N = 90


class Benchmark:
    """As much of an open benchmark as a screening looks at."""

    def __init__(self, name: str, higher_is_better: bool = True) -> None:
        self.name, self.higher_is_better = name, higher_is_better
        self.spec = build_spec(asked(1)).objectives[0].model_copy(update={"benchmark": name})


class Scripted:
    """Plans get what is said of their sources: (candidate, whole or layer, benchmark) -> gain over the base's cut."""

    n_layers = 12

    def __init__(
        self, gains: dict[tuple[str, str, str], float], numbers: bool = True, base: bool = True, **directions: bool
    ) -> None:
        self.gains, self.numbers, self.base = gains, numbers, base
        self.benchmarks = [Benchmark(name, directions.get(name, True)) for name in ("sums", "code")]
        self.cache = ItemCache(self.n_layers)
        self.scored: list[tuple[str, int]] = []

    def opened(self, on: str) -> list[Any]:
        assert on == "objectives"
        return self.benchmarks

    def score(self, plan: StitchPlan, budget: int) -> Any:
        names = {name for choice in plan.kept for name in choice.sources}
        name = names.pop() if names else BASE
        lent = [choice.layer for choice in plan.kept if choice.sources]
        if (self.gains.get((name, "whole", "sums")) is None and name != BASE) or (name == BASE and not self.base):
            raise NonFinite("nan")
        self.scored.append((name, budget))
        for benchmark in self.benchmarks:
            gain = self.gains.get((name, "whole" if len(lent) > 1 else "layer", benchmark.name), 0.0)
            noise = np.random.default_rng(len(name)).normal(0, 0.2, N)
            own = 0.5 + np.random.default_rng(0).normal(0, 0.2, N) + (0.1 * noise + gain if lent else 0.0)
            items = own.tolist() if self.numbers else [[value, 1] for value in own]
            self.cache.known[items_key(plan, benchmark)] = items[:budget]  # type: ignore[arg-type]
        return None


def asked(n: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "base_model": "base",
        "candidates": {name: name for name in ("strong", "other", "weak", "layer", "broken", "none")[:n]},
        "remove": 2,
        "operations": ["remove", "select"],
        "objectives": [{"benchmark": "sums"}, {"benchmark": "code"}],
        "budget": {"min": 30, "max": 90},
        **changes,
    }


GAINS = {
    ("strong", "whole", "sums"): 0.1,
    ("strong", "whole", "code"): -0.1,
    ("other", "whole", "sums"): -0.1,
    ("other", "whole", "code"): 0.1,
    ("weak", "whole", "sums"): 0.02,
    ("weak", "whole", "code"): 0.02,
    ("layer", "whole", "sums"): -0.3,
    ("layer", "whole", "code"): -0.3,
    ("layer", "layer", "code"): 0.05,
    ("broken", "whole", "sums"): -0.4,
    ("broken", "whole", "code"): -0.4,
    ("broken", "layer", "code"): -0.1,
}


def screened(scorer: Scripted, spec: RunSpec) -> Screening:
    return screen(spec, scorer, REMOVED, lambda _result: None)  # type: ignore[arg-type]


def test_who_helps_somewhere_stays(tmp_path: Path) -> None:
    scorer = Scripted(GAINS)
    found = screened(scorer, build_spec(asked(6)))
    assert found.kept == ("strong", "other", "layer"), "best at something, or lends one good layer"
    assert found.left_out["none"] is None and set(found.left_out) == {"weak", "broken", "none"}
    assert found.left_out["weak"] == pytest.approx(0.08, abs=0.03) and found.left_out["broken"] == pytest.approx(
        0.5, abs=0.03
    )
    spent: dict[str, int] = {}
    for name, n in scorer.scored:
        spent[name] = max(spent.get(name, 0), n)
    assert spent["strong"] == 90 and spent["broken"] == 30, "who is clearly behind is asked no more"
    assert (
        found.text.startswith("screening: 3 of 6 candidates stay (strong, other, layer)") and "no numbers" in found.text
    )
    write_screening(RunFolder(tmp_path), found)
    assert read_screening(RunFolder(tmp_path)) == found


def test_where_less_is_better() -> None:
    turned = {key: -gain for key, gain in GAINS.items()}
    found = screened(Scripted(turned, sums=False, code=False), build_spec(asked(6)))
    assert found.kept == ("strong", "other", "layer")


def test_nobody_goes_without_numbers_or_without_a_clear_difference() -> None:
    spec = build_spec(asked(5))
    assert screened(Scripted(GAINS, numbers=False), spec).kept == tuple(spec.candidates)
    baseless = Scripted(GAINS, base=False)
    assert screened(baseless, spec).kept == tuple(spec.candidates), "the base's own cut gives no numbers"
    alike = dict.fromkeys(GAINS, 0.0)
    assert screened(Scripted(alike), spec).kept == tuple(spec.candidates)


def test_when_candidates_are_screened() -> None:
    few, many = build_spec(asked(5)), build_spec(asked(6))
    assert not is_screened(few) and is_screened(many)
    assert is_screened(build_spec(asked(2, screen=True))) and not is_screened(build_spec(asked(6, screen=False)))
    assert not is_screened(build_spec(asked(6, operations=["remove"]))), "nobody lends a layer"
    assert not is_screened(build_spec(asked(1, screen=True)))
    assert screening_rounds(many) == (30, 90)
    extra = n_examples(many) - n_examples(build_spec(asked(6, screen=False)))
    assert extra == 6 * (90 + 2 * 30) * 2


def summary(folder: RunFolder) -> tuple[str, int]:
    found = json.loads(folder.summary.read_text())
    return found["status"], found["n_done"]


@pytest.mark.slow
def test_a_broken_candidate_is_in_no_plan(tmp_path: Path) -> None:
    """The demo's family and a candidate of noise, from the command line; a run that goes on keeps who stayed."""
    models = ROOT / "data" / "demo" / "models"
    weights = load_file(models / "base" / "model.safetensors")
    noise = np.random.default_rng(0)
    for key, tensor in weights.items():
        if ".layers." in key and tensor.ndim == 2:
            drawn = noise.normal(0, float(tensor.float().std()), tuple(tensor.shape))
            weights[key] = tensor.new_tensor(drawn.tolist())
    (tmp_path / "broken").mkdir()
    for file in (models / "base").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    family = ROOT / "data" / "experiments" / "families" / "demo.yaml"
    spec = load_spec(family).model_dump(mode="json")
    spec |= {"screen": True, "trials": 5, "base_model": str(models / "base")}
    spec |= {"candidates": {"prose": str(models / "prose"), "broken": str(tmp_path / "broken")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    done = gptailor("search", tmp_path / "run.yaml", "--runs", tmp_path / "runs", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "screening: 1 of 2 candidates stay (prose)" in done.stdout
    folder = only_run(tmp_path / "runs")
    assert json.loads((folder.path / "screening.json").read_text())["kept"] == ["prose"]
    more = gptailor("extend", folder.run_id, "--trials", "7", "--runs", tmp_path / "runs", timeout=400)
    assert more.returncode == 0, more.stdout + more.stderr
    assert eventually(lambda: summary(folder) == ("finished", 7), 300)
    assert "as a warm start" not in folder.log.read_text(), "the same plans are asked for again"
    tables = queries.read_run(folder)
    assert {name for sources in tables.layers["sources"] for name in sources} <= {"prose"}
