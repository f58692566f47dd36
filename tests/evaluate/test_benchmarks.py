"""Opening benchmarks: nested subsets, continued scores, our own metric and errors, and every refusal's message."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluate_tools import CHOICE, GENERATION, PERPLEXITY, evaluator, opened, rows, write_task

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import calibration_batches, nested_order
from gptailor.evaluate.evaluator import Stopped
from gptailor.evaluate.scoring import NonFinite
from gptailor.spec.sections import Benchmark

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from helpers.families import train_tokenizer

    return train_tokenizer()


@pytest.fixture(scope="module")
def model(tiny_family: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_task(folder, "many")
    write_task(folder, "write", GENERATION)
    write_task(folder, "text", PERPLEXITY)
    for number, size in enumerate((10, 30, 60)):
        write_task(folder, f"part{number}", extra="tag: parts\n", test=rows(number, size))
    metrics = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    (folder / "whole.yaml").write_text("group: whole\ntask: [part0, part1, part2]\n" + metrics)
    (folder / "loose.yaml").write_text("group: loose\ntask: [part0, part1]\n")
    return folder


def test_orders_are_seeded_nested_and_spread_over_the_tasks() -> None:
    names, sizes = ["a", "b", "c"], [10, 30, 60]
    order = nested_order(names, sizes, seed=3)
    assert order == nested_order(names, sizes, seed=3) != nested_order(names, sizes, seed=4)
    assert sorted(order) == [(task, doc) for task, size in enumerate(sizes) for doc in range(size)]
    for n in (10, 20, 50, 90):
        counts = Counter(task for task, _ in order[:n])
        assert all(abs(counts[task] - n * size / 100) <= 1 for task, size in enumerate(sizes))


def test_a_small_maximum_is_the_beginning_of_a_large_one(folder: Path, tokenizer: Any) -> None:
    spec = Benchmark(benchmark="whole", metric="acc", split="test")
    (small,) = opened(folder, tokenizer, spec, max_examples=20)
    (large,) = opened(folder, tokenizer, spec)
    assert small.order == large.order[:20]
    assert (small.n_examples, large.n_examples) == (20, 100)
    assert small.chance == pytest.approx(1 / 3)


def test_always_the_same_answer_is_guessing_too(tmp_path: Path, tokenizer: Any) -> None:
    """Where all examples offer the same options; a place among options of their own is nothing that a model sees."""
    asked = [{"query": f"the red bird {n}", "choices": ["yes", "no"], "gold": int(n >= 14)} for n in range(20)]
    own = [row | {"choices": [f"a {n}", f"b {n}"]} for n, row in enumerate(asked)]
    write_task(tmp_path, "same", test=asked)
    write_task(tmp_path, "own", test=own)
    chances = {
        (name, metric): opened(tmp_path, tokenizer, Benchmark(benchmark=name, metric=metric, split="test"))[0].chance
        for name in ("same", "own")
        for metric in ("acc_norm", "choice_prob", "agree")
    }
    assert {key: chance for key, chance in chances.items() if chance != 0.5} == {
        ("same", "acc_norm"): 0.7,
        ("same", "choice_prob"): 0.7,
    }


def test_a_part_of_a_split_is_what_lies_there_in_the_order(folder: Path, tokenizer: Any) -> None:
    whole, part, rest = opened(
        folder,
        tokenizer,
        *(Benchmark(benchmark="whole", split=split) for split in ("test", "test[20:50]", "test[90:]")),
    )
    assert part.order == whole.order[20:50] and rest.order == whole.order[90:]
    assert [e.instances[0].doc for e in part.examples] == [e.instances[0].doc for e in whole.examples[20:50]]
    said = refused(folder, tokenizer, Benchmark(benchmark="whole", split="test[100:]"))
    assert said == "benchmark whole: test[100:] is empty: the split has 100 examples"


def test_a_budget_beyond_the_benchmark_saturates(folder: Path, tokenizer: Any) -> None:
    (many,) = opened(folder, tokenizer, Benchmark(benchmark="many", split="test"), max_examples=1000)
    assert many.n_examples == 20


def test_splits_are_the_asked_ones(folder: Path, tokenizer: Any) -> None:
    specs = [Benchmark(benchmark="many", split=split, num_fewshot=2) for split in ("train", "validation", "test")]
    for number, benchmark in enumerate(opened(folder, tokenizer, *specs)):
        queries = {row["query"] for row in rows(number, 20)}
        assert {example.doc["query"] for example in benchmark.examples} == queries
        for example in benchmark.examples:  # the question is never among its own examples
            text = example.instances[0].args[0]
            assert text.endswith(example.doc["query"]) and text.count(example.doc["query"]) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_prompt_is_the_same_whatever_else_is_asked(folder: Path, tokenizer: Any, split: str) -> None:
    def prompts(shots: int, n: int | None) -> list[str]:
        spec = Benchmark(benchmark="many", split=split, num_fewshot=shots)
        (benchmark,) = opened(folder, tokenizer, spec, max_examples=n)
        return [example.instances[0].args[0] for example in benchmark.examples]

    whole = prompts(3, None)
    assert prompts(3, 1) == whole[:1] and prompts(3, 7) == whole[:7]
    assert len({prompt.rpartition("\n\n")[0] for prompt in whole}) > 15, "each has examples of its own"


def test_more_shots_than_there_are_examples(folder: Path, tokenizer: Any) -> None:
    said = refused(folder, tokenizer, Benchmark(benchmark="many", split="test", num_fewshot=25))
    assert said == "benchmark many: task many: num_fewshot is 25, and it has 20 examples to draw from"


@pytest.mark.parametrize("name, metric", [("many", "acc_norm"), ("text", "word_perplexity"), ("write", "bleu,word")])
def test_continued_items_give_the_score_of_one_go(
    folder: Path, tokenizer: Any, model: Any, name: str, metric: str
) -> None:
    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark=name, metric=metric))
    engine = evaluator([benchmark], tokenizer)
    stored = json.loads(json.dumps(engine.items(model, benchmark, 0, 5)))
    grown = stored + engine.items(model, benchmark, 5, 20)
    whole = engine.items(model, benchmark, 0, 20)
    assert grown == json.loads(json.dumps(whole))
    assert engine.score(benchmark, grown) == engine.score(benchmark, whole)
    assert engine.score(benchmark, stored).n_samples == 5


def test_directions_are_the_metrics(folder: Path, tokenizer: Any) -> None:
    acc, text = opened(
        folder, tokenizer, Benchmark(benchmark="many"), Benchmark(benchmark="text", metric="bits_per_byte")
    )
    assert acc.higher_is_better and not text.higher_is_better
    assert text.chance is None


def test_choice_prob_is_the_softmax_of_log_likelihoods_at_equal_length(
    folder: Path, tokenizer: Any, model: Any
) -> None:
    from gptailor.evaluate.forward import score_rows

    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="many", metric="choice_prob", split="test"))
    engine = evaluator([benchmark], tokenizer)
    items = engine.items(model, benchmark, 0, 20)
    for example, item in zip(benchmark.examples, items, strict=True):
        scores = [answer.precise for answer in score_rows(model, example.windows, 4096)]
        sizes = [len(f" {choice}".encode()) for choice in example.doc["choices"]]
        root = math.sqrt(sum(sizes) / len(sizes))
        shares = [math.exp(root * score / size) for score, size in zip(scores, sizes, strict=True)]
        assert item == pytest.approx(shares[example.doc["gold"]] / sum(shares), abs=1e-4)
    assert 0 < engine.score(benchmark, items).score < 1 and benchmark.chance == pytest.approx(1 / 3)


def test_answer_perplexity_is_that_of_the_right_options_by_byte(folder: Path, tokenizer: Any, model: Any) -> None:
    from gptailor.evaluate.forward import score_rows

    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="many", metric="answer_perplexity", split="test"))
    engine = evaluator([benchmark], tokenizer)
    items = engine.items(model, benchmark, 0, 20)
    total = length = 0.0
    for example in benchmark.examples[:20]:
        gold = example.doc["gold"]
        total += score_rows(model, example.windows, 4096)[gold].precise
        length += len(f" {example.doc['choices'][gold]}".encode())
    score = engine.score(benchmark, items)
    assert score.score == pytest.approx(math.exp(-total / length), rel=1e-4)
    assert score.stderr and not benchmark.higher_is_better and benchmark.chance is None


def test_jackknife_errors_are_those_of_the_mean_where_both_apply(folder: Path, tokenizer: Any) -> None:
    """On plain accuracies the jackknife must come near the textbook formula."""
    from dataclasses import replace

    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="part2", split="test"))
    engine = evaluator([benchmark], tokenizer)
    items = [1.0] * 20 + [0.0] * 40
    random.Random(0).shuffle(items)
    textbook = engine.score(benchmark, items).stderr
    jackknife = engine.score(replace(benchmark, weight_by_size=False), items).stderr
    assert textbook == pytest.approx(math.sqrt(20 / 60 * 40 / 60 / 59))
    assert jackknife is not None and textbook / 2 < jackknife < textbook * 2
    assert engine.score(benchmark, items[:1]).stderr is None


def test_a_model_of_nan_never_scores(folder: Path, tokenizer: Any, tiny_family: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    specs = [Benchmark(benchmark="many"), Benchmark(benchmark="text", metric="word_perplexity")]
    for benchmark in opened(folder, tokenizer, *specs):
        with pytest.raises(NonFinite, match="not finite"):
            evaluator([benchmark], tokenizer).items(broken, benchmark, 0, 5)
    assert issubclass(NonFinite, FloatingPointError)


def test_a_model_of_nan_is_noticed_after_a_healthy_one(
    folder: Path, tokenizer: Any, model: Any, tiny_family: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="many"))
    engine = evaluator([benchmark], tokenizer)
    engine.items(model, benchmark, 0, 5)
    broken = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.inf)
    with pytest.raises(NonFinite):
        engine.items(broken, benchmark, 0, 5)


def test_generation_of_nan_never_scores(folder: Path, tokenizer: Any, tiny_family: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="write", metric="exact_match,first"))
    with pytest.raises(NonFinite):
        evaluator([benchmark], tokenizer).items(broken, benchmark, 0, 5)


@pytest.mark.parametrize("name, metric", [("many", "acc"), ("write", "exact_match,first")])
def test_stopping_between_packs(folder: Path, tokenizer: Any, model: Any, name: str, metric: str) -> None:
    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark=name, metric=metric))
    engine = evaluator([benchmark], tokenizer, batch_tokens=64)
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Stopped):
        engine.items(model, benchmark, 0, 20, should_stop)
    assert len(asked) >= 3


def test_out_of_memory_halves_the_packs_once(
    folder: Path, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds 100 tokens, asked for packs of 150: halved to 75, all is scored; a smaller one gives up."""
    from gptailor.evaluate import evaluator as module

    (benchmark,) = opened(folder, tokenizer, Benchmark(benchmark="many"))
    expected = evaluator([benchmark], tokenizer).items(model, benchmark, 0, 20)
    real = module.score_direct

    def small_device(holds: int) -> Any:
        def score_direct(model: Any, pack: Any) -> Any:
            if len(pack.tokens) > holds:
                raise torch.OutOfMemoryError("no room")
            return real(model, pack)

        return score_direct

    for holds in (100, 10):
        engine = evaluator([benchmark], tokenizer, batch_tokens=150)
        engine.path = "direct"
        monkeypatch.setattr(module, "score_direct", small_device(holds))
        if holds == 100:
            assert engine.items(model, benchmark, 0, 20) == expected
        else:
            with pytest.raises(torch.OutOfMemoryError):
                engine.items(model, benchmark, 0, 20)


def test_metrics_of_one_benchmark_are_read_once(
    folder: Path, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptailor.evaluate import evaluator as module

    specs = [
        *(Benchmark(benchmark="many", metric=metric) for metric in ("acc", "choice_prob", "answer_perplexity")),
        Benchmark(benchmark="many", metric="acc", num_fewshot=2),
        *(Benchmark(benchmark="write", metric=metric) for metric in ("exact_match,first", "bleu,word")),
    ]
    benchmarks = opened(folder, tokenizer, *specs)
    alone = [evaluator([one], tokenizer).items(model, one, 3, 20) for one in benchmarks]
    tokens: list[int] = []
    real_pack, real_texts = module.score_direct, module.run_batches

    def counting_pack(model: Any, pack: Any) -> Any:
        tokens.append(len(pack.tokens))
        return real_pack(model, pack)

    def counting_texts(model: Any, prompts: Any, *rest: Any) -> Any:
        tokens.append(len(prompts))
        return real_texts(model, prompts, *rest)

    monkeypatch.setattr(module, "score_direct", counting_pack)
    monkeypatch.setattr(module, "run_batches", counting_texts)
    engine = evaluator(benchmarks, tokenizer)
    engine.path = "direct"
    assert engine.items_of(model, [(one, 3, 20) for one in benchmarks]) == alone
    together = sorted(tokens)
    tokens.clear()
    engine.items_of(model, [(benchmarks[place], 3, 20) for place in (0, 3, 4)])
    assert together == sorted(tokens)


def test_calibration_texts_are_prompts_with_the_right_answer(folder: Path, tokenizer: Any) -> None:
    benchmarks = opened(folder, tokenizer, Benchmark(benchmark="many"), Benchmark(benchmark="part0"))
    batches = calibration_batches(benchmarks, 6, tokenizer, 256)
    assert len(batches) == 6
    for place, tokens in enumerate(batches):
        doc = benchmarks[place % 2].examples[place // 2].doc
        assert tokenizer.decode(tokens) == f"{doc['query']} {doc['choices'][doc['gold']]}"


def refused(folder: Path, tokenizer: Any, spec: Benchmark, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(folder, tokenizer, spec, **settings)
    return str(error.value)


def test_refusals_name_what_exists(folder: Path, tokenizer: Any) -> None:
    said = refused(folder, tokenizer, Benchmark(benchmark="text", metric="word_perplexity", split="test"))
    assert said == "benchmark text: task text has no test split; it has validation"
    said = refused(folder, tokenizer, Benchmark(benchmark="many", metric="acc_nrom"))
    assert said == (
        "benchmark many: has no metric 'acc_nrom'; it has acc, acc_norm, choice_prob, answer_perplexity, agree, "
        "closeness; did you mean acc_norm?"
    )
    for metric in ("choice_prob", "answer_perplexity", "agree", "closeness"):
        said = refused(folder, tokenizer, Benchmark(benchmark="text", metric=metric))
        assert said == (
            f"benchmark text: metric {metric} is read of a question's options, and this is no multiple-choice task; it "
            "has bits_per_byte, byte_perplexity, word_perplexity"
        )
    said = refused(folder, tokenizer, Benchmark(benchmark="write", metric="exact_match"))
    assert said.endswith("several filters; name it: exact_match,first or exact_match,word")
    said = refused(folder, tokenizer, Benchmark(benchmark="write", metric="exact_match,last"))
    assert said == "benchmark write: has no filter 'last'; it has first, word"
    said = refused(folder, tokenizer, Benchmark(benchmark="parts"))
    assert said == (
        "benchmark parts: is a tag over 3 tasks without a score of its own; name one of them: part0, part1, part2"
    )
    said = refused(folder, tokenizer, Benchmark(benchmark="loose"))
    assert said == "benchmark loose: is a group without a score of its own; name one of its tasks: part0, part1"
    said = refused(folder, tokenizer, Benchmark(benchmark="many"), include_path=["nowhere"])
    assert said == "include_path: nowhere is not a folder; it must hold lm-eval task files (*.yaml)"


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_close_ones(folder: Path, tokenizer: Any) -> None:
    said = refused(folder, tokenizer, Benchmark(benchmark="mani"))
    assert said.startswith("benchmark mani: neither lm-eval nor include_path has a task or group of this name; did you")
    assert "many" in said


@pytest.mark.parametrize(
    "text, reason",
    [("task: [unclosed\n", "cannot be read: while parsing"), ("doc_to_text: query\n", "defines no task of this name")],
)
def test_a_task_file_that_cannot_be_read_is_named(tmp_path: Path, tokenizer: Any, text: str, reason: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="broken"))
    assert "broken.yaml" in said and reason in said


def test_what_cannot_be_scored_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    nothing = [{"query": "the cat", "choices": [" on", "sat"], "gold": 0}, {"query": "a", "choices": [""], "gold": 0}]
    write_task(tmp_path, "blank", CHOICE.replace("doc_to_text", 'target_delimiter: ""\ndoc_to_text'), test=nothing)
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="blank", split="test"))
    assert said == "benchmark blank: row 1 of blank: the answer '' or its context has no tokens of its own to score"
    write_task(tmp_path, "huge", test=rows(1, 5, words=(50, 60)))
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="huge", split="test"), max_length=16)
    assert said.startswith("benchmark huge: row ") and said.endswith("more than the model's window of 16")
    write_task(tmp_path, "sampled", GENERATION.replace("max_gen_toks: 12", "do_sample: true, temperature: 0.7"))
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="sampled", metric="exact_match,first"))
    assert "samples its answers" in said and said.startswith("benchmark sampled:")
    write_task(tmp_path, "lost", CHOICE.replace("validation.jsonl", "missing.jsonl"))
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="lost"))
    assert said.startswith("benchmark lost: lm-eval cannot load it: FileNotFoundError") and "missing.jsonl" in said
    write_task(tmp_path, "zero", extra="num_fewshot: 0\n")
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="zero", num_fewshot=3))
    assert "fixes num_fewshot to 0 in its file" in said
    tokenizer = type(tokenizer).from_pretrained(_saved_without_template(tokenizer, tmp_path))
    write_task(tmp_path, "many")
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="many"), chat_template=True)
    assert "has no chat template" in said


def _saved_without_template(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    return folder / "plain"


CODE = {
    "function": ("process_docs: !function code.process\n", "`!function` on line"),
    "hidden": ('process_docs: !<!function> "code.process"\n', "`!function` on line"),
    "object": ("process_docs: !!python/name:os.system\n", "python/name:os.system"),
    "metric": ("  - {metric: rouge, hf_evaluate: true}\n", "metric `rouge` loads a program from the hub"),
    "unknown metric": ("  - {metric: somebody/rouge}\n", "metric `somebody/rouge` loads a program from the hub"),
    "unsafe": ("unsafe_code: true\n", "runs code that the model wrote"),
}


@pytest.mark.parametrize("kind", CODE)
def test_task_files_that_run_code_are_refused(
    tmp_path: Path, tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, reason = CODE[kind]
    write_task(tmp_path, "evil", extra=text)
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="evil"))
    assert reason in said
    if kind == "function":
        assert said.endswith("an operator who trusts them can set GPTAILOR_ALLOW_TASK_CODE=1 on this machine")
        (tmp_path / "code.py").write_text("def process(docs):\n    return docs.select([0, 1])\n")
        monkeypatch.setenv("GPTAILOR_ALLOW_TASK_CODE", "1")
        assert opened(tmp_path, tokenizer, Benchmark(benchmark="evil"))[0].n_examples == 2


def test_code_in_an_included_file_or_a_groups_task_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path, "inner", extra="process_docs: !function code.process\n")
    (tmp_path / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    (tmp_path / "group.yaml").write_text(
        "group: group\ntask: [inner]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    for name in ("outer", "group"):
        assert "inner.yaml: it names `!function`" in refused(tmp_path, tokenizer, Benchmark(benchmark=name))


def test_code_in_a_task_that_a_group_defines_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    task = "{task: inside, dataset_path: json, metric_list: [&own {metric: acc}, {metric: rouge, hf_evaluate: true}]}"
    (tmp_path / "group.yaml").write_text(f"group: group\ntask:\n  - {task}\nmetadata: &loop {{again: [*loop, *own]}}\n")
    assert "metric `rouge` loads a program" in refused(tmp_path, tokenizer, Benchmark(benchmark="group", metric="acc"))


def test_pickled_data_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path, "pickled", CHOICE.replace("dataset_path: json", "dataset_path: pandas"))
    assert "reads pickled files" in refused(tmp_path, tokenizer, Benchmark(benchmark="pickled"))


def test_templates_are_rendered_in_a_sandbox(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path, "escape", CHOICE.replace("query\n", "\"{{{{ ''.__class__.__mro__ }}}}\"\n", 1))
    said = refused(tmp_path, tokenizer, Benchmark(benchmark="escape"))
    assert "SecurityError" in said
