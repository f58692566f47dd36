"""Log-likelihoods of windows: one forward pass a pack, the output head only where something is predicted.

Three ways to the same numbers. The *direct* path writes out the arithmetic of decoders like Llama's (see direct.py);
the *tree* path runs the model's own forward on a flat row with our attention; the *rows* path pads texts into a
rectangle as lm-eval does, for models whose attention cannot be driven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gptailor.evaluate.attention import NotDriven, PackMasks, attending_by_pack
from gptailor.evaluate.direct import logits_by_slices, scored_states
from gptailor.evaluate.examples import Window
from gptailor.evaluate.packing import Pack
from gptailor.evaluate.scoring import NonFinite

CHUNK_ELEMENTS = 2**19  # logits normalised at a time, in float32: they stay in a CPU's cache
CHUNK_ELEMENTS_GPU = 2**27
SAFE_SUMS = (1e-30, 1e37)  # of exponentials without a shift; beyond, the pack is done again with one


@dataclass(frozen=True)
class Scored:
    """What the model says of one window: log-likelihood, and whether greedy decoding would have written it.

    `rounded` is lm-eval's number: log-probabilities and their sum in the model's own precision. `precise` keeps float32
    log-probabilities and adds them in float64.
    """

    rounded: float
    precise: float
    is_greedy: bool


def position_switch(model: PreTrainedModel) -> int | None:
    """Tokens beyond which a text's positions are encoded otherwise, all of them (longrope); None for most models."""
    known = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in known.values() if isinstance(value, dict)]
    for parameters in (known, *nested):
        if parameters.get("rope_type") == "longrope":
            return int(parameters["original_max_position_embeddings"])
    return None


@torch.inference_mode()
def score_direct(model: PreTrainedModel, pack: Pack) -> list[Scored]:
    """Every window of the pack, in order, for models that `direct.is_plain` knows. Raises NonFinite."""
    return begin_direct(model, pack)()


@torch.inference_mode()
def begin_direct(model: PreTrainedModel, pack: Pack) -> Callable[[], list[Scored]]:
    """The same in two steps: what is returned waits for the device and gives the windows.

    Up to there nothing waits, so that an accelerator has the next pack's work before this one's is read.
    """
    states = scored_states(model, pack)
    slices = logits_by_slices(model, states)
    read = _read(slices, len(states), pack.rows, pack.targets, pack.needs_greedy, states.device.type == "cpu")

    @torch.inference_mode()
    def end() -> list[Scored]:
        if (found := read.checked()) is None:  # sums of exponentials beyond what float32 holds
            logits = torch.cat([part for _, part in logits_by_slices(model, states[: len(pack.scored)])], dim=1)
            return _summarise(logits, pack.rows, pack.targets, pack.owners, pack.n_windows, pack.needs_greedy)
        return _windows(*found, pack.owners, pack.n_windows, model.dtype)

    return end


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
        raise NotDriven(f"{type(model).__name__} does not take logits_to_keep")
    return _summarise(logits, pack.rows, pack.targets, pack.owners, pack.n_windows, pack.needs_greedy)


@torch.inference_mode()
def score_rows(model: PreTrainedModel, windows: Sequence[Window], max_tokens: int) -> list[Scored]:
    """The same for windows as padded rows, as lm-eval's HFLM feeds them. Raises NonFinite."""
    rows = sorted({window.inputs for window in windows}, key=lambda inputs: (-len(inputs), inputs))
    answers: dict[int, Scored] = {}
    switch = position_switch(model) or 0
    while rows:
        n_rows = max(1, max_tokens // len(rows[0]))
        if len(rows[0]) > switch:  # in a batch the longest text decides for all
            n_rows = min(n_rows, sum(len(inputs) > switch for inputs in rows))
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
    waits = logits.device.type == "cpu"
    read = _read([(0, logits)], len(logits), rows, targets, needs_greedy, waits).checked()
    if read is None:
        shifted = logits.float() - logits.amax(dim=-1, keepdim=True).float()
        if not bool(torch.isfinite(shifted).all()):
            raise NonFinite("the model's logits are not finite")
        read = _read([(0, shifted)], len(logits), rows, targets, needs_greedy, waits).checked()
    assert read is not None, "a shifted row's sum is at least 1 and at most its length"
    return _windows(*read, owners, n_windows, logits.dtype)


@dataclass(frozen=True)
class _Reading:
    """Of predicted tokens the log-probabilities [P], float32, and whether each is the first of the most likely, [P].

    Not yet waited for. is_safe: whether all sums of exponentials were within what float32 holds, one bool.
    """

    log_probs: torch.Tensor
    is_best: torch.Tensor
    is_safe: torch.Tensor

    def checked(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Both, once they are there; None where the sums were not safe. Raises NonFinite."""
        if not bool(self.is_safe):
            return None
        if not bool(torch.isfinite(self.log_probs).all()):
            raise NonFinite("the model's logits are not finite")
        return self.log_probs, self.is_best


def _read(
    slices: Iterable[tuple[int, torch.Tensor]],
    n_rows: int,
    rows: torch.Tensor,
    targets: torch.Tensor,
    needs_greedy: bool,
    waits: bool,
) -> _Reading:
    """What logits say of predicted tokens, by a token's row and its id.

    slices: logits [S, tokens] by ranges of the vocabulary, ascending. waits: whether it may look at values on its way,
    which costs a processor nothing and saves it a pass; an accelerator would stand still.

    Exponentials are summed without a shift, which spares a pass.
    """
    device = rows.device
    sums, best = torch.zeros(n_rows, device=device), torch.full((n_rows,), -torch.inf, device=device)
    chosen = torch.zeros(len(rows), device=device)
    is_best = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for first, logits in slices:
        sums += _sums(logits)
        here = (targets >= first) & (targets < first + logits.shape[1])
        local = (targets - first).clamp_(0, logits.shape[1] - 1)
        chosen = torch.where(here, logits[rows, local].float(), chosen)
        if needs_greedy:
            top = logits.amax(dim=-1).float()
            is_first = here & (top > best)[rows]  # a tie belongs to the slice before
            best = torch.maximum(best, top)
            if waits:  # argmax is slow and ties are rare: only where it can matter
                check = (is_first & (chosen == top[rows])).nonzero()[:, 0]
                is_best[check] = logits[rows[check]].argmax(dim=-1) == local[check]
            else:
                is_best |= is_first & (logits.argmax(dim=-1)[rows] == local)
    is_safe = ((sums > SAFE_SUMS[0]) & (sums < SAFE_SUMS[1])).all()
    if needs_greedy:
        is_best &= chosen == best[rows]
    return _Reading(chosen - sums.log_()[rows], is_best, is_safe)


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


def _sums(logits: torch.Tensor) -> torch.Tensor:
    """sum(exp(logits)) of [S, tokens] in float32, [S]."""
    limit = CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    chunks = logits.split(max(1, limit // logits.shape[1]))
    return torch.cat([chunk.to(torch.float32, copy=True).exp_().sum(dim=-1) for chunk in chunks])
