"""A cut model learns from its teacher: the folder, the subject, going on after a stop, and what must never be read."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import time
from contextlib import nullcontext
from html import unescape
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.command_line import WORDS, write_benchmark
from helpers.every_model import tiny_of
from helpers.families import EXPERTS_BEHIND
from streamlit.testing.v1 import AppTest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptailor.__main__ import main
from gptailor.commands import heal as command
from gptailor.commands.evaluate import evaluate
from gptailor.commands.export import export_model
from gptailor.errors import UserError
from gptailor.evaluate.unseen import Unseen
from gptailor.heal import distil
from gptailor.heal.asked import HealAsked, count_text, parse_count
from gptailor.heal.batches import BATCH_TOKENS, STEP, batches_of, inputs
from gptailor.heal.cost import Sizes, heal_bytes, heal_operations, lora_parameters
from gptailor.heal.loss import Head, compared, divergence
from gptailor.heal.student import Student
from gptailor.heal.teaching import Teaching, kept_bytes
from gptailor.launch.engine import prepare
from gptailor.launch.events import Event
from gptailor.plan import StitchPlan
from gptailor.results.frames import held_out
from gptailor.results.report import write_report
from gptailor.results.story import run_json
from gptailor.results.story_text import run_text
from gptailor.results.subjects import stored_plans
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.spec.files import build_spec, load_spec
from gptailor.stitch.stitcher import Stitcher
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import HEALED, RunStatus

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 60_000
CUT = "baseline:last"
WHO = f"healed:{CUT}/60k"


@pytest.fixture(scope="module")
def spec(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one baseline, which holds out other rows than it scores."""
    folder = tmp_path_factory.mktemp("heal")
    for name, n, offset in (("first_words", 200, 0), ("other_words", 30, 3), ("held_words", 30, 7)):
        write_benchmark(folder, name, n, offset)
    return {
        "name": "healed",
        "base_model": str(tiny_family / "base"),
        "operations": ["remove"],
        "baselines": ["last"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "closeness"}],
        "held_out": [{"benchmark": "held_words", "metric": "closeness"}],
        "include_path": [str(folder)],
        "budget": {"min": 200, "max": 200},
        "device": "cpu",
    }


def finished(spec: dict[str, Any], runs: Path) -> RunFolder:
    made = prepare(str(runs), build_spec(spec))
    assert run_engine(made, Report()) is RunStatus.FINISHED
    return made


@pytest.fixture(scope="module")
def run(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished(spec, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Words of the benchmarks in any order."""
    rng = random.Random(0)
    rows = [json.dumps({"text": " ".join(rng.choices(WORDS, k=12))}) for _ in range(TOKENS // 12)]
    file = tmp_path_factory.mktemp("texts") / "sentences.jsonl"
    file.write_text("\n".join(rows))
    return f"file:{file}"


@pytest.fixture(scope="module")
def healed(run: RunFolder, sentences: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    out, said = tmp_path_factory.mktemp("out") / "healed", []  # type: ignore[var-annotated]
    assert command.heal(run, CUT, out, HealAsked(texts=sentences, tokens=TOKENS, lora=8, rate=0.02), said.append)
    return out, said


def apart(model: Any, teacher: Any, tokenizer: Any) -> float:
    """KL to the teacher on words in an order that nobody trained on."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(64)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokenizer(text)["input_ids"]) for text in texts], True)
    with torch.inference_mode():
        return float(by_the_book(model(ids).logits.flatten(0, 1), teacher(ids).logits.flatten(0, 1)))


def by_the_book(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL in nats, the mean over rows of logits."""
    mine, theirs = found.double().log_softmax(-1), wanted.double().log_softmax(-1)
    return torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")


def test_a_healed_plan_is_nearer_to_its_teacher_and_a_plain_folder(run, healed, tmp_path) -> None:
    out, said = healed
    result = said[-1].result
    assert result["subject"] == WHO and result["tokens"] >= TOKENS
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    model, cut = AutoModelForCausalLM.from_pretrained(out), tmp_path / "cut"
    export_model(run, int(queries.read_run(run).plans.config_id.iloc[0]), cut, lambda _: None)
    teacher = AutoModelForCausalLM.from_pretrained(load_spec(run.spec).base_model)
    tokenizer = AutoTokenizer.from_pretrained(out)
    before = apart(AutoModelForCausalLM.from_pretrained(cut), teacher, tokenizer)
    assert apart(model, teacher, tokenizer) < 0.7 * before
    assert torch.equal(model.lm_head.weight, teacher.lm_head.weight), "what is no layer is the base's"
    assert not list(out.parent.glob(".healed*")), "nothing is left beside it"
    shares = [event.share for event in said if event.share is not None]
    assert shares == sorted(shares) and any("left" in event.text and "loss" in event.text for event in said)
    assert any("it takes" in event.text and "are free" in event.text for event in said)


def test_the_card_says_what_it_was_healed_on(healed) -> None:
    card = (healed[0] / "README.md").read_text()
    for said in ("last on base, healed", "sentences", "LoRA of rank 8, merged", "KL to the"):
        assert said in card, said
    plan = StitchPlan.from_json(json.loads((healed[0] / "gptailor_plan.json").read_text()))
    assert plan.edits[-1].method == "healed" and str(healed[0]) not in json.dumps(plan.to_json())


def test_it_is_a_subject_judged_beside_what_it_was(run, healed, tmp_path) -> None:
    said: list[Event] = []
    evaluate(run, said.append, ["dense", CUT, "healed"])
    got = {event.result["subject"]: event.result["score"] for event in said if event.result}
    assert list(got) == ["dense", CUT, WHO] and got[CUT] < got[WHO] < got["dense"]
    tables = queries.read_run(run)
    table = held_out.shown(held_out.averages(tables))
    row = table[table["Subject"] == "last on base, healed (60k)"].iloc[0]
    assert row["Kind"] == "healed" and row["Before"] == pytest.approx(got[CUT])
    (told,) = run_json(run)["held_out"]["changes"]
    assert told.startswith("last on base, healed (60k) is ahead of last on base by"), "tested on the same examples"
    assert told in unescape(write_report(run, tmp_path / "report.html").read_text()) and told in run_text(run_json(run))
    assert HEALED in stored_plans(tables)
    again = tmp_path / "again"
    export_model(run, HEALED, again, said.append)
    assert f"{got[WHO]:.4f}" in (again / "README.md").read_text(), "its own scores, not those of what it was"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (healed[0], again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layers_that_got_narrower_stay_so(spec, sentences, tmp_path) -> None:
    """In a plain folder they are padded with zeros; what is read from there is what was trained."""
    run = finished(spec | {"baselines": ["slimgpt"]}, tmp_path / "runs")
    out, said = tmp_path / "narrow", []  # type: ignore[var-annotated]
    asked = HealAsked(texts=sentences, tokens=16_000, lora=8, rate=0.005)
    assert command.heal(run, "baseline:slimgpt", out, asked, said.append)
    losses = said[-1].result["losses"]
    assert losses[-1] < 0.9 * losses[0]
    evaluate(run, lambda _: None, ["healed"])  # which reads them from the folder, and knows them by their digest
    sizes = queries.read_run(run).plans.set_index("config_id").n_parameters
    assert sizes[HEALED] == sizes.drop(HEALED).iloc[-1] < AutoModelForCausalLM.from_pretrained(out).num_parameters()


def test_weights_that_are_gone_or_others_are_refused(run, healed, tmp_path) -> None:
    out, _ = healed
    moved = out.rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match="put it back, or heal the plan anew"):
            export_model(run, HEALED, tmp_path / "x", lambda _: None)
        export_model(run, int(queries.read_run(run).plans.config_id.iloc[0]), out, lambda _: None)
        with pytest.raises(UserError, match="holds other weights"):
            export_model(run, HEALED, tmp_path / "x", lambda _: None)
    finally:
        if out.exists():
            out.rename(tmp_path / "other")
        moved.rename(out)


@pytest.mark.parametrize("lora", [4, 0])
def test_one_that_was_stopped_goes_on_as_if_it_had_not_been(run, tmp_path, monkeypatch, lora: int) -> None:
    asked = HealAsked(texts="objectives", tokens=12_000, lora=lora, rate=0.01)
    ended: list[str] = []

    def heal(out: str, stop_at: int | None) -> bool:
        steps = 0

        def should_stop() -> bool:
            nonlocal steps
            steps += 1
            return steps == stop_at

        monkeypatch.setattr(command, "stop_on_signal", lambda: nullcontext(SimpleNamespace(is_set=should_stop)))
        said: list[Event] = []
        whole = command.heal(run, CUT, tmp_path / out, asked, said.append)
        if whole:
            plan = json.loads((tmp_path / out / "gptailor_plan.json").read_text())
            ended.append(plan["edits"][-1]["parameters"]["weights"])
        else:
            assert "the same command goes on" in said[-1].text
        return whole

    assert not heal("stopped", 3)
    last = max((tmp_path / ".stopped.heal").glob("checkpoint-*"))
    cut_off = shutil.copytree(last, last.with_name("checkpoint-7"))  # killed while it wrote the next one
    (cut_off / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="holds the beginning of another heal"):
        command.heal(run, CUT, tmp_path / "stopped", HealAsked(texts="objectives", tokens=13_000), lambda _: None)
    assert heal("stopped", None) and heal("whole", None)
    assert ended[0] == ended[1], "the same weights, bit for bit"


@pytest.mark.parametrize(
    ("model_type", "dtype", "changes"),
    [
        (
            "qwen2_moe",
            "float32",
            {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
        ),
        ("deepseek_v3", "bfloat16", EXPERTS_BEHIND),
    ],
)
def test_experts_go_on_as_well_and_what_stays_in_float32_is_known_again(
    spec, make_family, tmp_path, monkeypatch, model_type: str, dtype: str, changes: dict[str, Any]
) -> None:
    """transformers saves experts one by one and opens them fused; some routers stay in float32 whatever the rest is."""
    base = make_family(model_type, dtype=dtype, candidates=(), **changes) / "base"
    run = finished(spec | {"base_model": str(base), "dtype": dtype}, tmp_path / "runs")
    asked = HealAsked(texts="objectives", tokens=5_000, lora=0, rate=0.01)
    ended = []
    for out, stops in (("stopped", [False, True]), ("stopped", [False] * 999), ("whole", [False] * 999)):
        stop = SimpleNamespace(is_set=iter(stops).__next__)
        monkeypatch.setattr(command, "stop_on_signal", lambda stop=stop: nullcontext(stop))
        if command.heal(run, CUT, tmp_path / out, asked, lambda _: None):
            plan = json.loads((tmp_path / out / "gptailor_plan.json").read_text())
            ended.append(plan["edits"][-1]["parameters"]["weights"])
    assert len(ended) == 2 and ended[0] == ended[1], "the same weights, bit for bit"
    evaluate(run, lambda _: None, ["healed"])
    judged = queries.read_run(run).evaluations
    assert f"healed:{CUT}/5k-full" in set(judged["subject"]), "its folder holds what its digest says"


def test_one_process_of_several_writes_checkpoints(tmp_path) -> None:
    other: Any = SimpleNamespace(args=SimpleNamespace(should_save=False))
    distil.Distiller._save(other, str(tmp_path / "checkpoint-1"))
    assert not list(tmp_path.iterdir())


def test_a_heal_that_diverges_says_what_to_do(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(distil, "divergence", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(UserError, match=r"diverged at step 1: .* give a lower --rate than 0.01, and remove .*out.heal"):
        command.heal(run, CUT, tmp_path / "out", HealAsked(texts="objectives", tokens=2_000, rate=0.01), lambda _: None)


def test_a_disk_without_room_for_checkpoints_is_said(run, small_disk) -> None:
    filler = small_disk / "filler"
    asked = HealAsked(texts="objectives", tokens=2_000, lora=0)

    def fill(_: Event) -> None:
        if not filler.exists():
            filler.write_bytes(bytes(15_500_000))

    with pytest.raises(UserError, match=r"cannot be written: .* make room there, and the same command goes on"):
        command.heal(run, CUT, small_disk / "out", asked, fill)
    filler.unlink()
    with pytest.raises(UserError, match=r"export: .* free"):  # trained to its end, but 16 MB are few for an export
        command.heal(run, CUT, small_disk / "out", asked, lambda _: None)


def test_the_rate_falls_to_nothing_with_the_steps_or_with_the_minutes(run, tmp_path, monkeypatch) -> None:
    """Whichever ends first; seconds before a stop count. By a clock of its own, a second each time it is read."""
    rates: list[tuple[int, float, float]] = []
    real = distil.Watch.on_step_end

    def on_step_end(self: distil.Watch, args: Any, state: Any, control: Any, **more: Any) -> None:
        rates.append((state.global_step, self.course.seconds, more["lr_scheduler"].get_last_lr()[0]))
        real(self, args, state, control, **more)

    monkeypatch.setattr(distil.Watch, "on_step_end", on_step_end)
    monkeypatch.setattr(distil, "time", SimpleNamespace(monotonic=count(0.0).__next__))

    def heal(minutes: float | None, stop_at: int | None = None) -> dict[str, Any]:
        asked, said = HealAsked("objectives", 9_000, minutes, lora=0, rate=0.01), list[Event]()
        stop = SimpleNamespace(is_set=lambda: rates[-1][0] == stop_at)
        monkeypatch.setattr(command, "stop_on_signal", lambda: nullcontext(stop))
        command.heal(run, CUT, tmp_path / str(minutes), asked, said.append)
        return said[-1].result or {}

    def by_the_book(share: float) -> float:
        warm = 1 / steps  # one step
        return 0.01 * (share / warm if share < warm else (1 + math.cos(math.pi * (share - warm) / (1 - warm))) / 2)

    assert heal(None)["why"] == "done"
    steps = rates[-1][0]
    assert [rate for *_, rate in rates] == pytest.approx([by_the_book(step / steps) for step, *_ in rates], abs=1e-12)
    rates.clear()
    assert not heal(0.3, stop_at=2)
    found = heal(0.3)
    assert found["why"] == "time is up" and found["rate"] == rates[-1][2] == 0 and rates[-1][0] < steps
    seconds = [at for _, at, _ in rates]
    assert seconds == sorted(seconds) and seconds[-1] >= 18, "what was trained before the stop counts"
    shares = [min(1.0, max(step / steps, at / 18)) for step, at, _ in rates]
    assert [rate for *_, rate in rates] == pytest.approx(list(map(by_the_book, shares)), abs=1e-12)
    card = (tmp_path / "0.3" / "README.md").read_text()
    assert "ended: time is up, at a rate of 0" in card


def test_it_ends_when_the_selection_split_shows_nothing_better(spec, sentences, tmp_path, monkeypatch) -> None:
    chosen = finished(spec | {"selection": [{"benchmark": "other_words", "metric": "closeness"}]}, tmp_path / "runs")
    values = iter((0.5, 0.6, 0.7, 0.65, 0.69, 0.1, 0.9))
    real, seen = command.Healer._judge, []

    def judge(self: command.Healer, layers: Any) -> float:
        seen.append(real(self, layers))
        return next(values)

    monkeypatch.setattr(command.Healer, "_judge", judge)
    said: list[Event] = []
    asked = HealAsked(texts=sentences, tokens=33_000, lora=0, rate=0.003)
    assert command.heal(chosen, CUT, tmp_path / "out", asked, said.append)
    assert said[-1].result is not None and said[-1].result["why"] == "no better on the selection split"
    assert len(seen) == 6, "once before, and until three in a row were no new best"
    plan = stored_plans(queries.read_run(chosen))[HEALED]
    scorer = PlanScorer.open(load_spec(chosen.spec), load_spec(chosen.spec).selection, None, chosen)
    assert scorer.score(plan, 30).scores[0].score == pytest.approx(seen[2]), "the best layers are given back"
    assert "Selection split, mean score: 0.5000 before, 0.7000 healed" in (tmp_path / "out" / "README.md").read_text()


def test_layers_that_time_ends_are_judged_too(spec, tmp_path, monkeypatch) -> None:
    chosen = finished(spec | {"selection": [{"benchmark": "other_words", "metric": "closeness"}]}, tmp_path / "runs")
    steps: list[int] = []
    real = distil.Watch._judge

    def judge(self: distil.Watch, step: int) -> None:
        steps.append(step)
        real(self, step)

    monkeypatch.setattr(distil.Watch, "_judge", judge)
    values = count(1.0)
    monkeypatch.setattr(command.Healer, "_judge", lambda _self, _layers: next(values))
    monkeypatch.setattr(distil, "time", SimpleNamespace(monotonic=count(0.0).__next__))
    said: list[Event] = []
    asked = HealAsked("objectives", 9_000, 0.3, lora=0, rate=0.01)
    assert command.heal(chosen, CUT, tmp_path / "out", asked, said.append)
    assert said[-1].result is not None and said[-1].result["why"] == "time is up"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Training: {steps[-1]} of" in card and f"{1 + len(steps)}.0000 healed" in card, "the last ones, the best"
    assert 3 < len(steps) <= distil.JUDGEMENTS, "by the share of the minutes"


def test_rows_that_are_to_judge_are_never_read(run, tmp_path) -> None:
    spec = load_spec(run.spec)
    scorer = PlanScorer.open(spec, spec.selection, None, run)
    unseen = Unseen(
        scorer.open_benchmarks(scorer.family, spec, [*spec.held_out, *spec.selection], None), scorer.family.tokenizer
    )
    rows = [json.loads(line) for line in (Path(spec.include_path[0]) / "held_words.jsonl").read_text().splitlines()]
    held = [f"{row['query']} {row['choices'][row['gold']]}" for row in rows]
    encode = scorer.family.tokenizer
    assert all(unseen.holds(encode(text)["input_ids"]) for text in held)
    assert unseen.holds(encode("well , " + held[0] + " the end")["input_ids"])
    assert not unseen.holds(encode(held[0].rpartition(" ")[0])["input_ids"])

    file = tmp_path / "texts.jsonl"
    clean = " ".join(reversed(held[0].split()))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*held[:3], clean]))
    said: list[Event] = []
    asked = HealAsked(texts=f"file:{file}", tokens=1_000, lora=2)
    assert command.heal(run, CUT, tmp_path / "out", asked, said.append)
    assert any("3 texts of 4 left out" in event.text for event in said)
    file.write_text(json.dumps({"text": held[4]}) + "\n")
    with pytest.raises(UserError, match="every text holds rows of the held-out or selection splits"):
        command.heal(run, CUT, tmp_path / "none", asked, said.append)


def test_what_is_asked_is_checked(run, tmp_path, capsys) -> None:
    def call(*more: str) -> str:
        where = ["heal", run.run_id, CUT, str(tmp_path / "x"), "--runs", str(run.root)]
        assert main([*where, *more]) == 2
        return capsys.readouterr().err

    assert "--tokens many: must be a number of tokens" in call("--tokens", "many")
    assert "--texts nowhere: must be objectives, base" in call("--texts", "nowhere")
    assert "--lora -1: must be a rank" in call("--lora", "-1")
    assert "'nobody' is not in this family" in call("--teacher", "nobody")
    assert [parse_count(text) for text in ("500k", "0.5M", "5m", "700")] == [500_000, 500_000, 5_000_000, 700]
    assert [count_text(n) for n in (500_000, 1_500_000, 5_000_000, 24_001)] == ["500k", "1.5M", "5M", "24001"]
    with pytest.raises(UserError, match="must be one shorter plan"):
        command.heal(run, "dense", tmp_path / "x", HealAsked(), lambda _: None)


def test_batches_are_bounded_and_reach_the_tokens() -> None:
    texts = [[1] * n for n in (5, 700, 30, 31, 2, 512, 512)]
    found = batches_of(texts, 10_000, 0)
    assert 10_000 <= sum(len(t) for b in found for t in b) < 10_000 + BATCH_TOKENS
    assert all(len(batch) * max(map(len, batch)) <= BATCH_TOKENS for batch in found)
    assert found == batches_of(texts, 10_000, 0) != batches_of(texts, 10_000, 1)


def test_batches_have_few_shapes_whatever_the_texts() -> None:
    """A CPU plans its products anew for each shape, which costs more than the product."""
    lengths = random.Random(0)
    texts = [[1] * lengths.randint(2, 120) for _ in range(500)]
    found = batches_of(texts, 200_000, 0)
    shapes = {tuple(inputs(batch, torch.device("cpu"))["input_ids"].shape) for batch in found}
    assert len(shapes) <= 120 // STEP + 1 and all(width % STEP == 0 for _, width in shapes)
    read = sum(len(text) for batch in found for text in batch)
    assert read > 0.85 * BATCH_TOKENS * len(found), "little is padding"
    first = inputs(found[0], torch.device("cpu"))
    assert first["attention_mask"].sum(dim=1).tolist() == list(map(len, found[0]))
    of_a_window = batches_of([[1] * 50, [1] * 49], 100, 0)
    assert inputs(of_a_window[0], torch.device("cpu"))["input_ids"].shape == (2, 48), "never wider than the model reads"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_loss_and_gradient_by_pieces_are_those_of_whole_logits(model_type: str, monkeypatch) -> None:
    """Behind the decoder models scale or cap their logits: what is taken piece by piece is what their forward gives."""
    monkeypatch.setattr("gptailor.heal.loss.HEAD_ROWS", 7)
    monkeypatch.setattr("gptailor.heal.loss.CHUNK_ELEMENTS", 600)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_of(model_type)).eval()
    ids = torch.randint(3, 90, (2, 11))
    states = model.get_decoder()(input_ids=ids, use_cache=False)[0].flatten(0, 1).detach()
    wanted = states + 0.3 * torch.randn_like(states)
    states.requires_grad_()
    head = Head(model)
    assert torch.allclose(head(states), model(input_ids=ids, use_cache=False).logits.flatten(0, 1), atol=1e-6)
    loss, told = divergence(head, states, wanted), by_the_book(head(states), head(wanted))
    (found,) = torch.autograd.grad(2 * loss, states)
    assert loss.item() == pytest.approx(told.item(), rel=1e-3) and told.item() > 1e-6
    assert torch.allclose(found, torch.autograd.grad(2 * told, states)[0], rtol=1e-3, atol=1e-8)


def test_logits_far_from_zero_have_a_finite_divergence() -> None:
    logits = torch.tensor([[900.0, 0.0, -900.0], [-900.0, -901.0, -902.0]])
    nats, slope = compared(logits, logits.flip(1))
    assert float(nats) == pytest.approx(len(logits) * float(by_the_book(logits, logits.flip(1))), rel=1e-6)
    assert torch.allclose(slope, logits.softmax(-1) - logits.flip(1).softmax(-1), atol=1e-6)


def test_a_teacher_is_asked_once_for_a_text_and_says_the_same_after_a_kill(tiny_family, monkeypatch) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()
    rng = random.Random(0)
    texts = [[rng.randrange(3, 90) for _ in range(rng.randrange(2, 57))] for _ in range(200)]
    n_tokens = sum(map(len, texts))
    once, thrice = batches_of(texts, n_tokens, 0), batches_of(texts, 3 * n_tokens, 0)
    assert kept_bytes(teacher, thrice, False) == n_tokens * teacher.config.hidden_size * 4
    assert not kept_bytes(teacher, once, False) and not kept_bytes(teacher, thrice, False, n_devices=4)
    monkeypatch.setattr("gptailor.heal.teaching.KEPT_BYTES", 1000)
    assert not kept_bytes(teacher, thrice, False), "no more than there is room for"
    asked: list[int] = []
    teacher.get_decoder().register_forward_hook(lambda *_: asked.append(1))
    whole, after = (Teaching(teacher, thrice, True, False) for _ in range(2))
    said = [whole.states(number) for number in range(len(thrice))]
    assert len(asked) < 0.4 * len(thrice)
    fresh = Teaching(teacher, thrice, False, False)
    for number in range(2 * len(thrice) // 3, len(thrice)):
        assert torch.equal(after.states(number), said[number]), "bit for bit"
        assert torch.allclose(fresh.states(number), said[number], atol=1e-5)


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("lora", [8, 0])
def test_the_memory_that_is_said_is_enough_and_not_twice_too_much(
    tiny_family, make_spec, lora: int, in_bfloat16: bool
) -> None:
    from gptailor.family.models import open_family

    family = open_family(make_spec(tiny_family))
    student = Student(Stitcher(family).stitch(StitchPlan.without([2], 6)), lora, 0, in_bfloat16)
    config, kept = student.plain.config, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trained = [p for p in student.plain.parameters() if p.requires_grad]
    held = sum(p.nbytes for p in student.plain.parameters())
    known = {p.untyped_storage().data_ptr() for p in student.plain.parameters()}
    ids = torch.randint(3, 100, (BATCH_TOKENS // 128, 128))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        found = student.model(input_ids=ids).flatten(0, 1)
        loss = divergence(Head(student.plain), found, torch.zeros_like(found))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained)
    activations = sum(size for place, size in kept.items() if place not in known)
    weights = held + 12 * student.n_trained
    frozen = sum(p.numel() for p in student.plain.parameters()) - student.n_trained
    heads = config.num_attention_heads if student.writes_out else 0
    sizes = (5, config.hidden_size, config.intermediate_size, config.vocab_size, frozen, student.n_trained, heads)
    said = heal_bytes(Sizes(*sizes), in_bfloat16)
    assert weights + activations <= said <= 2 * (weights + activations)


@pytest.mark.parametrize("lora", [8, 0])
def test_the_arithmetic_that_is_told_is_what_a_step_takes(tiny_family, lora: int) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval().requires_grad_(False)
    cut = copy.deepcopy(teacher)
    del cut.model.layers[2]
    cut.config.num_hidden_layers = 5
    student, batches = Student(cut, lora, 0), [[list(range(3, 99))] * 8]
    with FlopCounterMode(display=False) as counted:
        wanted = Teaching(teacher, batches, False, False).states(0)
        divergence(Head(student.plain), student.model(torch.tensor(batches[0])).flatten(0, 1), wanted).backward()
    config, each = teacher.config, sum(p.numel() for p in teacher.model.layers[0].parameters())
    trained = student.n_trained if lora else 0
    sizes = Sizes(5, config.hidden_size, config.intermediate_size, config.vocab_size, 0, trained)
    told = heal_operations(sizes, 8 * 96, 8 * 96, each, 6, is_lora=bool(lora))
    assert counted.get_total_flops() < told < 2.5 * counted.get_total_flops()
    assert not lora or trained / 5 <= lora_parameters(lora, config.hidden_size, config.intermediate_size)


def test_a_student_in_bfloat16_loses_nothing_of_what_is_not_trained(tiny_family, make_spec) -> None:
    """Adapters that changed nothing yet give the plan's own float32 weights back, not what they are rounded to."""
    from gptailor.family.models import open_family

    stitched = Stitcher(open_family(make_spec(tiny_family))).stitch(StitchPlan.without([2], 6))
    student = Student(stitched, 4, 0, in_bfloat16=True)
    assert student.plain.get_output_embeddings().weight.dtype == torch.bfloat16
    for layer, state in zip(stitched.model.layers, student.layers(), strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_the_models_page_heals_and_says_how_to_judge_it(run, tmp_path, monkeypatch) -> None:
    from gptailor.dashboard import healing, jobs, readers
    from gptailor.launch.jobs import list_jobs

    here = RunFolder.of(tmp_path / "runs", run.run_id)
    shutil.copytree(run.path, here.path)
    monkeypatch.setenv("GPTAILOR_RUNS", str(here.root))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(healing, "TOKENS", ("5k", "3k"))
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60).run()
    app.switch_page("pages/7_Models.py")
    app.query_params["run"] = run.run_id
    app.run()
    app.selectbox(key="models.heal.tokens").set_value("3k").run()
    app.selectbox(key="models.heal.texts").set_value("objectives").run()
    next(found for found in app.button if found.label == "Heal by a short training").click().run()
    assert not app.exception
    (work,) = list_jobs(tmp_path / "exports" / ".work" / run.run_id)
    while jobs.is_running(jobs.state(work)):
        time.sleep(0.2)
    app.run()
    assert not app.exception and "healed (3k): healed on 3" in app.success[0].value, jobs.state(work)
    labels = [found.label for found in app.button]
    assert "Score it on the held-out benchmarks, beside what it was" in labels
    log = next(work.path.glob("*log*"))
    log.write_text(re.sub(r'"losses": \[[^]]*\]', '"losses": []', log.read_text()))  # as of a heal of a few steps
    app.run()
    assert not app.exception and "healed (3k): healed on 3" in app.success[0].value
    assert "divergence" not in app.success[0].value
    config_id = int(queries.read_run(here).plans.config_id.iloc[0])
    assert (tmp_path / "exports" / f"{run.run_id}-{config_id}-healed-3k" / "README.md").is_file()
