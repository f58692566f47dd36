"""LLM-Pruner (Ma et al., arXiv 2305.11627; horseee/LLM-Pruner): what the loss would miss least, by its gradients.

Block-wise: groups of heads (q, k and v rows with their o columns) and MLP channels (gate and up rows with their down
columns) are scored by the importance of their weights w, summed over all the projections that go together:

    first: |w g|        mixed: |w g - w A w / 2|

g is the gradient of the mean loss on ten texts of 64 tokens, A the mean of the squared gradients of each text by itself
(`param_first` and `param_mix` of the published code). The lowest go, as large a share in every layer but the first four
and the last two; of models with fewer than the paper's 32 layers, fewer are spared. Under grouped-query attention whole
groups go. Nothing is compensated. Cost: one forward and backward pass over the ten texts, and one a text for `mixed`;
memory for the gradients of the layers' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.stitch.edits.case import EditCase, padded
from gptailor.stitch.edits.gradients import trainable
from gptailor.stitch.edits.width import ATTENTION, MLP, Widths, cuts, kept_after, parameters_to_go, told, widths_of

FIRST, LAST, OF_LAYERS = 4, 2, 32
"""Layers at either end that stay whole, of so many."""
TEXTS, TOKENS = 10, 64
"""Texts, and tokens of one; shorter texts are as many more."""

Scores = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Position of a layer -> importance of its groups and of its channels."""


def cut(case: EditCase) -> list[nn.Module]:
    """The layers without their least important groups and channels."""
    positions = spared(len(case.layers))
    widths = widths_of(case, positions)
    share = parameters_to_go(case) / sum(its.parameters for its in widths.values())
    off = cuts(case, widths, dict.fromkeys(positions, share))
    scores = importances(case, widths)
    edited = list(case.layers)
    for position in told(case, positions):
        groups, channels = scores[position]
        edited[position] = widths[position].narrowed(
            edited[position],
            kept_after(groups, off[position].groups) if off[position].groups else None,
            kept_after(channels, off[position].channels) if off[position].channels else None,
        )
    return edited


def spared(n_layers: int) -> list[int]:
    """Positions of the layers that are cut: all but some at either end."""
    first, last = (min(most, max(1, round(most * n_layers / OF_LAYERS))) for most in (FIRST, LAST))
    return list(range(first, n_layers - last)) or list(range(n_layers))


def importances(case: EditCase, widths: Mapping[int, Widths]) -> Scores:
    """Of every group and channel of these layers, on the host."""
    names = {(p, name): its.paths[name] for p, its in widths.items() for name in ATTENTION + MLP}
    weights = {key: case.layers[key[0]].get_submodule(path).get_parameter("weight") for key, path in names.items()}
    found = _weight_importances(case, weights, is_mixed=case.parameter("importance") == "mixed")
    return {position: _summed(position, its, found) for position, its in widths.items()}


Key = tuple[int, str]


def _summed(position: int, its: Widths, found: Callable[[Key], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of one layer's groups and channels, from that of its weights."""
    groups, channels = torch.zeros(its.groups), torch.zeros(its.channels)
    for name in ("q_proj", "k_proj", "v_proj"):
        groups += found((position, name)).sum(dim=1).view(its.groups, -1).sum(dim=1).cpu()
    groups += found((position, "o_proj")).sum(dim=0).view(its.groups, -1).sum(dim=1).cpu()
    for name in ("gate_proj", "up_proj"):
        channels += found((position, name)).sum(dim=1).cpu()
    return groups, channels + found((position, "down_proj")).sum(dim=0).cpu()


def _weight_importances(
    case: EditCase, weights: Mapping[Key, nn.Parameter], is_mixed: bool
) -> Callable[[Key], torch.Tensor]:
    """What gives a weight's importances, [out, in], float32; gradients are taken now."""
    rows = _rows(case)
    squares: dict[Key, torch.Tensor] = {}
    with trainable(list(weights.values())), torch.enable_grad():
        for number, row in enumerate(rows if is_mixed else ()):
            case.between(f"{case.edit.method}: text {number + 1} of {len(rows)}", number / len(rows))
            _backward(case, [row])
            for key, weight in weights.items():
                squares[key] = squares.get(key, 0.0) + _gradient(weight).float().square() / len(rows)
                weight.grad = None
        case.between(f"{case.edit.method}: gradients", 0.0)
        _backward(case, rows)
        gradients = {key: _gradient(weight) for key, weight in weights.items()}

    def importance(key: Key) -> torch.Tensor:
        weight = weights[key].detach().float()
        first = weight * gradients.pop(key).float()
        return (first - 0.5 * weight * squares.pop(key) * weight).abs() if is_mixed else first.abs()

    return importance


def _gradient(weight: nn.Parameter) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad.detach()


def _rows(case: EditCase) -> list[list[int]]:
    """The beginnings of texts, TEXTS * TOKENS tokens together at most. Raises UserError where they predict nothing."""
    rows: list[list[int]] = []
    for text in case.texts:
        left = TEXTS * TOKENS - sum(map(len, rows))
        if len(part := list(text[: min(TOKENS, left)])) > 1:
            rows.append(part)
    if not rows:
        raise UserError(f"{case.edit.method}: the calibration texts hold none of two tokens or more")
    return rows


def _backward(case: EditCase, rows: Sequence[Sequence[int]]) -> None:
    """Gradients of the mean loss of the rows' tokens."""
    batch = padded(rows, case.device)
    logits = case.model()(**batch, use_cache=False).logits
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten()).backward()
