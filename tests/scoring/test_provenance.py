"""A number is tied to the files, settings and examples it was computed from: what differs is refused or made anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.changes import change_one_number, correct
from helpers.evaluate_tools import CHOICE, GENERATION, opened, rows, write_task
from helpers.own_files import spec_of_own_files
from helpers.store_samples import new_writer

from gptailor.commands.evaluate import evaluate
from gptailor.commands.export import export_model, generate
from gptailor.commands.heal import heal
from gptailor.errors import UserError
from gptailor.evaluate.digests import example_digests
from gptailor.family import digests as of_files
from gptailor.family.checkpoint import read_checkpoint
from gptailor.heal.asked import HealAsked
from gptailor.launch.engine import prepare
from gptailor.launch.extend import extend
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.repair import rebuild
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, BenchmarkKey, Evaluation, RunStatus, Score

torch = pytest.importorskip("torch")


# --- files ------------------------------------------------------------------------------------------------------------


def digests(folder: Path, name: str = "math") -> dict[tuple[str, str], str]:
    return of_files.checkpoint_digests({name: read_checkpoint(folder, "x", "x")})


@pytest.fixture
def model(tiny_family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_family / "math", tmp_path / "math"))


def test_a_file_is_what_its_tensors_are(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    before = digests(model)
    assert set(before) == {("math", "model.safetensors"), ("math", "config.json")}
    save_file(load_file(file), file, metadata={"format": "pt", "saved": "once more"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "6", "_name_or_path": "/x"}))
    assert digests(model) == before, "neither the metadata nor who saved it is the model"
    change_one_number(file)
    assert digests(model)["math", "model.safetensors"] != before["math", file.name]
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert digests(model)["math", "config.json"] != before["math", "config.json"]
    shutil.copytree(model, model.parent / "elsewhere")
    assert digests(model.parent / "elsewhere") == digests(model)
    with_tokenizer = {file for _, file in digests(model, "base")}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= with_tokenizer, "the base's is used"


def test_a_large_file_is_read_in_spots_of_every_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(of_files, "WHOLE", 0)
    monkeypatch.setattr(of_files, "SPOTS", 4)
    monkeypatch.setattr(of_files, "SPOT", 64)
    read = 0
    pread = os.pread

    def counted(*arguments: Any) -> bytes:
        nonlocal read
        read += arguments[1]
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    file = model / "model.safetensors"
    before = digests(model)
    state = load_file(file)
    assert 0 < read <= 4 * 64 * len(state) < file.stat().st_size / 4
    for tensor in ("model.embed_tokens.weight", "model.layers.5.mlp.down_proj.weight"):
        save_file(state | {tensor: state[tensor] * 1.001}, file, metadata={"format": "pt"})
        assert digests(model) != before, tensor


def test_a_digest_is_computed_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []
    compute = of_files._digest_of_tensors

    def counted(*asked: Any) -> str:
        computed.append(asked)
        return compute(*asked)

    monkeypatch.setattr(of_files, "_digest_of_tensors", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(of_files, "WORTH_KEEPING", 1)
    monkeypatch.setattr(of_files, "SETTLED_SECONDS", -1)
    first = digests(model)
    assert digests(model) == first and len(computed) == 1
    change_one_number(model / "model.safetensors")  # of the same size, and dated back
    assert digests(model) != first and len(computed) == 2
    monkeypatch.setattr(of_files, "SETTLED_SECONDS", 3600)
    change_one_number(model / "model.safetensors")
    assert digests(model) == digests(model) and len(computed) == 4, "one that was just written is not trusted yet"
    for kept in (tmp_path / "cache" / "gptailor" / "digests").iterdir():
        kept.write_text("torn")
    assert len(digests(model)) == 2


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from helpers.families import train_tokenizer

    return train_tokenizer()


def test_an_example_is_what_is_read_and_how(tmp_path: Path, tokenizer: Any) -> None:
    def found(name: str, metric: str = "acc", **spec: Any) -> list[str]:
        (benchmark,) = opened(tmp_path / name, tokenizer, Benchmark(benchmark="x", metric=metric, **spec))
        return example_digests(benchmark)

    def made(name: str, text: str = CHOICE, **splits: Any) -> str:
        (tmp_path / name).mkdir()
        write_task(tmp_path / name, "x", text, **splits)
        return name

    plain = found(made("plain"))
    assert len(set(plain)) == 20 and found(made("again")) == plain
    corrected = rows(1, 20)
    corrected[4]["gold"] = (corrected[4]["gold"] + 1) % len(corrected[4]["choices"])
    (tmp_path / "plain").rename(tmp_path / "there")
    changed = found(made("corrected", validation=corrected))
    assert sum(one != two for one, two in zip(plain, changed, strict=True)) == 1
    for name, text in {
        "prompt": CHOICE.replace("doc_to_text: query", 'doc_to_text: "Q: {{{{query}}}}"'),
        "answer": CHOICE.replace("doc_to_target: gold", 'doc_to_target: "{{{{1 - gold if gold < 2 else 0}}}}"'),
        "metric": CHOICE.replace("metric: acc, aggregation: mean", "metric: acc, aggregation: median"),
    }.items():
        assert not set(found(made(name, text))) & set(plain), name
    (tmp_path / "there").rename(tmp_path / "plain")
    assert not set(found("plain", "acc_norm")) & set(plain)
    assert not set(found("plain", num_fewshot=2)) & set(plain)
    assert found("plain", num_fewshot=2) != found("plain", num_fewshot=3)
    (two,) = opened(tmp_path / "plain", tokenizer, Benchmark(benchmark="x"), chat_template=True)
    assert not set(example_digests(two)) & set(plain)


def test_a_filter_belongs_to_its_own_metric(tmp_path: Path, tokenizer: Any) -> None:
    def found(text: str, metric: str) -> list[str]:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        write_task(tmp_path, "x", text)
        return example_digests(opened(tmp_path, tokenizer, Benchmark(benchmark="x", metric=metric))[0])

    other = GENERATION.replace("(\\\\w+)", "(\\\\w)")
    assert other != GENERATION
    assert found(GENERATION, "exact_match,word") != found(other, "exact_match,word")
    assert found(GENERATION, "exact_match,first") == found(other, "exact_match,first")


# --- the store --------------------------------------------------------------------------------------------------------


def test_what_is_forgotten_is_gone_and_can_be_written_again(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    key = BenchmarkKey("words@3", "acc", "test")
    at = writer._clock()

    def judge(score: float, n: int) -> None:
        writer.record_examples("plan", *key, 0, [score] * n)
        writer.record_example_digests(key, 0, [f"{score}"] * n)
        evaluation = Evaluation(
            DENSE, None, "test", Score("words@3", "acc", score, None, n, True), at, "plan", None, "f1", (score,)
        )
        writer.record_evaluation(evaluation)

    judge(0.5, 4)
    with writer.batch():
        judge(0.6, 3)
        writer.forget([key])
        judge(0.25, 2)
        writer.record_examples("plan", "other", "acc", "test", 0, [1])
    for _ in range(2):
        found = queries.load_examples(writer.folder)
        assert found == {("plan", *key): [0.25, 0.25], ("plan", "other", "acc", "test"): [1]}
        assert queries.load_digests(writer.folder).examples == {key: ["0.25", "0.25"]}
        assert queries.read_run(writer.folder).evaluations[["score", "n_samples"]].to_numpy().tolist() == [[0.25, 2]]
        assert queries.answers_of(writer.folder, ["plan"]).resamples == {("plan", *key, 2): [0.25]}
        rebuild(writer.folder)  # from the journal, which knows all of it


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tiny_family: Path, tmp_path: Path) -> RunSpec:
    return spec_of_own_files(
        tiny_family,
        tmp_path,
        30,
        name="tied",
        objectives=[{"benchmark": "learnt", "metric": "acc"}],
        selection=[{"benchmark": "chosen", "metric": "acc"}],
        held_out=[{"benchmark": "judged", "metric": "acc"}],
        trials=5,
    )


class Said(list[str]):
    """What commands say, as text."""

    def __call__(self, event: object) -> None:
        self.append(str(event))


def run(spec: RunSpec, tmp_path: Path, name: str = "runs") -> RunFolder:
    folder = prepare(str(tmp_path / name), spec)
    assert run_engine(folder, Report()) is RunStatus.FINISHED
    return folder


def score_of(folder: RunFolder, name: str, subject: str = "dense") -> list[tuple[int, float]]:
    found = queries.read_run(folder).evaluations
    found = found[(found.benchmark == name) & (found.subject == subject)]
    return [(int(row.n_samples), float(row.score)) for row in found.itertuples()]


def test_other_weights_are_refused_everywhere(spec: RunSpec, tmp_path: Path) -> None:
    folder = run(spec, tmp_path)
    known = queries.load_digests(folder)
    assert {name for name, _ in known.weights} == {"base", "math"} and known.settings["dtype"] == "float32"
    assert {key: len(found) for key, found in known.examples.items()} == {
        ("learnt", "acc", "validation"): 20,
        ("chosen", "acc", "validation"): 30,
    }
    plans = queries.read_run(folder).plans
    lent = next(int(row.config_id) for row in plans.itertuples() if "math" in row.plan)
    change_one_number(tmp_path / "m" / "math" / "model.safetensors")
    said = Said()
    for again in (
        lambda: evaluate(folder, said, ["dense"]),
        lambda: export_model(folder, lent, tmp_path / "out", said),
        lambda: generate(folder, lent, "the cat", said, max_tokens=2),
        lambda: run_engine(folder, Report()),
    ):
        with pytest.raises(UserError, match=r"candidates.math: model.safetensors is not what it was"):
            again()
    assert not (tmp_path / "out").exists() and not score_of(folder, "judged")
    own = next(int(row.config_id) for row in plans.itertuples() if "math" not in row.plan)
    export_model(folder, own, tmp_path / "out", said)
    assert (tmp_path / "out").is_dir(), "a plan of the base alone is what it was"


def test_a_corrected_benchmark_is_judged_anew(spec: RunSpec, tmp_path: Path) -> None:
    folder, said = run(spec, tmp_path), Said()
    evaluate(folder, said, ["dense", "candidates"], examples=12)
    evaluate(folder, said, ["dense"])
    before = score_of(folder, "judged")
    assert [n for n, _ in before] == [12, 30]
    correct(tmp_path, "judged")
    evaluate(folder, said, ["dense"], examples=12)
    (told,) = [text for text in said if text.startswith("benchmark judged (test), acc: 12 of its first 12 examples")]
    assert "is not used" in told and not score_of(folder, "judged", "candidate:math"), "of the old rows"
    evaluate(folder, said, ["dense"])
    fresh = run(spec, tmp_path, "fresh")
    evaluate(fresh, said, ["dense"])
    assert score_of(folder, "judged")[-1] == score_of(fresh, "judged")[0] != before[-1]
    shots = [{"benchmark": "judged", "metric": "acc", "num_fewshot": 2}]
    few, said = build_spec(spec.model_dump(mode="json") | {"held_out": shots}), Said()
    evaluate(run(few, tmp_path, "few"), said, ["dense"], examples=12)
    assert not any("older version" in text for text in said), "nothing was answered before"


def test_a_corrected_objective_stops_the_search(spec: RunSpec, tmp_path: Path) -> None:
    folder = run(spec, tmp_path)
    correct(tmp_path, "learnt")
    RunWriter.open(folder).change_spec(spec.model_dump(mode="json") | {"trials": 9}, spec.to_yaml())
    with pytest.raises(UserError, match=r"benchmark learnt \(validation\), acc: 20 of its first 20 examples are not"):
        run_engine(folder, Report())
    correct(tmp_path, "learnt")
    correct(tmp_path, "learnt")  # three golds: they are the old ones again
    assert run_engine(folder, Report()) is RunStatus.FINISHED


def test_a_run_without_digests_opens_and_says_so(spec: RunSpec, tmp_path: Path) -> None:
    folder, said = run(spec, tmp_path), Said()
    import duckdb

    with duckdb.connect(str(folder.database)) as con:
        con.execute("DELETE FROM digests")
        con.execute("DELETE FROM example_digests")
    plan = int(queries.read_run(folder).plans.config_id.iloc[0])
    export_model(folder, plan, tmp_path / "out", said)
    evaluate(folder, said, ["dense"])
    assert sum("was made before digests were kept" in text for text in said) == 2
    assert queries.load_digests(folder).weights, "from now on they are known"


def test_a_card_gives_no_scores_of_other_rows(spec: RunSpec, tmp_path: Path) -> None:
    folder, said = run(spec, tmp_path), Said()
    (config_id, *_) = queries.read_run(folder).plans.config_id.tolist()
    evaluate(folder, said, ["dense", f"config:{config_id}"])

    def card(name: str) -> str:
        export_model(folder, config_id, tmp_path / name, said)
        return (tmp_path / name / "README.md").read_text()

    before = card("before")
    assert "judged" in before and "learnt" in before and not any("not given" in text for text in said)
    correct(tmp_path, "judged")
    without = card("after")
    assert "judged" not in without and "learnt" in without
    (told,) = [text for text in said if text.startswith("benchmark judged (test), acc: 30 of its first 30 examples")]
    assert "not given" in told
    (tmp_path / "judged.yaml").unlink()
    assert "judged" in card("away"), "nothing speaks against them"
    assert any("judged" in text and "cannot be told" in text for text in said)


def test_a_plan_of_other_models_is_not_healed(spec: RunSpec, tmp_path: Path) -> None:
    folder = run(spec, tmp_path)
    change_one_number(tmp_path / "m" / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"base_model: model.safetensors is not what it was"):
        heal(folder, "1", tmp_path / "out", HealAsked(), lambda _event: None)
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_models_is_not_extended(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(spec, tmp_path)
    started: list[object] = []
    monkeypatch.setattr("gptailor.launch.extend.start", started.append)
    change_one_number(tmp_path / "m" / "math" / "model.safetensors")
    with pytest.raises(UserError, match=r"candidates.math: model.safetensors is not what it was"):
        extend(folder, 9, None)
    assert load_spec(folder.spec).trials == 5 and not started, "nothing is changed"
    shutil.rmtree(tmp_path / "m" / "math")
    with pytest.raises(UserError, match=r"candidates.math: .*no such folder"):
        extend(folder, 9, None)
