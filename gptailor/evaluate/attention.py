"""Attention over a pack: registered in transformers' AttentionInterface, so that every model built on it can be driven.

The linear layers of a model see one flat row without padding; only here tokens are grouped by example, because only
here they look at each other. The pack travels to this function through the model's keyword arguments.

A CPU does best with one call an example on slices of the row; an accelerator with few calls on padded buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from gptailor.evaluate.packing import Block, Pack

NAME = "gptailor_pack"
EVEN_KEYS = 16
_UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask", "block_table")  # change the result in ways not done here


class NotDriven(Exception):
    """The model's attention asks for what is not done here; it is scored another way."""


class PackMasks:
    """A pack on its way through the layers, with its masks: built once a forward, shared by all layers."""

    def __init__(self, pack: Pack, dtype: torch.dtype, by_buckets: bool):
        self.pack = pack
        self.dtype = dtype
        self.by_buckets = by_buckets
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self._elsewhere: dict[torch.device, PackMasks] = {}

    def to(self, device: torch.device) -> PackMasks:
        """The same on another device, for the layers that live there; made once."""
        if device == self.pack.tokens.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = PackMasks(self.pack.to(device), self.dtype, self.by_buckets)
        return self._elsewhere[device]

    def of_bucket(self, number: int, window: int | None) -> torch.Tensor | None:
        """Additive mask [B, 1, Lq, Lk]; None where plain causal attention says the same."""
        bucket = self.pack.buckets[number]
        if bucket.is_causal and (window is None or window >= bucket.queries.shape[1]):
            return None
        if (number, window) not in self._masks:
            mask = self._build(bucket.queries[:, :, None], bucket.keys[:, None, :], window)
            self._masks[number, window] = mask[:, None]
        return self._masks[number, window]

    def of_block(self, number: int, keys: slice, window: int | None) -> torch.Tensor | None:
        """Additive mask [Lq, Lk] over the prefix and a slice of the row; None where query i sees keys 0 to i."""
        block = self.pack.blocks[number]
        if block.is_path and keys.start == block.start and (window is None or window >= block.n_keys):
            return None
        if (number, window) not in self._masks:
            own = torch.arange(block.start, block.stop)
            seen = torch.arange(keys.start, keys.stop)
            seen = seen if block.prefix is None else torch.cat([block.prefix, seen])
            self._masks[number, window] = self._build(own[:, None], seen[None, :], window)
        return self._masks[number, window]

    def _build(self, queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
        real = keys.clamp(min=0)
        seen = (keys >= 0) & (keys <= queries) & (queries < self.pack.ends[real])
        if window is not None:
            seen &= self.pack.positions[queries] - self.pack.positions[real] < window
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill_(~seen, float("-inf"))


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

    Raises NotDriven for what a model asks beyond causal attention with a window or a soft cap.
    """
    strange = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if gptailor_pack is None or attention_mask is not None or strange or kwargs.get("is_causal") is False:
        asked = ", ".join(strange) or "other than causal attention"
        raise NotDriven(f"{type(module).__name__} asks for {asked}")
    return attend_pack(query, key, value, gptailor_pack, scaling, sliding_window, softcap), None


def attend_pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: PackMasks,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same without a module: query [1, H, T, D], key/value [1, Hkv, T, D] -> [1, T, H, D]."""
    attend = _by_buckets if masks.by_buckets else _by_blocks
    return attend(query, key, value, masks, scaling, window, softcap)


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: PackMasks,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One call an example, on slices of the row; zeros for tokens of no example."""
    answers = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
    for number, block in enumerate(masks.pack.blocks):
        seen = _evened(block, len(masks.pack.tokens))
        k, v = key[:, :, seen], value[:, :, seen]
        if block.prefix is not None:
            k = torch.cat([key.index_select(2, block.prefix), k], dim=2)
            v = torch.cat([value.index_select(2, block.prefix), v], dim=2)
        mask = masks.of_block(number, seen, window)
        out = _attend(query[:, :, block.start : block.stop], k, v, mask, scaling, softcap)
        answers[:, block.start : block.stop] = out.transpose(1, 2)
    return answers


def _evened(block: Block, n_tokens: int) -> slice:
    """The block's own keys and, hidden from it, neighbours up to a number of keys that half-precision products like.

    At 187 keys a CPU's bfloat16 attention takes twice as long as at 192.
    """
    missing = -block.n_keys % EVEN_KEYS
    if block.stop + missing <= n_tokens:
        return slice(block.start, block.stop + missing)
    if block.prefix is None and block.start >= missing:
        return slice(block.start - missing, block.stop)
    return slice(block.start, block.stop)


def _by_buckets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: PackMasks,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One call for all examples of similar size, gathered into padded rectangles and back."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
    outputs = []
    for number, bucket in enumerate(masks.pack.buckets):
        keys = bucket.keys.clamp(min=0)
        mask = masks.of_bucket(number, window)
        out = _attend(_gather(q, bucket.queries), _gather(k, keys), _gather(v, keys), mask, scaling, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, masks.pack.places)[None]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, H, Lq, D] x [B, Hkv, Lk, D] -> [B, H, Lq, D]; causal where there is no mask."""
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    # Gemma 2: scores squeezed by cap * tanh(scores / cap) before the mask, as in transformers' eager attention.
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[T, H, D] by [B, L] -> [B, H, L, D]."""
    return states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:]).transpose(1, 2)


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
