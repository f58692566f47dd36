"""What a model's layers do to the residual stream, from one pass over texts.

Every state is reduced as it passes, and of a bounded sample of tokens the states themselves are kept: at most SAMPLED
tokens a layer, the same ones for every layer. The first token of a text is never among them: models park attention
there, and its state says nothing of the text.

The sample's states are brought to length 1 first. The next layer's norm does so too, and the few directions and tokens
of enormous size that language models have (Sun et al., "Massive Activations", arXiv 2402.17762) would else be all that
is compared. Then, of every two states:

- cosine: the mean over tokens.
- linear CKA (Kornblith et al., arXiv 1905.00414) by the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al.,
  arXiv 2010.15327), because there are fewer tokens than dimensions and the plain one would call all states alike. From
  Gram matrices of tokens, [tokens, tokens], which are smaller than covariances of features here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gptailor.baselines.angular_distance import LastTokens
from gptailor.baselines.block_influence import Influence
from gptailor.baselines.case import Batch, watch_layers
from gptailor.errors import UserError
from gptailor.family.structure import layer_list

SAMPLED = 1024
"""Tokens whose states are compared at most."""
LEAST = 4
"""Tokens that the estimator of CKA needs."""
Matrix = list[list[float]]


@dataclass(frozen=True)
class States:
    """One model's. State 0 enters the first layer, state i + 1 leaves layer i: L + 1 states of L layers.

    influence: Block Influence of each layer, over all tokens. angular: the angular distance between every two states at
    the texts' last tokens, 0 to 1 (Gromov et al.): [l][l + n] is what the n layers from l on do. cosine, cka: between
    every two states, over the sampled tokens.
    """

    influence: list[float]
    angular: Matrix
    cosine: Matrix
    cka: Matrix


def states_of(model: PreTrainedModel, batches: Sequence[Batch], name: str) -> States:
    """Watch the model read the batches. name: of the model, for messages.

    Raises UserError where the texts are too short, or the model's states are not finite.
    """
    n_layers = len(layer_list(model))
    chosen = [mask.to(model.device) for mask in _chosen(batches)]
    influence, last = Influence(n_layers), LastTokens(n_layers)
    kept: list[list[torch.Tensor]] = [[] for _ in range(n_layers + 1)]

    def see(index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        influence.see(index, h, h_next, mask)
        last.see(index, h, h_next, mask)
        mine = chosen[len(kept[index])]
        kept[index].append(_unit(h[mine]))
        if index == n_layers - 1:
            kept[n_layers].append(_unit(h_next[mine]))

    watch_layers(model, batches, see)
    try:
        scores = influence.scores()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    sample = torch.stack([torch.cat(parts) for parts in kept])  # [states, tokens, hidden]
    return States(scores, last.distances().tolist(), _cosine(sample).tolist(), _cka(sample).tolist())


def n_bytes(n_layers: int, hidden_size: int, n_tokens: int) -> int:
    """What the sample takes: states, and Gram matrices, in float32."""
    n = min(n_tokens, SAMPLED)
    return 4 * (n_layers + 1) * n * (2 * hidden_size + n)


def n_sampled(batches: Sequence[Batch]) -> int:
    """Tokens that are compared."""
    return sum(int(mask.sum()) for mask in _chosen(batches))


def _chosen(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """By batch, [texts, tokens]: which tokens are compared, spread evenly over all. Raises UserError for too few."""
    masks = [batch["attention_mask"].bool().cpu() for batch in batches]
    for mask in masks:
        mask[:, 0] = False  # padding is on the right
    total = sum(int(mask.sum()) for mask in masks)
    if total < LEAST:
        raise UserError(f"redundancy: the objectives' texts have {total} tokens to compare, and {LEAST} are needed")
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[torch.linspace(0, total - 1, min(total, SAMPLED)).round().long()] = True
    for mask, mine in zip(masks, wanted.split([int(mask.sum()) for mask in masks]), strict=True):
        mask[mask.clone()] = mine
    return masks


def _unit(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def _cosine(sample: torch.Tensor) -> torch.Tensor:
    """[states, states], from unit states [states, tokens, hidden]."""
    flat = sample.flatten(1)
    return (flat @ flat.T / sample.shape[1]).clamp(-1, 1).cpu()


def _cka(sample: torch.Tensor) -> torch.Tensor:
    """[states, states]; 1 where one is the other, turned and scaled, and about 0 where they have nothing in common."""
    grams = torch.stack([_centred(one @ one.T).flatten() for one in sample])
    hsic = (grams @ grams.T).double().cpu()
    norms = hsic.diagonal().clamp(min=0).sqrt()
    return (hsic / (norms[:, None] * norms[None]).clamp(min=math.ulp(1.0))).clamp(-1, 1)


def _centred(gram: torch.Tensor) -> torch.Tensor:
    """A Gram matrix [n, n] without its diagonal, centred so that products of two are unbiased (U-centring)."""
    n = len(gram)
    gram = gram.fill_diagonal_(0)
    means = gram.sum(dim=0) / (n - 2)
    centred = gram - means[:, None] - means[None] + means.sum() / (n - 1)
    return centred.fill_diagonal_(0)
