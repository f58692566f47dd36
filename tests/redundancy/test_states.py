"""What one pass says of a model's layers, against the formulas done the long way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.planted import IDENTITIES, own_words, planted_family
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptailor.baselines.block_influence import block_influence
from gptailor.errors import UserError
from gptailor.redundancy import states
from gptailor.redundancy.states import States, _cka, n_bytes, n_sampled, states_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(planted_family(tmp_path_factory.mktemp("planted")) / "base").eval()


@pytest.fixture(scope="module")
def batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Two batches of texts of different lengths, padded on the right."""
    found = own_words(model)
    found[0]["attention_mask"][:3, 8:] = 0
    return found


@pytest.fixture(scope="module")
def seen(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> States:
    return states_of(model, batches, "base")


def residual_streams(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> list[list[torch.Tensor]]:
    """By batch, the L + 1 states: transformers' own, but for the last, which it gives past the final norm."""
    found = []
    for batch in batches:
        last: list[torch.Tensor] = []
        decoder: Any = model.get_decoder()
        hook = decoder.layers[-1].register_forward_hook(lambda _m, _a, out, to=last: to.append(out))
        with torch.inference_mode():
            out = decoder(**batch, output_hidden_states=True)
        hook.remove()
        found.append([*out.hidden_states[:-1], last[0] if torch.is_tensor(last[0]) else last[0][0]])
    return found


def test_states_are_compared_as_the_formulas_say(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], seen: States
) -> None:
    streams = residual_streams(model, batches)
    masks = [batch["attention_mask"].bool() for batch in batches]
    inner = [mask & (torch.arange(mask.shape[1]) > 0) for mask in masks]  # not the first token of a text
    rows = [torch.cat([s[i][m] for s, m in zip(streams, inner, strict=True)]) for i in range(7)]
    for i in range(7):
        for j in range(7):
            assert seen.cosine[i][j] == pytest.approx(float(torch.cosine_similarity(rows[i], rows[j]).mean()), abs=1e-5)
    ends = [
        torch.cat([s[i][range(len(m)), m.sum(1) - 1] for s, m in zip(streams, masks, strict=True)]) for i in range(7)
    ]
    angle = torch.cosine_similarity(ends[1], ends[4]).clamp(-1, 1).arccos().mean() / torch.pi
    assert seen.angular[1][4] == pytest.approx(float(angle), abs=1e-4)
    assert seen.influence == block_influence(model, batches)


def test_layers_that_do_nothing_leave_their_input(seen: States) -> None:
    for layer in IDENTITIES["base"]:
        assert seen.influence[layer] == pytest.approx(0, abs=1e-6)
        assert seen.cosine[layer][layer + 1] == pytest.approx(1, abs=1e-6)
        assert seen.cka[layer][layer + 1] == pytest.approx(1, abs=1e-6)
    assert min(seen.influence[0], seen.influence[1], seen.influence[5]) > 0.01


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator as Song et al. (2012) write it, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    parts = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(parts / (n * (n - 3)))


def test_cka_is_unbiased_and_sees_through_turns_and_scales() -> None:
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 30, 100, generator=draw)  # fewer tokens than dimensions
    turn = torch.linalg.qr(torch.randn(100, 100, generator=draw))[0]
    found = _cka(torch.stack([x, 3 * x @ turn, other]))
    k, m = ((one @ one.T).double().numpy() for one in (x, other))
    assert float(found[0, 2]) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-5)
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-5) and abs(float(found[0, 2])) < 0.2
    assert found.equal(found.T)


def test_tokens_are_bounded_and_too_few_are_refused(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SAMPLED", 10)
    assert n_sampled(batches) == 10 and len(states_of(model, batches, "base").cka) == 7
    with pytest.raises(UserError, match="texts have 2 tokens to compare, and 4 are needed"):
        states_of(model, [{"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.ones(2, 2).long()}], "base")


def test_what_is_held_is_as_said(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def weigh(sample: torch.Tensor) -> torch.Tensor:
        states_bytes, gram_bytes = 4 * sample.numel(), 4 * len(sample) * sample.shape[1] ** 2
        held.append(2 * states_bytes + gram_bytes)  # as they were collected, and in one
        return _cka(sample)

    monkeypatch.setattr(states, "_cka", weigh)
    states_of(model, batches, "base")
    assert held == [n_bytes(6, 32, n_sampled(batches))]
    assert n_bytes(32, 4096, 10**6) == pytest.approx(1.2e9, rel=0.05)  # a 7B's, as docs/redundancy.md says


def test_states_that_are_no_numbers_are_told(tmp_path: Path, batches: list[dict[str, torch.Tensor]]) -> None:
    broken = AutoModelForCausalLM.from_pretrained(planted_family(tmp_path) / "math").eval()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="math: Block Influence: layer 1 gives hidden states that are not finite"):
        states_of(broken, batches, "math")
