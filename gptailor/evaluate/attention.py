"""Attention over a pack: registered in transformers' AttentionInterface, so that every model built on it can be driven.

The linear layers of a model see one flat row without padding; only here tokens are grouped by example, because only
here they look at each other. The pack travels to this function through the model's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from gptailor.evaluate.packing import Bucket, Pack

NAME = "gptailor_pack"
_UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask", "block_table")  # change the result in ways not done here


class PackMasks:
    """A pack on its way through the layers, with its masks: built once a forward, shared by all layers."""

    def __init__(self, pack: Pack, dtype: torch.dtype):
        self.pack = pack
        self.dtype = dtype
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """Additive mask [B, 1, Lq, Lk] of bucket `number`; None where plain causal attention says the same."""
        bucket = self.pack.buckets[number]
        if window is not None and window >= int(bucket.queries.shape[1]) and bucket.is_causal:
            window = None
        if window is None and bucket.is_causal:
            return None
        if (number, window) not in self._masks:
            self._masks[number, window] = self._build(bucket, window)
        return self._masks[number, window]

    def _build(self, bucket: Bucket, window: int | None) -> torch.Tensor:
        queries, keys = bucket.queries[:, :, None], bucket.keys[:, None, :]
        real = keys.clamp(min=0)
        seen = (keys >= 0) & (keys <= queries) & (queries < self.pack.ends[real])
        if window is not None:
            seen &= self.pack.positions[queries] - self.pack.positions[real] < window
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]


def pack_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    gptailor_pack: PackMasks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every example of the pack to itself. query [1, H, T, D], key/value [1, Hkv, T, D] -> [1, T, H, D].

    Raises NotImplementedError for what a model asks beyond causal attention with a window or a soft cap.
    """
    strange = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if gptailor_pack is None or attention_mask is not None or strange or kwargs.get("is_causal") is False:
        raise NotImplementedError(
            f"{type(module).__name__} asks for {', '.join(strange) or 'other than causal attention'}"
        )
    pack = gptailor_pack.pack
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
    outputs = []
    for number, bucket in enumerate(pack.buckets):
        q = _gather(query, bucket.queries)
        k = _gather(key, bucket.keys.clamp(min=0))
        v = _gather(value, bucket.keys.clamp(min=0))
        mask = gptailor_pack.mask(number, sliding_window)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _softcapped(q, k, v, mask, scaling, softcap)
        outputs.append(out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, pack.places)[None], None


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[T, H, D] by [B, L] -> [B, H, L, D]."""
    return states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:]).transpose(1, 2)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, cap: float
) -> torch.Tensor:
    """Gemma 2's attention: scores squeezed by cap * tanh(scores / cap) before the mask, as transformers' eager one."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / cap) * cap
    if mask is None:
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(NAME, pack_attention)


@contextmanager
def attending_by_pack(model: PreTrainedModel) -> Iterator[None]:
    """Let every layer of the model, wherever it came from, use `pack_attention`; afterwards what it used before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
