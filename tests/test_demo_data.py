"""The committed demo: benchmarks as their generators make them, and models that are worth searching."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from gptailor.spec.files import load_spec

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data" / "demo"
sys.path.insert(0, str(DEMO))  # build.py and generators.py are a script and its neighbour, not a package

import build  # noqa: E402
import generators  # noqa: E402

DOMAINS = list(generators.DOMAINS)
MODELS = ["base", *build.FINE_TUNES]


def rows(domain: str, split: str) -> list[dict[str, Any]]:
    path = DEMO / "benchmarks" / f"demo_{domain}" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", DOMAINS)
def test_benchmark_file_reads_as_lm_eval_needs_it(domain: str) -> None:
    task = yaml.safe_load((DEMO / "benchmarks" / f"demo_{domain}" / f"demo_{domain}.yaml").read_text())
    assert task["task"] == f"demo_{domain}"
    assert task["output_type"] == "multiple_choice"
    assert {m["metric"] for m in task["metric_list"]} == {"acc", "acc_norm"}
    for split, name in (("validation", "calibration"), ("test", "test")):
        assert task[f"{split}_split"] == split
        path = ROOT / task["dataset_kwargs"]["data_files"][split]
        assert path == DEMO / "benchmarks" / f"demo_{domain}" / f"{name}.jsonl" and path.is_file()


@pytest.mark.parametrize("domain", DOMAINS)
def test_generators_make_the_committed_files(domain: str, tmp_path: Path) -> None:
    build.write_benchmark(domain, generators.benchmark(domain), tmp_path)
    for name in ("calibration.jsonl", "test.jsonl"):
        made, committed = (top / "benchmarks" / f"demo_{domain}" / name for top in (tmp_path, DEMO))
        assert made.read_text() == committed.read_text()


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_sound(domain: str) -> None:
    calibration, test = rows(domain, "calibration"), rows(domain, "test")
    assert (len(calibration), len(test)) == (generators.CALIBRATION_ROWS, generators.TEST_ROWS)
    queries = [row["query"] for row in calibration + test]
    assert len(set(queries)) == len(queries), "a row is in both splits, or twice in one"
    for row in calibration + test:
        assert len(set(row["choices"])) == generators.N_CHOICES
        assert row["query"] == row["query"].strip() and all(c == c.strip() for c in row["choices"])
    for split in (calibration, test):
        counts = [sum(row["gold"] == place for row in split) for place in range(generators.N_CHOICES)]
        assert counts == [len(split) // generators.N_CHOICES] * generators.N_CHOICES, "gold is not uniform"


def test_the_gold_answers_are_true() -> None:
    """Answers of one kind a domain, worked out from the text alone, in another way than the generator's."""
    for row in rows("sums", "test"):
        if row["query"].endswith("="):
            assert int(row["choices"][row["gold"]]) == eval(row["query"].removesuffix("="))
    checked = 0
    for row in rows("code", "test"):
        if " print " in row["query"]:
            program, asked = row["query"].removesuffix(" :").split(" ; print ")
            values: dict[str, Any] = {}
            exec(program.replace(" ; ", "\n"), {}, values)
            assert row["choices"][row["gold"]] == str(values[asked])
            checked += 1
        elif row["query"].startswith("close"):
            text = row["query"].removeprefix("close").removesuffix(":") + row["choices"][row["gold"]]
            text = text.replace(" ", "")
            while text != (text := text.replace("()", "").replace("[]", "").replace("{}", "")):
                pass
            assert text == ""
            checked += 1
    assert checked > 100


def test_sizes_are_fit_for_git() -> None:
    made = {"__pycache__", "pool", "times"}
    files = [path for path in DEMO.rglob("*") if path.is_file() and not made & {*path.parts}]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert max(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize("name", MODELS)
def test_models_are_whole_folders_of_one_family(name: str) -> None:
    folder, base = DEMO / "models" / name, DEMO / "models" / "base"
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (base / file).read_bytes(), f"{file} differs from the base's"
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    with safe_open(folder / "model.safetensors", "pt") as tensors, safe_open(base / "model.safetensors", "pt") as own:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 (it is no mapping)
        assert shapes == {key: own.get_slice(key).get_shape() for key in own.keys()}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and 10 <= config["num_hidden_layers"] <= 16
    assert sum(_product(shape) for shape in shapes.values()) <= 3_000_000


def _product(shape: list[int]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def test_the_run_file_names_what_is_here() -> None:
    spec = load_spec(ROOT / "data" / "presets" / "demo.yaml")
    assert spec.base_model == "data/demo/models/base"
    assert spec.candidates == {name: f"data/demo/models/{name}" for name in build.FINE_TUNES}
    assert spec.budget.rungs == (30, 90, 270)
    assert spec.n_removed(build.SHAPE["num_hidden_layers"]) == 3
    assert {o.benchmark for o in spec.objectives} < {h.benchmark for h in spec.held_out}
    assert {h.benchmark for h in spec.held_out} == {f"demo_{domain}" for domain in DOMAINS}


@pytest.mark.slow
def test_models_are_trained_and_specialised() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scores: dict[tuple[str, str], float] = {}
    for name in MODELS:
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / name)
        model = AutoModelForCausalLM.from_pretrained(DEMO / "models" / name, dtype="float32")
        for domain in DOMAINS:
            questions = [generators.Question(r["query"], tuple(r["choices"]), r["gold"]) for r in rows(domain, "test")]
            scores[name, domain] = build.accuracy(model, tokenizer, questions[:200])
    for domain in DOMAINS:
        assert 0.35 <= scores["base", domain] <= 0.85, f"the base on {domain}: {scores['base', domain]}"
    for domain in build.FINE_TUNES:
        others = max(scores[name, domain] for name in MODELS if name != domain)
        assert others + 0.05 <= scores[domain, domain] <= 0.97, f"{domain}: {scores}"
