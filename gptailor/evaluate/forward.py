"""Log-likelihoods of windows: one forward pass a pack, the output head only where something is predicted.

Three ways to the same numbers. The *direct* path writes out the arithmetic of decoders like Llama's (see direct.py);
the *tree* path runs the model's own forward on a flat row with our attention; the *rows* path pads texts into a
rectangle as lm-eval does, for models whose attention cannot be driven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gptailor.evaluate.attention import PackMasks, attending_by_pack
from gptailor.evaluate.direct import logits_at_scored
from gptailor.evaluate.examples import Window
from gptailor.evaluate.packing import Pack
from gptailor.evaluate.scoring import NonFinite

CHUNK_ELEMENTS = 2**19  # logits normalised at a time, in float32: they stay in a CPU's cache
CHUNK_ELEMENTS_GPU = 2**27
SAFE_SUMS = (1e-30, 1e37)  # of exponentials without a shift; beyond, the row is done again with one


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
def score_direct(model: PreTrainedModel, pack: Pack) -> list[Scored]:
    """Every window of the pack, in order, for models that `direct.is_plain` knows. Raises NonFinite."""
    log_probs = torch.empty(len(pack.rows), device=pack.rows.device)
    is_best = torch.empty(len(pack.rows), dtype=torch.bool, device=pack.rows.device)
    for start, logits in logits_at_scored(model, pack):
        here = ((pack.rows >= start) & (pack.rows < start + len(logits))).nonzero()[:, 0]
        read = _read(logits, pack.rows[here] - start, pack.targets[here], pack.needs_greedy)
        log_probs[here], is_best[here] = read
    return _windows(log_probs, is_best, pack.owners, pack.n_windows, model.dtype)


@torch.inference_mode()
def score_tree(model: PreTrainedModel, pack: Pack) -> list[Scored]:
    """The same by the model's own forward, for any model whose attention can be driven. Raises NonFinite."""
    by_buckets = pack.tokens.device.type != "cpu"
    with attending_by_pack(model):
        logits = model(
            input_ids=pack.tokens[None],
            position_ids=pack.positions[None],
            use_cache=False,
            logits_to_keep=pack.scored,
            gptailor_pack=PackMasks(pack, model.dtype, by_buckets),
        ).logits[0]
    if logits.shape[0] != len(pack.scored):
        raise NotImplementedError(f"{type(model).__name__} does not take logits_to_keep")
    return _summarise(logits, pack.rows, pack.targets, pack.owners, pack.n_windows, pack.needs_greedy)


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
        used, inverse = torch.tensor(at, device=logits.device).unique(return_inverse=True)
        wanted, owned = (torch.tensor(values, device=logits.device) for values in (targets, owners))
        scored = _summarise(logits.flatten(0, 1)[used], inverse, wanted, owned, len(here), True)
        answers.update(zip(here, scored, strict=True))
    return [answers[number] for number in range(len(windows))]


def _summarise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    owners: torch.Tensor,
    n_windows: int,
    needs_greedy: bool,
) -> list[Scored]:
    """logits [S, V]; for every predicted token its row, its id and its window -> one Scored a window."""
    log_probs, is_best = _read(logits, rows, targets, needs_greedy)
    return _windows(log_probs, is_best, owners, n_windows, logits.dtype)


def _read(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, needs_greedy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each predicted token, by its row of logits [S, V] and its id: its log-probability [P], float32, and whether
    it is the first of the most likely ones [P], bool."""
    normalisers = _normalisers(logits)
    chosen = logits[rows, targets]
    log_probs = chosen.float() - normalisers[rows]
    if not bool(torch.isfinite(normalisers).all()) or not bool(torch.isfinite(log_probs).all()):
        raise NonFinite("the model's logits are not finite")
    is_best = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
    if needs_greedy:
        is_best = chosen == logits.amax(dim=-1)[rows]
        check = is_best.nonzero()[:, 0]  # argmax is slow and ties are rare: only where it can still matter
        is_best[check] = logits[rows[check]].argmax(dim=-1) == targets[check]
    return log_probs, is_best


def _windows(
    log_probs: torch.Tensor, is_best: torch.Tensor, owners: torch.Tensor, n_windows: int, dtype: torch.dtype
) -> list[Scored]:
    """Predicted tokens [P] joined by the window that owns them."""
    log_probs, is_best, owners = log_probs.cpu(), is_best.cpu(), owners.cpu()
    rounded = torch.zeros(n_windows).index_add(0, owners, log_probs.to(dtype).float()).to(dtype)
    precise = torch.zeros(n_windows, dtype=torch.float64).index_add(0, owners, log_probs.double())
    greedy = torch.zeros(n_windows).index_add(0, owners, (~is_best).float()) == 0
    columns = (rounded.tolist(), precise.tolist(), greedy.tolist())
    return [Scored(*row) for row in zip(*columns, strict=True)]


def _normalisers(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) of [S, V] in float32, [S]. Not finite where a logit is NaN or plus infinity."""
    limit = CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    chunks = logits.split(max(1, limit // logits.shape[1]))
    sums = [chunk.to(torch.float32, copy=True).exp_().sum(dim=-1) for chunk in chunks]
    total = torch.cat(sums)
    beyond = ((total < SAFE_SUMS[0]) | ~(total < SAFE_SUMS[1])).nonzero()[:, 0]
    normalisers = total.log_()
    if len(beyond):
        normalisers[beyond] = torch.cat([logits[row].float().logsumexp(dim=-1)[None] for row in beyond])
    return normalisers
