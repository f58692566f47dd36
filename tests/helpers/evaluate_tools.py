"""Small benchmarks and lm-eval's own evaluation of them, shared by the tests of gptailor.evaluate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptailor.evaluate.benchmarks import OpenBenchmark, open_benchmarks
from gptailor.evaluate.evaluator import Evaluator
from gptailor.spec.sections import Benchmark
from helpers.families import WORDS

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}
output_type: multiple_choice
training_split: train
validation_split: validation
test_split: test
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
PERPLEXITY = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/validation.jsonl}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{query}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/validation.jsonl}}}}
output_type: generate_until
validation_split: validation
doc_to_text: query
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: [" cat", "\\n\\n"], max_gen_toks: 12}}
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - {{name: word, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: bleu}}
"""


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def rows(
    seed: int,
    n: int,
    *,
    words: tuple[int, int] = (1, 4),
    context: tuple[int, int] = (3, 20),
    options: tuple[int, ...] = (3,),
) -> list[dict[Any, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        choices = [sentence(rng, *words) for _ in range(rng.choice(options))]
        made.append({"query": sentence(rng, *context), "choices": choices, "gold": rng.randrange(len(choices))})
    return made


def write_task(folder: Path, name: str, text: str = CHOICE, extra: str = "", **splits: list[dict[Any, Any]]) -> None:
    """A task file in `folder` with its rows beside it; splits not given get 20 rows of many-token options."""
    place = folder / name
    place.mkdir(parents=True)
    for number, split in enumerate(("train", "validation", "test")):
        made = splits.get(split, rows(number, 20))
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(text.format(name=name, folder=place) + extra, encoding="utf-8")


def opened(folder: Path, tokenizer: Any, *specs: Benchmark, **settings: Any) -> list[OpenBenchmark]:
    settings = {"max_length": 256, "max_examples": None, "seed": 0, "include_path": [str(folder)]} | settings
    return open_benchmarks(specs, tokenizer, **settings)


def evaluator(benchmarks: Sequence[OpenBenchmark], tokenizer: Any, **settings: Any) -> Evaluator:
    chosen: dict[str, Any] = {"rungs": [5, 10], "device": "cpu", "max_length": 256}
    return Evaluator(benchmarks, tokenizer, **(chosen | settings))


def lm_eval_says(
    folder: Path, name: str, model: Any, tokenizer: Any, samples: dict[str, list[int]], **settings: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """lm-eval's results and per-document records for the given documents, by its own HFLM."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    max_length = settings.pop("max_length", 256)
    shots = settings.pop("num_fewshot", None)
    asked = settings.pop("chat_template_args", None)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=max_length, chat_template_args=asked)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([name])
    for task in loaded["tasks"].values():  # as simple_evaluate does
        task.set_config("num_fewshot", shots or task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
    multiturn = bool(settings.get("apply_chat_template"))
    said = evaluate(lm, loaded, samples=samples, bootstrap_iters=10, fewshot_as_multiturn=multiturn, **settings)
    return said["results"][name], said["samples"]
