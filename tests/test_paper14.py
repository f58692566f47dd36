"""The paper's benchmarks: each as it is defined, on a few rows of its data set's form that are written here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.evaluate_tools import evaluator, opened

from gptailor.errors import UserError
from gptailor.evaluate import rouge
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.evaluator import _answers
from gptailor.evaluate.examples import Example
from gptailor.evaluate.metrics import gold_options
from gptailor.evaluate.safety import check_task_file
from gptailor.evaluate.scoring import item_of
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Benchmark

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "data" / "benchmarks" / "paper14"
LM_EVAL = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "wsc": "super_glue/wsc/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "race": "race/race.yaml",
    "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
    "cmmlu_anatomy": "cmmlu/cmmlu_anatomy.yaml",
}
WSC = [
    {
        "text": "Ann told Sue that she had won .",
        "span1_index": 0,
        "span1_text": "Ann",
        "span2_index": 4,
        "span2_text": "she",
        "label": 1,
    },
    {
        "text": "It broke the glass table by the old door .",
        "span1_index": 2,
        "span1_text": "the glass table",
        "span2_index": 0,
        "span2_text": "It",
        "label": 0,
    },
]
LETTERS = {"A": "one", "B": "two", "C": "three", "D": "four"}
QUESTION = {"question": "what sat on the mat", "choices": ["the dog", "the cat", "a house", "a tree"], "answer": 1}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "paper14_cmnli": ("validation", [{"sentence1": "甲", "sentence2": "乙", "label": i, "idx": i} for i in range(3)]),
    "paper14_c3": (
        "validation",
        [
            {
                "id": 1,
                "context": ["甲：你好。", "乙：好。"],
                "question": "谁先说？",
                "choice": ["乙", "甲", "丙"],
                "answer": "甲",
            },
            {"id": 2, "context": ["甲：走。"], "question": "做什么？", "choice": ["走", "不走"], "answer": "走"},
        ],
    ),
    "paper14_race_m": (
        "test",
        [
            {
                "example_id": "middle1.txt",
                "article": "the cat sat .",
                "answer": "C",
                "question": "who ?",
                "options": ["a", "b", "c", "d"],
            }
        ],
    ),
    "paper14_wsc_g": ("validation", WSC),
    "paper14_chid": (
        "test",
        [
            {
                "id": 7,
                "candidates": ["一", "二", "三", "四", "五", "六", "七"],
                "content": "他#idiom#了#idiom#。",
                "answer": 3,
            }
        ],
    ),
    "paper14_xsum": ("test", [{"document": "the cat sat on the mat .\nit ran .", "summary": "the cat ran", "id": "1"}]),
    "hellaswag": (
        "validation",
        [
            {
                "ind": 1,
                "activity_label": "Cats",
                "ctx_a": "the cat sat .",
                "ctx_b": "the dog",
                "endings": ["ran", "sat on", "a", "b"],
                "label": "1",
            }
        ],
    ),
    "piqa": ("validation", [{"goal": "sit", "sol1": "on the mat", "sol2": "on the tree", "label": 1}]),
    "wsc": ("validation", WSC),
    "commonsense_qa": (
        "validation",
        [
            {"question": f"who {i} ?", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "D"}
            for i in range(10)
        ],
    ),
    "boolq": ("validation", [{"question": "is it", "passage": "the cat sat .", "idx": 0, "label": 1}]),
    "race": (
        "test",
        [
            {
                "article": "the cat sat .",
                "problems": str([{"question": "who sat ?", "answer": "B", "options": ["a", "b", "c", "d"]}]),
            }
        ],
    ),
    "mmlu_anatomy": ("test", [{**QUESTION, "subject": "anatomy", "n": i} for i in range(7)]),
    "cmmlu_anatomy": ("test", [{"Question": f"问{i}", **LETTERS, "Answer": "C"} for i in range(7)]),
}
SHOTS = {"commonsense_qa": 8, "mmlu_anatomy": 5, "cmmlu_anatomy": 5}
METRIC = {"paper14_wsc_g": "exact_match", "paper14_chid": "exact_match", "paper14_xsum": "rouge1"}
GOLD = {"hellaswag": 1, "piqa": 1, "wsc": 1, "commonsense_qa": 3, "boolq": 1, "race": 1, "mmlu_anatomy": 1}
GOLD |= {"cmmlu_anatomy": 2, "paper14_c3": 1, "paper14_race_m": 2, "paper14_cmnli": 0}
SEEN = {
    "paper14_cmnli": ("语句一：“甲”\n语句二：“乙”\n请问这两句话是什么关系？", ["\n无关", "\n蕴含", "\n矛盾"]),
    "paper14_c3": ("文章：甲：你好。 乙：好。\n问题：谁先说？\n答案：", ["乙", "甲", "丙"]),
    "paper14_race_m": (
        "Read the article, and answer the question by replying A, B, C or D.\n\nArticle:\nthe cat sat .\n\nQ: who ?\n\n"
        "A. a\nB. b\nC. c\nD. d\nA:",
        [" A", " B", " C", " D"],
    ),
    "paper14_wsc_g": (
        "Passage: * Ann * told Sue that # she # had won .\n"
        "Does the pronoun # she # refer to * Ann *?\nA. Yes\nB. No\nAnswer:",
        [],
    ),
    "paper14_chid": (
        "他______了______。\n请选择______处所填的词\nA. 一\nB. 二\nC. 三\nD. 四\nE. 五\nF. 六\nG. 七\n"
        "请从”A“，”B“，”C“，”D“，”E“，”F“，”G“中进行选择。答：",
        [],
    ),
    "paper14_xsum": (
        "Document：the cat sat on the mat .\nit ran .\nBased on the previous text, provide a brief single summary:",
        [],
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from helpers.families import train_tokenizer

    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files that include the suite's, and only say where other rows are."""
    import lm_eval.tasks

    package = Path(lm_eval.tasks.__file__).parent
    folder = tmp_path_factory.mktemp("paper14")
    for name, (_, rows) in ROWS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        definition = package / LM_EVAL[name] if name in LM_EVAL else SUITE / f"{name}.yaml"
        splits = {split: str(data) for split in ("train", "validation", "test", "dev")}
        here = {"include": str(definition), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
        text = yaml.safe_dump(here | {"dataset_kwargs": {"data_files": splits}})
        (folder / f"local_{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def asked(name: str, **changes: Any) -> Benchmark:
    split: Any = ROWS[name][0]
    known = {"metric": METRIC.get(name, "acc"), "split": split, "num_fewshot": SHOTS.get(name)}
    return Benchmark(benchmark=f"local_{name}", **known | changes)


def first(benchmark: OpenBenchmark) -> Example:
    """That of the first row."""
    return benchmark.examples[[row for _, row in benchmark.order].index(0)]


@pytest.mark.parametrize("name", ROWS)
def test_each_is_scored(folder: Path, tokenizer: Any, tiny_family: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()
    (benchmark,) = opened(folder, tokenizer, asked(name), max_length=512)
    engine = evaluator([benchmark], tokenizer, max_length=512)
    score = engine.score(benchmark, engine.items(model, benchmark, 0, benchmark.n_examples))
    assert 0 <= score.score <= 1 and score.n_samples == len(ROWS[name][1])
    assert (benchmark.chance is None) == (name in METRIC)


@pytest.mark.parametrize("name", SEEN)
def test_prompts_are_the_published_ones(folder: Path, tokenizer: Any, name: str) -> None:
    (benchmark,) = opened(folder, tokenizer, asked(name), max_length=512)
    example = first(benchmark)
    prompt, options = SEEN[name]
    assert [instance.args[0] for instance in example.instances] == [prompt] * max(1, len(options))
    if options:
        assert [instance.args[1] for instance in example.instances] == options
    else:
        (request,) = example.prompts
        assert request.max_new_tokens == 100 and "\n" not in request.until  # an answer may begin with an empty line


def test_marks_go_round_whole_spans(folder: Path, tokenizer: Any) -> None:
    (benchmark,) = opened(folder, tokenizer, asked("paper14_wsc_g"), max_length=512)
    text = next(e for e in benchmark.examples if e.doc["label"] == 0).instances[0].args[0]
    assert text.startswith("Passage: # It # broke * the glass table * by the old door .\nDoes the pronoun # It # refer")


@pytest.mark.parametrize("name", GOLD)
def test_the_right_option_is_found(folder: Path, tokenizer: Any, name: str) -> None:
    (benchmark,) = opened(folder, tokenizer, asked(name), max_length=512)
    example = first(benchmark)
    assert gold_options(benchmark.tasks[0], example) == [GOLD[name]]
    right = [-1.0 if number == GOLD[name] else -9.0 for number in range(len(example.instances))]
    assert item_of(benchmark, example, [(value, False) for value in right], right) == 1.0


@pytest.mark.parametrize("name, shots", SHOTS.items())
def test_shots_are_given(folder: Path, tokenizer: Any, name: str, shots: int) -> None:
    (benchmark,) = opened(folder, tokenizer, asked(name), max_length=2048)
    (text,) = {instance.args[0] for instance in benchmark.examples[0].instances}
    assert len(re.findall("Answer:|答案：", text)) == shots + 1


@pytest.mark.parametrize(
    "name, written, item",
    [
        ("paper14_wsc_g", " the answer is A, not B", 1.0),
        ("paper14_wsc_g", "\n\nB. No", 0.0),
        ("paper14_wsc_g", "yes", 0.0),
        ("paper14_chid", "选D", 1.0),
        ("paper14_chid", "", 0.0),
        ("paper14_xsum", "\n The cat ran \nthe dog", 1.0),
        ("paper14_xsum", " the dog ran.\n the cat ran", 2 / 3),
        ("paper14_xsum", "", 0.0),
    ],
)
def test_what_is_written_is_read_as_published(
    folder: Path, tokenizer: Any, name: str, written: str, item: float
) -> None:
    (benchmark,) = opened(folder, tokenizer, asked(name), max_length=512)
    example = first(benchmark)
    answers, precise = _answers(example, [], [written])
    assert item_of(benchmark, example, answers, precise) == pytest.approx(item)


def test_rouge_is_the_packages() -> None:
    from lm_eval.api.registry import get_metric, is_higher_better
    from rouge_score.rouge_scorer import RougeScorer

    rouge.register()
    right, said = "the cat sat on the mat", "The cat ran off the old mat!"
    expected = RougeScorer(list(rouge.KINDS)).score(right, said)
    for kind in rouge.KINDS:
        found = get_metric(kind)
        assert found is not None and found(references=[right], predictions=[said]) == expected[kind].fmeasure
        assert is_higher_better(kind)


def test_shots_are_fixed_where_the_paper_has_none(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="fixes num_fewshot to 0"):
        opened(folder, tokenizer, asked("paper14_c3", num_fewshot=2))


def test_the_suite_runs_no_code_and_our_folder_has_no_privilege(tmp_path: Path) -> None:
    rouge.register()
    for file in SUITE.glob("*.yaml"):
        check_task_file(file, ROOT / "nowhere")
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["task"] == file.stem
    (tmp_path / "evil.yaml").write_text(f"include: {SUITE / 'paper14_xsum.yaml'}\nprocess_docs: !function code.run\n")
    with pytest.raises(UserError, match="runs Python code"):
        check_task_file(tmp_path / "evil.yaml", ROOT / "nowhere")


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-13b", "llama-3-8b"])
def test_presets_of_the_papers_families_judge_by_all_fourteen(name: str) -> None:
    """As docs/paper14.md lists them, which a person copies."""
    page = (ROOT / "docs" / "paper14.md").read_text(encoding="utf-8")
    listed = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    content = yaml.safe_load((ROOT / "data" / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert content["held_out"] == listed["held_out"] and len(listed["held_out"]) == 14
    assert set(listed["include_path"]) <= set(content["include_path"])
    own = {file.stem for file in SUITE.glob("*.yaml")}
    assert own <= {judge.benchmark for judge in load_spec(ROOT / "data" / "presets" / f"{name}.yaml").held_out}
