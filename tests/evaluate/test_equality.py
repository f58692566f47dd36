"""Scores equal lm-eval's: HFLM and lm_eval.simple_evaluate on the same documents are the law."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluate_tools import (
    CHOICE,
    GENERATION,
    PERPLEXITY,
    evaluator,
    lm_eval_says,
    opened,
    rows,
    sentence,
    write_task,
)

from gptailor.errors import UserError
from gptailor.evaluate.examples import chat_renderer
from gptailor.spec.sections import Benchmark

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model(tiny_family: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_family / "base").eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_family: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_family / "base")


def compare(folder: Path, spec: Benchmark, model: Any, tokenizer: Any, n: int = 12, **settings: Any) -> None:
    """Score n examples here and there: equal answers per document, equal score."""
    max_length = settings.get("max_length", 256)
    chat = settings.pop("chat_template", False)
    given = {"chat_template": chat, "chat_template_args": settings.get("chat_template_args")}
    (benchmark,) = opened(folder, tokenizer, spec, max_length=max_length, max_examples=n, **given)
    engine = evaluator([benchmark], tokenizer, max_length=max_length)
    items = engine.items(model, benchmark, 0, benchmark.n_examples)
    assert engine.path in ("direct", None)
    samples: dict[str, list[int]] = {}
    for task, document in sorted(benchmark.order):
        samples.setdefault(task, []).append(document)
    asked = {"num_fewshot": spec.num_fewshot, "apply_chat_template": chat} | settings
    results, records = lm_eval_says(folder, spec.benchmark, model, tokenizer, samples, **asked)
    key = f"{benchmark.metric},{benchmark.filter}"
    score = engine.score(benchmark, json.loads(json.dumps(items)))
    assert score.score == pytest.approx(results[key], rel=1e-4)
    assert score.n_samples == len(benchmark.order)
    theirs = {
        (task, record["doc_id"]): record[benchmark.metric]
        for task, told in records.items()
        for record in told
        if record["filter"] == benchmark.filter
    }
    for place, item in zip(benchmark.order, items, strict=True):
        ours, told = list(_leaves(item)), list(_leaves(theirs[place]))
        assert [v for v in ours if isinstance(v, str)] == [v for v in told if isinstance(v, str)]
        numbers = [v for v in told if not isinstance(v, str)]
        assert [v for v in ours if not isinstance(v, str)] == pytest.approx(numbers, abs=1e-3)


def _leaves(value: Any) -> Iterator[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


LIKELIHOOD = "  - {metric: likelihood, aggregation: bypass, higher_is_better: true}\n"  # every option's log-likelihood


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "likelihood", "brier_score", "exact_match"])
def test_options_of_many_tokens(tmp_path: Path, model: Any, tokenizer: Any, metric: str) -> None:
    extra = LIKELIHOOD + "  - {metric: brier_score}\n  - {metric: exact_match}\n"
    write_task(tmp_path, "many", extra=extra)
    compare(tmp_path, Benchmark(benchmark="many", metric=metric, split="test"), model, tokenizer)


def test_options_of_one_token(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    one = rows(3, 20, words=(1, 1))
    write_task(tmp_path, "one", extra=LIKELIHOOD, test=one)
    compare(tmp_path, Benchmark(benchmark="one", metric="likelihood", split="test"), model, tokenizer)


def test_options_that_tokenise_differently_after_the_context(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """No delimiter and words cut in the middle: context and option share a token, trailing spaces move over."""
    made = [
        {"query": "the cat sat on a ma", "choices": ["t and a dog", "d dog", "n ran  far"], "gold": 0},
        {"query": "one plus two is  ", "choices": ["three", " three", "thr"], "gold": 1},
        {"query": "red green bl", "choices": ["ue hills", "ack hills"], "gold": 0},
        {"query": "a dog ra\n", "choices": ["n far", "n a"], "gold": 1},
    ]
    text = CHOICE.replace("doc_to_text", 'target_delimiter: ""\ndoc_to_text')
    write_task(tmp_path, "cut", text, extra=LIKELIHOOD, test=made)
    compare(tmp_path, Benchmark(benchmark="cut", metric="likelihood", split="test"), model, tokenizer)


@pytest.mark.parametrize("max_length", [16, 24])
def test_contexts_longer_than_the_window(tmp_path: Path, model: Any, tokenizer: Any, max_length: int) -> None:
    write_task(tmp_path, "long", extra=LIKELIHOOD, test=rows(5, 20, context=(5, 60)))
    spec = Benchmark(benchmark="long", metric="likelihood", split="test")
    compare(tmp_path, spec, model, tokenizer, max_length=max_length)


def test_an_empty_context(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    made = [{"query": "", "choices": ["the cat", "a dog ran"], "gold": 0}, *rows(6, 5)]
    write_task(tmp_path, "empty", extra=LIKELIHOOD, test=made)
    compare(tmp_path, Benchmark(benchmark="empty", metric="likelihood", split="test"), model, tokenizer)


def test_mutual_information(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_task(tmp_path, "mutual", extra="  - {metric: acc_mutual_info}\n")
    spec = Benchmark(benchmark="mutual", metric="acc_mutual_info", split="test")
    compare(tmp_path, spec, model, tokenizer)


def test_settings_of_the_chat_template(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += "{%- if not enable_thinking %}<s></s>{%- endif %}"
    write_task(tmp_path, "asked", extra=LIKELIHOOD)
    spec = Benchmark(benchmark="asked", metric="likelihood", split="test")
    for setting in (True, False):
        compare(tmp_path, spec, model, thinking, chat_template=True, chat_template_args={"enable_thinking": setting})
    with pytest.raises(UserError, match=r"reads no 'enable_thinkin'; settings that it reads: enable_thinking$"):
        chat_renderer(thinking, {"enable_thinkin": False})
    with pytest.raises(UserError, match=r"settings that it reads: none$"):
        chat_renderer(tokenizer, {"messages": []})


@pytest.mark.parametrize("chat_template", [False, True])
def test_few_shot(tmp_path: Path, model: Any, tokenizer: Any, chat_template: bool) -> None:
    write_task(tmp_path, "shots", CHOICE.replace("query\n", '"Q: {{{{query}}}}\\nA:"\n', 1), extra=LIKELIHOOD)
    spec = Benchmark(benchmark="shots", metric="likelihood", split="test", num_fewshot=2)
    compare(tmp_path, spec, model, tokenizer, n=20, chat_template=chat_template)  # 20: lm-eval's of the whole split


def test_shared_few_shot_prefix_is_read_once(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    extra = LIKELIHOOD + "fewshot_split: train\nfewshot_config: {sampler: first_n}\n"
    write_task(tmp_path, "prefix", extra=extra)
    spec = Benchmark(benchmark="prefix", metric="likelihood", split="test", num_fewshot=5)
    compare(tmp_path, spec, model, tokenizer, n=20)
    (benchmark,) = opened(tmp_path, tokenizer, spec)
    engine = evaluator([benchmark], tokenizer, rungs=[20])
    engine.items(model, benchmark, 0, 20)
    (pack,) = next(iter(engine._packs.values())).packs
    contexts = sum(len(example.windows[0].inputs) for example in benchmark.examples)
    assert len(pack.tokens) < contexts / 2


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
@pytest.mark.parametrize("max_length", [24, 256])
def test_perplexity(tmp_path: Path, model: Any, tokenizer: Any, metric: str, max_length: int) -> None:
    write_task(tmp_path, "text", PERPLEXITY, validation=rows(8, 12, context=(1, 60)))
    compare(tmp_path, Benchmark(benchmark="text", metric=metric), model, tokenizer, max_length=max_length)


@pytest.mark.parametrize("metric", ["exact_match,word", "exact_match,first", "bleu,word"])
def test_generation(tmp_path: Path, model: Any, tokenizer: Any, metric: str) -> None:
    write_task(tmp_path, "write", GENERATION)
    compare(tmp_path, Benchmark(benchmark="write", metric=metric), model, tokenizer)


def test_what_only_writes_may_be_judged_by_what_is_only_read(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_task(tmp_path, "write", GENERATION)
    write_task(tmp_path, "choose")
    asked = (Benchmark(benchmark="write", metric="exact_match,first"), Benchmark(benchmark="choose", metric="acc"))
    writes, chooses = opened(tmp_path, tokenizer, *asked)
    engine = evaluator([writes], tokenizer)
    (ours,) = engine.items_of(model, [(chooses, 0, 20)])
    (theirs,) = evaluator([chooses], tokenizer).items_of(model, [(chooses, 0, 20)])
    assert ours == theirs and engine.path == "direct"


def test_generated_strings(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_task(tmp_path, "write", GENERATION)
    (benchmark,) = opened(tmp_path, tokenizer, Benchmark(benchmark="write", metric="exact_match,first"))
    engine = evaluator([benchmark], tokenizer)
    ours = engine._texts(model, benchmark, 0, 20, lambda: None)
    _, records = lm_eval_says(tmp_path, "write", model, tokenizer, {"write": list(range(20))})
    theirs = {
        record["doc_id"]: record["filtered_resps"][0] for record in records["write"] if record["filter"] == "first"
    }
    assert {document: ours[place][0] for place, (_, document) in enumerate(benchmark.order)} == theirs
    assert len(set(theirs.values())) > 5


@pytest.mark.parametrize("weight_by_size", [True, False])
def test_groups(tmp_path: Path, model: Any, tokenizer: Any, weight_by_size: bool) -> None:
    for number, size in enumerate((5, 20, 40)):
        write_task(tmp_path, f"part{number}", test=rows(number, size))
    (tmp_path / "whole.yaml").write_text(
        "group: whole\ntask: [part0, {group: rest, task: [part1, part2]}]\n"
        f"aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weight_by_size}}}]\n"
    )
    spec = Benchmark(benchmark="whole", metric="acc", split="test")
    compare(tmp_path, spec, model, tokenizer, n=30)
    compare(tmp_path, spec, model, tokenizer, n=65)


def test_groups_whose_members_have_filters_of_their_own(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """Each member is read through its only filter, with shots: lm-eval's number of each, and their mean."""
    shots = "num_fewshot: 2\nfewshot_split: validation\nfewshot_config: {sampler: first_n}\n"
    first, word = GENERATION.split("filter_list:\n")[1].splitlines()[:2]
    for number, kept in enumerate((first, word)):
        text = GENERATION.replace("\n".join((first, word)), kept).replace("  - {{metric: bleu}}\n", "")
        write_task(tmp_path, f"part{number}", text, shots, validation=rows(number, 12 + number))
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [part0, part1]\n"
        "aggregate_metric_list: [{metric: exact_match, aggregation: mean, weight_by_size: false, filter_list: first}]\n"
    )
    (benchmark,) = opened(tmp_path, tokenizer, Benchmark(benchmark="both", metric="exact_match", split="validation"))
    assert benchmark.filters == ("first", "word")
    engine = evaluator([benchmark], tokenizer)
    items = engine.items(model, benchmark, 0, benchmark.n_examples)
    theirs = {}
    for number, kept in enumerate(("first", "word")):
        samples = {f"part{number}": list(range(12 + number))}
        results, records = lm_eval_says(tmp_path, f"part{number}", model, tokenizer, samples, num_fewshot=2)
        theirs[f"part{number}"] = results[f"exact_match,{kept}"]
        told = {record["doc_id"]: record["exact_match"] for record in records[f"part{number}"]}
        ours = {d: item for (task, d), item in zip(benchmark.order, items, strict=True) if task == f"part{number}"}
        assert ours == told
    assert engine.score(benchmark, items).score == pytest.approx(sum(theirs.values()) / 2)


def test_standard_errors_of_means_are_lm_evals(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_task(tmp_path, "many")
    (benchmark,) = opened(tmp_path, tokenizer, Benchmark(benchmark="many", metric="acc", split="test"))
    engine = evaluator([benchmark], tokenizer)
    score = engine.score(benchmark, engine.items(model, benchmark, 0, 20))
    results, _ = lm_eval_says(tmp_path, "many", model, tokenizer, {"many": list(range(20))})
    assert score.stderr == pytest.approx(results["acc_stderr,none"])


def test_log_likelihoods_within_a_thousandth(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    import random

    rng = random.Random(1)
    made = [
        {"query": sentence(rng, 1, 80), "choices": [sentence(rng, 1, 9) for _ in range(4)], "gold": 0}
        for _ in range(30)
    ]
    write_task(tmp_path, "wide", extra=LIKELIHOOD, test=made)
    (benchmark,) = opened(tmp_path, tokenizer, Benchmark(benchmark="wide", metric="likelihood", split="test"))
    engine = evaluator([benchmark], tokenizer)
    items = engine.items(model, benchmark, 0, 30)
    _, records = lm_eval_says(tmp_path, "wide", model, tokenizer, {"wide": list(range(30))})
    theirs = {record["doc_id"]: [float(resp[0]) for resp in record["filtered_resps"]] for record in records["wide"]}
    for (_, document), (_, ours) in zip(benchmark.order, items, strict=True):
        assert ours == pytest.approx(theirs[document], abs=1e-3)
