"""Log-likelihoods of windows: one forward pass a pack, the output head only where something is predicted.

Two ways to the same numbers. The *tree* path runs the model's own forward on a flat row with our attention; the *rows*
path pads texts into a rectangle as lm-eval does, for models whose attention cannot be driven. A self-check on the
first model decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gptailor.evaluate.attention import PackMasks, attending_by_pack
from gptailor.evaluate.examples import Window
from gptailor.evaluate.packing import Pack
from gptailor.evaluate.scoring import NonFinite

HEAD_ELEMENTS = 2**25  # float32 logits turned into log-probabilities at a time


@dataclass(frozen=True)
class Scored:
    """What the model says of one window: log-likelihood, and whether greedy decoding would have written it.

    `rounded` is lm-eval's number: log-probabilities and their sum in the model's own precision. `precise` keeps float32
    log-probabilities and adds them in float64.
    """

    rounded: float
    precise: float
    is_greedy: bool


@torch.inference_mode()
def score_pack(model: PreTrainedModel, pack: Pack) -> list[Scored]:
    """Every window of the pack, in order. Raises NonFinite."""
    dtype = model.dtype
    with attending_by_pack(model):
        logits = model(
            input_ids=pack.tokens[None],
            position_ids=pack.positions[None],
            use_cache=False,
            logits_to_keep=pack.scored,
            gptailor_pack=PackMasks(pack, dtype),
        ).logits[0]
    if logits.shape[0] != len(pack.scored):
        raise NotImplementedError(f"{type(model).__name__} does not take logits_to_keep")
    return _summarise(logits, pack.rows, pack.targets, pack.owners, pack.n_windows)


@torch.inference_mode()
def score_rows(model: PreTrainedModel, windows: Sequence[Window], max_tokens: int) -> list[Scored]:
    """The same for windows as padded rows, as lm-eval's HFLM feeds them. Raises NonFinite."""
    rows = sorted(set(window.inputs for window in windows), key=lambda inputs: (-len(inputs), inputs))
    answers: dict[int, Scored] = {}
    while rows:
        n_rows = max(1, max_tokens // len(rows[0]))
        batch, rows = rows[:n_rows], rows[n_rows:]
        width = len(batch[0])
        padded = torch.tensor([[*inputs, *[0] * (width - len(inputs))] for inputs in batch], device=model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        place = {inputs: row for row, inputs in enumerate(batch)}
        here = [number for number, window in enumerate(windows) if window.inputs in place]
        at: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for owner, number in enumerate(here):
            window = windows[number]
            first = place[window.inputs] * width + len(window.inputs) - window.n_scored
            at += range(first, first + window.n_scored)
            targets += window.tokens[-window.n_scored :]
            owners += [owner] * window.n_scored
        places, wanted, owned = (torch.tensor(values, device=logits.device) for values in (at, targets, owners))
        answers.update(zip(here, _summarise(logits.flatten(0, 1), places, wanted, owned, len(here)), strict=True))
    return [answers[number] for number in range(len(windows))]


def _summarise(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, owners: torch.Tensor, n_windows: int
) -> list[Scored]:
    """logits [S, V]; for every predicted token its row, its id and its window -> one Scored a window."""
    used = rows.unique()  # padding and context positions of the rows path are never looked at
    step = max(1, HEAD_ELEMENTS // logits.shape[1])
    normalisers = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    best = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    for some in used.split(step):
        chunk = logits[some]
        best[some] = chunk.argmax(dim=-1)
        normalisers[some] = chunk.float().logsumexp(dim=-1)
    log_probs = logits[rows, targets].float() - normalisers[rows]
    rounded = log_probs.to(logits.dtype)
    zeros = torch.zeros(n_windows, device=logits.device)
    rounded_sum = zeros.index_add(0, owners, rounded.float()).to(logits.dtype)
    precise_sum = zeros.double().index_add(0, owners, log_probs.double())
    misses = zeros.index_add(0, owners, (best[rows] != targets).float())
    if not bool(torch.isfinite(normalisers[used]).all() & torch.isfinite(precise_sum).all()):
        raise NonFinite("the model's logits are not finite")
    columns = (rounded_sum.tolist(), precise_sum.tolist(), (misses == 0).tolist())
    return [Scored(*row) for row in zip(*columns, strict=True)]
