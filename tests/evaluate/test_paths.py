"""Every way to the same numbers: packed trees, written out or by the model's own code, and plain padded rows."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluate_tools import PERPLEXITY, evaluator, opened, rows, write_task

from gptailor.spec.sections import Benchmark

torch = pytest.importorskip("torch")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt_neox": {"rotary_pct": 1.0},
}
DIRECT = {"llama", "qwen2", "qwen3", "mistral"}
"""Architectures whose arithmetic is written out."""


def build(model_type: str, tiny_config: Any, dtype: str = "float32", **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = tiny_config(model_type, **(ARCHITECTURES.get(model_type, {}) | changes))
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from helpers.families import train_tokenizer

    return train_tokenizer()


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Contexts longer than the sliding windows above, options that branch, few-shot examples shared between rows."""
    folder = tmp_path_factory.mktemp("benchmarks")
    extra = "fewshot_split: train\nfewshot_config: {sampler: first_n}\n"
    write_task(folder, "many", extra=extra, test=rows(4, 12, context=(3, 30), options=(2, 3, 4)))
    spec = Benchmark(benchmark="many", metric="acc", split="test", num_fewshot=3)
    return opened(folder, tokenizer, spec)[0]


def all_windows(benchmark: Any) -> list[Any]:
    return [window for example in benchmark.examples for window in example.windows]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.usefixtures("tokenizer")
def test_trees_say_what_rows_say(model_type: str, benchmark: Any) -> None:
    from helpers.families import tiny_config

    from gptailor.evaluate.direct import is_plain
    from gptailor.evaluate.forward import score_direct, score_rows, score_tree
    from gptailor.evaluate.packing import build_pack

    model = build(model_type, tiny_config)
    assert is_plain(model) == (model_type in DIRECT)
    before = model.config._attn_implementation
    pack = build_pack(benchmark.examples, range(12))
    plain = score_rows(model, all_windows(benchmark), 4096)
    for way in (score_tree, score_direct) if model_type in DIRECT else (score_tree,):
        ours = way(model, pack)
        assert [a.precise for a in ours] == pytest.approx([a.precise for a in plain], abs=1e-3)
        assert [a.is_greedy for a in ours] == [a.is_greedy for a in plain]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen3"])
@pytest.mark.usefixtures("tokenizer")
def test_buckets_say_what_blocks_say(model_type: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerators attend by bucket; the same code runs on a CPU."""
    from helpers.families import tiny_config

    from gptailor.evaluate import attention, direct, forward
    from gptailor.evaluate.packing import build_pack

    model = build(model_type, tiny_config)
    pack = build_pack(benchmark.examples, range(12))
    way = forward.score_direct if model_type in DIRECT else forward.score_tree
    blocks = way(model, pack)
    for module in (direct, forward):
        monkeypatch.setattr(module, "PackMasks", lambda pack, dtype, _: attention.PackMasks(pack, dtype, True))
    buckets = way(model, pack)
    assert [a.precise for a in buckets] == pytest.approx([a.precise for a in blocks], abs=1e-3)


def test_an_accelerator_is_given_a_pack_without_waiting_for_it(
    benchmark: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device nothing has a value, so whatever looks at one fails; packs read one behind say the same."""
    from helpers.families import tiny_config

    from gptailor.evaluate import evaluator as module
    from gptailor.evaluate.forward import begin_direct, score_direct
    from gptailor.evaluate.packing import build_pack

    model = build("llama", tiny_config)
    packs = [build_pack(benchmark.examples, range(n, n + 4)) for n in (0, 4, 8)]
    engine, jobs, looks = evaluator([benchmark], tokenizer), [(0, pack) for pack in packs], []
    for _ in range(2):
        behind = engine._one_behind(model, [(benchmark, 0, 12)], jobs, lambda: looks.append(1))
        assert behind == [score_direct(model, pack) for pack in packs]
    assert len(looks) == 6 and len(engine._moved) == 3 and engine._moved_bytes == sum(pack.n_bytes for pack in packs)
    assert engine._one_behind(model, [(benchmark, 0, 12)], [], lambda: None) == []
    monkeypatch.setattr(module, "KEPT_ON_DEVICE", 0)
    poor = evaluator([benchmark], tokenizer)
    assert poor._one_behind(model, [(benchmark, 0, 12)], jobs, lambda: None) == behind and not poor._moved

    nowhere = torch.device("meta")
    end = begin_direct(model.to(nowhere), packs[0].to(nowhere))
    with pytest.raises(RuntimeError, match="meta"):
        end()


def test_packs_of_examples_that_are_gone_are_not_taken_for_others(benchmark: Any, tokenizer: Any) -> None:
    """CPython gives a new object the place of one that was freed, and thus its identity."""
    from helpers.families import tiny_config

    model, engine = build("llama", tiny_config), evaluator([benchmark], tokenizer, rungs=[4])
    expected = engine.items(model, replace(benchmark, metric="choice_prob"), 0, 12)
    for first in range(9):
        part = replace(benchmark, metric="choice_prob", examples=benchmark.examples[first : first + 4])
        assert engine.items(model, part, 0, 4) == pytest.approx(expected[first : first + 4], abs=1e-4)
        del part


def test_every_architecture_finds_its_way(benchmark: Any, tokenizer: Any) -> None:
    from helpers.families import tiny_config

    for model_type in ARCHITECTURES:
        engine = evaluator([benchmark], tokenizer)
        engine.items(build(model_type, tiny_config), benchmark, 0, 5)
        assert engine.path == ("direct" if model_type in DIRECT else "tree"), model_type


def test_texts_on_both_sides_of_longropes_switch_are_not_mixed(benchmark: Any, tokenizer: Any) -> None:
    """Phi-3's long texts have other positions from their first token on; in a batch the longest one decides for all."""
    from helpers.families import tiny_config

    from gptailor.evaluate.forward import score_rows

    lengths = sorted({len(window.inputs) for window in all_windows(benchmark)})
    switch = lengths[len(lengths) // 2]
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 9.0, 25.0, 64.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch, **factors}
    model = build("phi3", tiny_config, rope_parameters=rope, original_max_position_embeddings=switch)
    alone = [score_rows(model, [window], 1)[0].precise for window in all_windows(benchmark)]
    together = [scored.precise for scored in score_rows(model, all_windows(benchmark), 4096)]
    assert together == pytest.approx(alone, abs=1e-3)
    engine = evaluator([benchmark], tokenizer)
    likelihood = replace(benchmark, metric="answer_perplexity")
    items = engine.items(model, likelihood, 0, 12)
    assert engine.path == "rows"
    gold = [alone[n] for n in _gold_windows(benchmark)]
    assert [item[0] for item in items] == pytest.approx(gold, abs=1e-3)


def _gold_windows(benchmark: Any) -> list[int]:
    """Which of all windows are the right answers'."""
    from gptailor.evaluate.metrics import gold_options

    first, found = 0, []
    for example in benchmark.examples:
        found.append(first + gold_options(benchmark.tasks[example.task], example)[0])
        first += len(example.windows)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_do_not_depend_on_the_number_of_processors(benchmark: Any, tokenizer: Any, dtype: str) -> None:
    from helpers.families import tiny_config

    model = build("llama", tiny_config, dtype)
    likelihood = replace(benchmark, metric="choice_prob")
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            engine = evaluator([likelihood], tokenizer, batch_tokens=150)
            found.append(engine.items(model, likelihood, 0, 12))
            assert engine.path == "direct" and torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_models_that_only_look_plain_are_not_scored_directly(benchmark: Any, tokenizer: Any) -> None:
    """A multiplier that the written-out arithmetic does not know (as Granite has them) is found by comparing."""
    from helpers.families import tiny_config

    model = build("llama", tiny_config)
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: output * 3.0)
    engine = evaluator([benchmark], tokenizer)
    engine.items(model, benchmark, 0, 5)
    assert engine.path == "tree"


def test_a_model_that_cannot_be_driven_is_scored_as_rows(
    benchmark: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=2, eos_token_id=1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = evaluator([benchmark], tokenizer)
    with caplog.at_level(logging.WARNING):
        items = engine.items(model, benchmark, 0, 5)
    assert engine.path == "rows" and len(items) == 5
    assert "MambaForCausalLM is scored as padded rows, the slower way: its attention does not go" in caplog.text


def test_a_wrong_tree_is_found_out(
    benchmark: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Masks that let an option see its neighbours change the numbers; the self-check must notice."""
    from helpers.families import tiny_config

    from gptailor.evaluate import attention

    monkeypatch.setattr(attention.PackMasks, "of_block", lambda _self, _number, _keys, _window: None)
    engine = evaluator([benchmark], tokenizer)
    with caplog.at_level(logging.WARNING):
        engine.items(build("llama", tiny_config), benchmark, 0, 5)
    assert engine.path == "rows"
    assert "log-probabilities differ by" in caplog.text


def test_a_pack_holds_each_distinct_token_once(benchmark: Any) -> None:
    from gptailor.evaluate.packing import pack_examples

    (pack,) = pack_examples(benchmark.examples, 0, 12, max_tokens=4096, max_scored=4096)
    prefixes = {window.inputs[:n] for window in all_windows(benchmark) for n in range(1, len(window.inputs) + 1)}
    assert len(pack.tokens) == len(prefixes)


def test_packs_hold_every_example_once_and_keep_their_limits(benchmark: Any) -> None:
    from gptailor.evaluate.packing import pack_examples

    packs = pack_examples(benchmark.examples, 2, 11, max_tokens=200, max_scored=40)
    assert sorted(member for pack in packs for member in pack.members) == list(range(2, 11))
    assert len(packs) > 1
    for pack in packs:
        assert len(pack.members) == 1 or (len(pack.tokens) <= 200 and len(pack.targets) <= 40)
    again = pack_examples(benchmark.examples, 2, 11, max_tokens=200, max_scored=40)
    assert [pack.members for pack in again] == [pack.members for pack in packs]


def test_a_pack_moves_whole(benchmark: Any) -> None:
    """Every tensor of a pack goes to the device (meta stands for any that is not the CPU)."""
    from gptailor.evaluate.packing import build_pack

    pack = build_pack(benchmark.examples, range(6))
    moved = pack.to(torch.device("meta"))
    tensors = [getattr(moved, name) for name in ("tokens", "positions", "ends", "scored", "rows", "targets", "owners")]
    tensors += [moved.places, *[t for bucket in moved.buckets for t in (bucket.queries, bucket.keys)]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert pack.to(torch.device("cpu")) is pack


def test_rolling_windows_are_packed_without_branches(tmp_path: Path, tokenizer: Any) -> None:
    from gptailor.evaluate.packing import build_pack

    write_task(tmp_path, "text", PERPLEXITY)
    (text,) = opened(tmp_path, tokenizer, Benchmark(benchmark="text", metric="word_perplexity"))
    pack = build_pack(text.examples, range(5))
    assert all(block.is_path and block.prefix is None for block in pack.blocks)


def test_an_examples_score_does_not_depend_on_what_else_is_asked(benchmark: Any, tokenizer: Any) -> None:
    """In bfloat16 rounding depends on the company, so the company is fixed by rungs and order alone."""
    from helpers.families import tiny_config

    model = build("llama", tiny_config, "bfloat16")
    likelihood = replace(benchmark, metric="choice_prob")
    engine = evaluator([likelihood], tokenizer)
    whole = engine.items(model, likelihood, 0, 12)
    parts = [engine.items(model, likelihood, first, last) for first, last in ((0, 5), (5, 10), (10, 12))]
    assert whole == [item for part in parts for item in part]
    assert evaluator([likelihood], tokenizer).items(model, likelihood, 3, 7) == whole[3:7]


@pytest.mark.usefixtures("benchmark")
def test_greedy_ties_go_to_the_first_token() -> None:
    from gptailor.evaluate.forward import _summarise

    logits = torch.zeros(2, 5)
    logits[0, [1, 3]] = 2.0
    logits[1, 4] = 1.0
    index = torch.tensor
    answers = _summarise(logits, index([0, 0, 1]), index([3, 1, 4]), index([0, 1, 1]), 2, True)
    assert [answer.is_greedy for answer in answers] == [False, True]


@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_log_probabilities_of_any_size(shift: float) -> None:
    from gptailor.evaluate.forward import _summarise

    logits = torch.randn(70, 300) * 5 + shift
    before = logits.clone()
    rows, targets = torch.arange(70), torch.randint(0, 300, (70,))
    said = [answer.precise for answer in _summarise(logits, rows, targets, rows, 70, True)]
    assert said == pytest.approx(logits.log_softmax(dim=-1)[rows, targets].tolist(), abs=1e-4)
    assert torch.equal(logits, before), "the logits must not be changed"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    from gptailor.evaluate.forward import _summarise
    from gptailor.evaluate.scoring import NonFinite

    logits = torch.zeros(4, 10)
    logits[2, 3] = broken
    rows = torch.arange(4)
    with pytest.raises(NonFinite, match="not finite"):
        _summarise(logits, rows, rows, rows, 4, False)


def test_a_vocabulary_in_slices_says_what_the_whole_says() -> None:
    """Ties across slices go to the first token, as argmax has it."""
    from gptailor.evaluate.forward import _read

    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (200, 64)).float()
    rows, targets = torch.arange(200), logits.argmax(dim=-1)
    targets[::3] = torch.randint(0, 64, (67,))
    logits[0, [5, 30]], logits[1, [5, 30]] = 9.0, 9.0  # the best in two slices
    targets[0], targets[1] = 30, 5
    slices = [(first, logits[:, first : first + 24]) for first in (0, 24, 48)]
    for waits in (True, False):
        read = _read(slices, 200, rows, targets, True, waits).checked()
        assert read is not None, "sums were not safe"
        assert torch.allclose(read[0], logits.log_softmax(dim=-1)[rows, targets], atol=1e-5)
        assert torch.equal(read[1], logits.argmax(dim=-1) == targets), f"waits: {waits}"
