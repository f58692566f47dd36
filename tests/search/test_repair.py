"""Repairs where they are asked for: in a search, in runs of baselines, at an export, at the command line."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from helpers.command_line import write_benchmark
from helpers.families import tiny_config
from helpers.planted import family_with_a_linear_layer

from gptailor.__main__ import main
from gptailor.commands.evaluate import evaluate
from gptailor.commands.export import export_model, generate
from gptailor.commands.subjects import find_subjects
from gptailor.errors import UserError
from gptailor.evaluate.calibration import TextReader, digest_of
from gptailor.launch.engine import prepare
from gptailor.launch.events import Event
from gptailor.plan import Edit, StitchPlan, Texts
from gptailor.results import scores
from gptailor.results.frames import held_out
from gptailor.results.report import write_report
from gptailor.results.story import run_json
from gptailor.results.subjects import stored_plans, stored_subjects
from gptailor.results.summary import run_summary
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Repair, RepairMethod
from gptailor.stitch.edits.registry import Method, refuse_repair
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import KEPT, REPAIRED, RunStatus


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose base can do without layer 3 once layer 2 is repaired."""
    folder = tmp_path_factory.mktemp("repair")
    family_with_a_linear_layer(folder / "family", tiny_config(), size=0.5)
    write_benchmark(folder, "first_words", 60, 0)
    write_benchmark(folder, "other_words", 150, 3)
    spec = {
        "name": "repaired",
        "base_model": str(folder / "family" / "base"),
        "operations": ["remove", "repair"],
        "repair": {"layers": "gaps", "texts": "objectives+base", "tokens": 600},
        "remove": 1,
        "objectives": [{"benchmark": "first_words", "metric": "agree"}],
        "selection": [{"benchmark": "other_words", "metric": "agree"}],
        "held_out": [{"benchmark": "other_words", "metric": "closeness"}],
        "include_path": [str(folder)],
        "budget": {"min": 60, "max": 60},
        "trials": 8,
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def finished(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    return run(load_spec(run_file), tmp_path_factory.mktemp("runs"))


def run(spec: RunSpec, runs: Path) -> tuple[RunFolder, str]:
    """A run done in this process, and what it said."""
    folder, said = prepare(str(runs), spec), io.StringIO()
    assert run_engine(folder, Report(said)) is RunStatus.FINISHED, said.getvalue()
    return folder, said.getvalue()


def test_a_search_repairs_its_finalists_and_judges_them_beside_themselves(finished) -> None:
    folder, said = finished
    tables = queries.read_run(folder)
    plans = {
        c: StitchPlan.from_json(json.loads(p)) for c, p in zip(tables.plans.config_id, tables.plans.plan, strict=True)
    }
    repaired = {c: plan for c, plan in plans.items() if c >= REPAIRED}
    assert len(repaired) == 3 and all(plan.unedited == plans[c - REPAIRED] for c, plan in repaired.items())
    (planted_one,) = [c for c, plan in repaired.items() if plan.removed == (3,)]
    story = run_json(folder)
    tests = {one["config_id"]: one for one in story["repairs"]}
    assert set(tests) == {c - REPAIRED for c in repaired}
    best = tests[planted_one - REPAIRED]
    assert best["p"] < 0.05 and "is better than itself unrepaired" in best["text"] and best["text"] in said
    assert story["selection"]["subject"] == f"config:{planted_one}" == str(scores.best(tables))
    assert f"plan {planted_one - REPAIRED}, repaired, is best on the selection split" in said
    summary = run_summary(folder)
    assert summary.best_config == planted_one and summary.retention == pytest.approx(1.0)
    assert set(summary.best_scores) == set(story["objectives"]) == set(story["best"]["scores"])
    assert story["best"]["retention"] == summary.retention
    assert story["selection"]["retention"] == pytest.approx(1.0), "repaired, it answers as the dense base does"
    for config_id, one in tests.items():
        if one["p"] >= 0.05 or one["difference"] < 0:
            assert "is worse" in one["text"] or "as far as these examples can show" in one["text"]
            searched = tables.evaluations[tables.evaluations.subject == f"config:{REPAIRED + config_id}"]
            assert set(searched.benchmark) == {"other_words"}, "what is not shown to be better is never chosen"


def test_a_repaired_plan_is_evaluated_and_exported_as_any_other(finished, tmp_path) -> None:
    folder, _ = finished
    best = str(scores.best(queries.read_run(folder)))
    config_id = best.removeprefix("config:")
    judged: list[Event] = []
    evaluate(folder, judged.append, ["dense", best])
    got = dict(re.findall(r"(dense|config:\d+)  other_words closeness (\S+)", "\n".join(map(str, judged))))
    assert got[best] == got["dense"]
    export_model(folder, int(config_id), tmp_path / "out", judged.append)
    assert str(judged[-2]) == "100% done"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "then refit" in card and "agree" in card
    generate(folder, int(config_id), "the cat", judged.append, max_tokens=4)
    dense, repaired = (event.result for event in judged[-4:] if event.result is not None)
    assert repaired["text"] == dense["text"] and repaired["n_layers"] == dense["n_layers"] - 1


def test_its_texts_are_kept_with_the_run(finished) -> None:
    folder, _ = finished
    (kept,) = (folder.path / "texts").iterdir()
    texts = json.loads(kept.read_text())
    assert digest_of(texts) == kept.stem and 400 < sum(map(len, texts)) <= 600
    scorer = PlanScorer.open(load_spec(folder.spec), load_spec(folder.spec).objectives, 60)
    assert scorer.repair_texts() == Texts("objectives+base", 600, kept.stem), "and found again without the folder"


def test_a_run_that_is_gone_through_again_scores_nothing_anew(finished, monkeypatch) -> None:
    folder, said = finished
    before = queries.read_run(folder)
    monkeypatch.setattr(RunWriter, "record_examples", lambda *_: pytest.fail("an example was scored once more"))
    told = io.StringIO()
    assert run_engine(folder, Report(told)) is RunStatus.FINISHED
    after = queries.read_run(folder)
    assert after.plans.equals(before.plans) and len(after.evaluations) == len(before.evaluations)
    assert told.getvalue().splitlines()[-2] in said, "and ends with the same choice"


def test_baselines_are_repaired_beside_themselves(run_file, tmp_path) -> None:
    asked = {"baselines": ["last"], "repair": {"method": "prune_comp"}}
    folder, _said = run(build_spec(yaml.safe_load(run_file.read_text()) | asked), tmp_path)
    tables = queries.read_run(folder)
    named = tables.evaluations[tables.evaluations.config_id.notna()]
    assert list(named.subject) == ["baseline:last", "baseline:last+prune_comp"]
    plain, repaired = (StitchPlan.from_json(json.loads(plan)) for plan in tables.plans.plan)
    assert repaired.unedited == plain and repaired.edits[0].method == "prune_comp"
    assert set(tables.trials.status) == {"success"} and tables.plans.n_parameters.nunique() == 1


def test_a_plan_is_repaired_when_it_is_exported_or_stitched(finished, run_file, tmp_path, capsys) -> None:
    folder, _ = finished
    config_id = str(queries.read_run(folder).plans.config_id.iloc[0])

    def call(*arguments: object) -> tuple[int, str]:
        status = main(list(map(str, arguments)))
        said = capsys.readouterr()
        return status, said.out + said.err

    out = tmp_path / "exported"
    status, said = call("export", folder.run_id, config_id, out, "--runs", folder.root, "--repair", "rcpu")
    assert status == 0, said
    plan = StitchPlan.from_json(json.loads((out / "gptailor_plan.json").read_text()))
    assert [edit.method for edit in plan.edits] == ["rcpu"] and "## Scores" not in (out / "README.md").read_text()
    (tmp_path / "plan.json").write_text(json.dumps(plan.unedited.to_json()))
    (tmp_path / "texts.txt").write_text("the cat sat on a mat and one plus two is three " * 100)
    asked = ("stitch", tmp_path / "plan.json", "--family", run_file, "--repair", "refit")
    status, said = call(*asked, "--out", tmp_path / "a")
    assert status == 2 and "--texts objectives: a family file names none; give base, file:PATH" in said
    status, said = call(*asked, "--out", tmp_path / "b", "--texts", f"file:{tmp_path / 'texts.txt'}")
    assert status == 0, said
    made = tmp_path / "b" / "gptailor_plan.json"
    stitched = StitchPlan.from_json(json.loads(made.read_text()))
    texts = stitched.edits[0].texts
    assert texts is not None and texts.source == f"file:{tmp_path / 'texts.txt'}"
    (tmp_path / "texts.txt").write_text("other words " * 100)
    status, said = call("stitch", made, "--family", run_file, "--out", tmp_path / "d")
    assert status == 2 and "gives other texts now" in said


def test_plans_of_a_finished_run_are_repaired_and_judged_beside_what_they_were(finished, tmp_path, monkeypatch) -> None:
    """Under names that tell how; several of one plan side by side; of a plan that is stored nothing is fitted again."""
    folder, _ = finished
    before = queries.read_run(folder)
    (planted_one,) = [c for c, plan in stored_plans(before).items() if c < REPAIRED and plan.removed == (3,)]
    was, cut = f"config:{planted_one}", "baseline:block_influence"
    said: list[Event] = []

    def judge(*subjects: str, method: str = "refit", texts: str = "objectives") -> dict[str, float]:
        said.clear()
        evaluate(folder, said.append, subjects, repair=Repair(method=RepairMethod(method), texts=texts))
        return {event.result["subject"]: event.result["score"] for event in said if event.result}

    (tmp_path / "words.txt").write_text("the cat sat on a mat and one plus two is three " * 200)
    refit, also = f"repaired:{was}/refit", f"repaired:{was}/replaceme-words.txt"
    got = judge(was, cut)
    assert list(got) == [was, refit, cut, f"repaired:{cut}/refit"] and got[was] < got[refit]
    assert got[refit] == pytest.approx(1, abs=1e-3), "this one can be mended wholly"
    ahead = f"Plan {planted_one}, repaired (refit) is ahead of Plan {planted_one} by"
    assert any(event.text.startswith(ahead) for event in said)
    assert list(judge(was, method="replaceme", texts=f"file:{tmp_path / 'words.txt'}")) == [was, also]
    kept = {str(who): number for number, who in stored_subjects(queries.read_run(folder)).items() if number >= KEPT}
    assert kept == {refit: KEPT, cut: KEPT + 1, f"repaired:{cut}/refit": KEPT + 2, also: KEPT + 3}

    monkeypatch.setattr(Method, "load", lambda self: pytest.fail(f"{self.title}: weights are fitted once more"))
    monkeypatch.setattr(TextReader, "named", lambda *_: pytest.fail("texts are read once more"))
    assert judge(was, cut) == got
    assert set(stored_plans(queries.read_run(folder))) == {*stored_plans(before), *kept.values()}
    monkeypatch.undo()
    (tmp_path / "words.txt").write_text("a mat is on the cat " * 200)
    assert list(judge(was, method="replaceme", texts=f"file:{tmp_path / 'words.txt'}")) == [was, f"{also}-2"]

    story = run_json(folder)["held_out"]
    assert {one["subject"] for one in story["averages"]} >= {was, refit, cut, also}
    told = [one for one in story["changes"] if one.startswith(f"Plan {planted_one}, repaired (refit)")]
    assert len(told) == 1 and told[0] in unescape(write_report(folder, tmp_path / "report.html").read_text())
    table = held_out.shown(held_out.averages(queries.read_run(folder))).set_index("Subject")
    row = table.loc[f"Plan {planted_one}, repaired (refit)"]
    assert row["Kind"] == "repaired" and row["Before"] == pytest.approx(got[was])
    export_model(folder, kept[refit], tmp_path / "out", said.append)
    assert f"{got[refit]:.4f}" in (tmp_path / "out" / "README.md").read_text(), "its own scores"
    asked = {str(one.subject) for one in find_subjects(folder, ["repaired"])}
    assert {refit, also, f"{also}-2", f"config:{REPAIRED + planted_one}"} <= asked


def test_what_cannot_be_repaired_is_said_in_a_sentence(finished, tmp_path) -> None:
    folder, _ = finished
    repair = Repair(method=RepairMethod.RCPU)
    for who, message in (
        ("dense", "--repair rcpu: dense leaves out no layer, so there is no gap to repair"),
        (
            "best",
            r"config:1\d+ has fitted weights already \(refit\); repair the plan that it was before",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(folder, lambda _: None, [who], repair=repair)
    best = scores.best(queries.read_run(folder))
    assert best is not None and best.config_id is not None
    with pytest.raises(UserError, match="--repair rcpu: the plan has fitted weights already"):
        export_model(folder, best.config_id, tmp_path / "out", lambda _: None, repair=repair)
    sparse = StitchPlan.without([2], 6).edited(Edit("besa", texts=Texts("objectives", 600, "abc")))
    with pytest.raises(UserError, match=r"baseline:besa has zeros among its weights \(besa\)"):
        refuse_repair(sparse, "baseline:besa", "rcpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repair": {"method": "magic"}}, "repair.method: must be 'replaceme', .* got 'magic'"),
        ({"repair": {"texts": "wiki"}}, "repair.texts: must be objectives, base, file:PATH or hub:DATA_SET"),
        ({"repair": {"method": "rcpu", "layers": "gaps"}}, "layers and projections are settings of refit"),
        ({"repair": {"teacher": "x"}}, "repair.teacher: 'x' is neither 'base' nor a candidate"),
        ({"repair": {"token": 5}}, "repair.token: unknown key; did you mean 'tokens'"),
        ({"selection": []}, "operations: repair needs selection splits"),
        ({"operations": ["remove"]}, "repair: says how, but operations does not list repair"),
        ({"operations": ["repair"], "remove": 0}, "operations: repair mends what removed layers leave; add remove"),
    ],
)
def test_what_a_run_file_may_not_ask(run_file, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build_spec(yaml.safe_load(run_file.read_text()) | changes)


def test_the_command_line_says_what_a_repair_may_be(run_file, capsys) -> None:
    for options, message in (
        (("--repair", "magic"), "--repair magic: must be 'replaceme', 'replaceme_cosine', 'refit'"),
        (("--repair", "refit", "--texts", "wiki"), "--texts wiki: must be objectives, base, file:PATH"),
        (("--texts", "base"), "--texts: are those of a repair; name one with --repair"),
    ):
        assert main(["baseline", "last", str(run_file), *options]) == 2
        assert message in capsys.readouterr().err


def test_an_mlp_that_sees_all_texts_as_one_row_is_refitted(make_family, tmp_path) -> None:
    """OPT's, whose fc1 and fc2 read [texts * tokens, hidden]."""
    base = make_family("opt", candidates=(), ffn_dim=64, word_embed_proj_dim=32) / "base"
    for name, n, offset in (("first_words", 60, 0), ("held_words", 20, 7)):
        write_benchmark(tmp_path, name, n, offset)
    spec = {
        "name": "opt",
        "base_model": str(base),
        "operations": ["remove"],
        "baselines": ["last"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "closeness"}],
        "held_out": [{"benchmark": "held_words", "metric": "closeness"}],
        "include_path": [str(tmp_path)],
        "budget": {"min": 60, "max": 60},
        "device": "cpu",
    }
    folder, _ = run(build_spec(spec), tmp_path / "runs")
    repair = Repair(method=RepairMethod.REFIT, texts="objectives", tokens=2000)
    evaluate(folder, lambda _: None, ["baseline:last"], repair=repair)
    assert "repaired:baseline:last/refit" in set(queries.read_run(folder).evaluations.subject)
