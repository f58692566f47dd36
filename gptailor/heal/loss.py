"""KL from the teacher's next-token distributions to the student's, from the last hidden states of both.

Output head and what stands behind it are the base's in either model and are not trained, so that loss and gradient of
some tokens are done while their logits are still in the processor's cache: rows as long as the vocabulary are never
all there, and nothing of them is kept for the backward pass or computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptailor.family.structure import decoder_of
from gptailor.heal.cost import HEAD_ROWS

CHUNK_ELEMENTS, CHUNK_ELEMENTS_GPU = 2**19, 2**27
"""Logits that are compared at a time, in float32: on a CPU they stay in its cache."""


class Head:
    """What a model makes of its decoder's last hidden states: its own forward behind it, scales and caps too."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._decoder = model, decoder_of(model)
        self.dtype: torch.dtype = model.get_output_embeddings().weight.dtype

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """states: [tokens, hidden] -> logits, [tokens, vocabulary]."""
        given = _LastStates(last_hidden_state=states[None].to(self.dtype))
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        model: Any = self._model
        self._decoder.forward = lambda *_, **__: given
        try:
            return type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
        finally:
            del self._decoder.forward


class _LastStates(BaseModelOutputWithPast):
    """A decoder's output that holds nothing else: no router's logits, no attentions."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def divergence(head: Head, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) in nats, the mean over tokens. found, wanted: last hidden states, [tokens, hidden]."""
    loss: torch.Tensor = _Divergence.apply(found, wanted, head)
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, wanted: torch.Tensor, head: Head) -> torch.Tensor:
        nats = torch.zeros((), device=found.device)
        # every piece of one shape (batches.py): rows of zeros in both have no divergence, and no gradient
        whole = [nn.functional.pad(states, (0, 0, 0, -len(states) % HEAD_ROWS)) for states in (found, wanted)]
        gradient = torch.empty_like(whole[0])
        rows = zip(*(states.split(HEAD_ROWS) for states in (*whole, gradient)), strict=True)
        for mine, theirs, slope in rows:
            mine = mine.detach().to(head.dtype).requires_grad_()
            goal = head(theirs)
            with torch.enable_grad():
                logits = head(mine)
            some, of_logits = compared(logits.detach(), goal)
            nats += some
            slope.copy_(torch.autograd.grad(logits, mine, of_logits)[0])
        ctx.save_for_backward(gradient[: len(found)].div_(len(found)))
        return nats / len(found)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * upstream, None, None


def compared(found: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(wanted || found) in nats, summed over rows, and its gradient by `found`. Both: logits, [rows, vocabulary]."""
    slope = torch.empty_like(found)
    nats = torch.zeros((), device=found.device)
    limit = CHUNK_ELEMENTS if found.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    n = max(1, limit // found.shape[1])
    for mine, theirs, out in zip(found.split(n), wanted.split(n), slope.split(n), strict=True):
        f, w = (logits.to(torch.float32, copy=True) for logits in (mine, theirs))
        f -= f.amax(dim=-1, keepdim=True)
        w -= w.amax(dim=-1, keepdim=True)
        p, q = f.exp(), w.exp()
        of_p, of_q = p.sum(dim=-1, keepdim=True), q.sum(dim=-1, keepdim=True)
        p /= of_p
        q /= of_q
        nats += w.sub_(f).mul_(q).sum() + (of_p / of_q).log().sum()
        out.copy_(p.sub_(q))
    return nats, slope
