"""The examples that tell most come first, wherever examples are read, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import gptailor, only_run
from helpers.evaluate_tools import opened, rows, write_task

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import reordered
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import OPTIONS, Items, items_key, reading_key
from gptailor.search.example_order import FLATTEST, ORDER, known_orders, put_in_order, slopes, telling_orders
from gptailor.search.suggest import cost
from gptailor.spec.sections import Benchmark
from gptailor.store import queries
from gptailor.trial import Score

DENSE = StitchPlan.dense(6)
PLANS = [DENSE, *(StitchPlan.without({k, k + 1}, 6) for k in range(4))]
N = 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from helpers.families import train_tokenizer

    return train_tokenizer()


@pytest.fixture
def benchmarks(tokenizer: Any, tmp_path: Path) -> list[Any]:
    """Two metrics of one task, and one whose items are no numbers."""
    write_task(tmp_path, "many", test=rows(1, N))
    metrics = ("acc", "choice_prob", "answer_perplexity")
    return opened(tmp_path, tokenizer, *(Benchmark(benchmark="many", metric=m, split="test") for m in metrics))


@pytest.fixture
def known(benchmarks: list[Any]) -> Items:
    """Plan k is right on examples below 4 k, and sure of it on every third."""
    acc, prob, perplexity = benchmarks
    items: Items = {}
    for number, plan in enumerate(PLANS):
        items[items_key(plan, acc)] = [float(place < 4 * number) for place in range(N)]
        items[items_key(plan, prob)] = [0.5 + 0.1 * number * (place % 3 == 0) for place in range(N)]
        items[items_key(plan, perplexity)] = [[-1.0 * place, 4] for place in range(N)]
    items[reading_key(DENSE, acc, OPTIONS)] = [[float(place)] for place in range(N)]
    return items


def test_what_plans_differ_on_comes_first(benchmarks: list[Any], known: Items) -> None:
    orders = telling_orders(PLANS, benchmarks, known)
    (places,) = orders.values()  # one for all metrics of the same examples
    assert sorted(places) == list(range(N))
    acc, prob, perplexity = benchmarks
    summed = sum(
        values.var(axis=0) / values.var(axis=0).mean()
        for values in (np.array([known[items_key(plan, b)] for plan in PLANS]) for b in (acc, prob))
    )
    assert all(np.diff(np.asarray(summed)[places]) <= 1e-12)
    assert telling_orders(PLANS, [perplexity], known) == {}
    assert telling_orders(PLANS[:1], benchmarks, known) == {}, "one plan differs from none"
    broken = {key: items for key, items in known.items() if key.plan_hash != PLANS[2].hash}
    assert telling_orders(PLANS, benchmarks, broken).keys() == orders.keys(), "a plan without answers is spared"


def test_items_and_examples_move_together(benchmarks: list[Any], known: Items) -> None:
    orders = telling_orders(PLANS, benchmarks, known)
    before = {key: list(items) for key, items in known.items()}
    stored = {key: items for key, _, items in put_in_order(known, orders, DENSE, benchmarks)}
    moved = reordered(benchmarks, orders)
    assert len({id(benchmark.examples) for benchmark in moved}) == 1, "metrics of the same examples share them still"
    (places,) = orders.values()
    assert [moved[0].order[k] for k in range(N)] == [benchmarks[0].order[place] for place in places]
    for key, items in before.items():
        assert stored[key] == [items[place] for place in places]
    assert known == stored and known_orders(stored, DENSE, benchmarks) == orders
    assert [key.metric for key in stored if key not in before] == [ORDER]
    for wrong in ([0, 0, 1], list(range(N + 1)), [1, 2]):
        with pytest.raises(UserError, match="start a new run"):
            reordered(benchmarks, {benchmarks[0].spec.reading: wrong})
    grown = reordered(benchmarks, {benchmarks[0].spec.reading: [1, 0]})[0]
    assert grown.order == (benchmarks[0].order[1], benchmarks[0].order[0], *benchmarks[0].order[2:])


def test_what_a_difference_on_few_examples_amounts_to(benchmarks: list[Any], known: Items) -> None:
    put_in_order(known, telling_orders(PLANS, benchmarks[:1], known), DENSE, benchmarks[:1])
    (name,) = {benchmark.name for benchmark in benchmarks[:1]}
    found = slopes(PLANS, benchmarks, (5, 10, N), known)
    few, some, all_of_them = (found[rung][name] for rung in (5, 10, N))
    assert FLATTEST <= few <= some < all_of_them == 1.0
    assert found[5]["many/answer_perplexity"] == 1.0
    assert slopes(PLANS[:2], benchmarks, (5, N), known)[5][name] == 1.0, "two plans say too little"
    score = Score("many", "acc", 0.9, None, 5, True)
    assert cost(score, 0.5, 0.7) == pytest.approx(1 - 0.7 / 0.5)
    assert cost(score, 0.5, 0.7, 0.5) == pytest.approx(1 - 0.6 / 0.5)


def test_a_search_reads_them_first_and_says_so_in_its_store(run_file: Path, tmp_path: Path) -> None:
    done = gptailor("search", run_file, "--runs", tmp_path, "--set", "trials=9")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(tmp_path)
    examples = queries.load_examples(folder)
    orders = {key.benchmark: items for key, items in examples.items() if key.metric == ORDER}
    assert {name: sorted(places) for name, places in orders.items()} == {
        "first_words": list(range(54)),
        "other_words": list(range(40)),
    }
    spreads = []
    for name, metric, n in (("first_words", "acc", 54), ("other_words", "acc_norm", 40)):
        answers = [
            items
            for key, items in examples.items()
            if (key.benchmark, key.metric) == (name, metric) and len(items) == n
        ]
        assert len(answers) >= 4
        spreads.append(np.array(answers[:5]).var(axis=0))
    assert any(spread.any() for spread in spreads), "plans that do not differ at all cannot tell"
    assert all(spread[:18].mean() >= 2 * spread[18:].mean() for spread in spreads)
    again = gptailor("search", run_file, "--runs", tmp_path / "other", "--set", "trials=9", "--set", "budget.min=54")
    assert again.returncode == 0, again.stdout + again.stderr
    flat = queries.load_examples(only_run(tmp_path / "other"))
    assert not [key for key in flat if key.metric == ORDER], "one rung reads all there is"
