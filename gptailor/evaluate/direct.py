"""A decoder's arithmetic written out for packs: what transformers' Llama computes, in fewer passes over memory.

Most families that are stitched (Llama, Mistral, Qwen2, Qwen3 and their kin) are built from the same parts: RMSNorm,
rotary attention, a gated MLP, each added to the residual stream. At the size of models that are searched on a CPU, the
passes between the products cost as much as the products, so this path keeps few of them, changes tensors in place,
runs the last layer past its attention and the output head only where something is predicted, and shares nothing
between two calls: packs can be scored in threads side by side, each with one processor's cache to itself.

Not a table of names: the parts are found by looking, and the evaluator uses this path only after its answers on a few
examples agreed with those of the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gptailor.evaluate.attention import PackMasks, attend_pack
from gptailor.evaluate.packing import Pack
from gptailor.family.spread import is_spread

BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}  # Qwen3
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}  # others change with the texts seen so far
EVEN = 64
HEAD_ELEMENTS = 2**22  # logits in memory at a time
HEAD_WIDTHS = tuple(2**k for k in range(11, 20))
HEAD_ELEMENTS_GPU = 2**28


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the model has exactly the parts that `scored_states` knows, all of them in one place.

    Parts go by their names in transformers. What is written out here calls no layer, and nothing would follow it to
    another device.
    """
    if is_spread(model):
        return False
    body: Any = model.get_decoder()
    if _children(body) != BODY or not isinstance(model.get_output_embeddings(), nn.Linear):
        return False
    if str(getattr(body.rotary_emb, "rope_type", None)) not in FIXED_ROTATIONS:
        return False
    layer: Any = body.layers[0]
    if _children(layer) != LAYER or not MLP - {"act_fn"} <= _children(layer.mlp) <= MLP:
        return False
    norms = [body.norm, layer.input_layernorm, layer.post_attention_layernorm]
    if _children(layer.self_attn) >= HEAD_NORMS:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    return _children(layer.self_attn) - HEAD_NORMS == ATTENTION and all(_is_plain_norm(norm) for norm in norms)


def scored_states(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """What the output head reads, at the pack's scored positions: [S, H]; on a CPU with some rows more."""
    body: Any = model.get_decoder()
    masks = PackMasks(pack, body.embed_tokens.weight.dtype, pack.tokens.device.type != "cpu")
    tokens, positions, scored = pack.tokens, pack.positions, pack.scored
    if not masks.by_buckets:
        tokens, positions, scored = _filled(tokens), _filled(positions), _filled(scored)
    states = body.embed_tokens(tokens)  # [T, H]
    cos, sin = _rotations(*body.rotary_emb(states[None], positions[None]))
    for number, layer in enumerate(body.layers):
        attended = _attend(layer.self_attn, _norm(layer.input_layernorm, states), cos, sin, masks)
        if number == len(body.layers) - 1:  # what follows looks at one position at a time
            states, attended = states.index_select(0, scored), attended.index_select(0, scored)
        states = layer.self_attn.o_proj(attended).add_(states)
        normed, mlp = _norm(layer.post_attention_layernorm, states), layer.mlp
        gate = mlp.gate_proj(normed)
        gate = F.silu(gate, inplace=True) if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn(gate)
        states = mlp.down_proj(gate.mul_(mlp.up_proj(normed))).add_(states)
    return _norm(body.norm, states)


def _filled(values: torch.Tensor) -> torch.Tensor:
    """Values [n], and zeros up to a multiple of EVEN.

    Products of few different shapes, because a CPU's library makes, and keeps, code for each.
    """
    return F.pad(values, (0, -len(values) % EVEN))


def logits_by_slices(model: PreTrainedModel, states: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits of [S, H], some of the vocabulary at a time: (first token, [S, tokens])."""
    head: Any = model.get_output_embeddings()
    limit = HEAD_ELEMENTS if states.device.type == "cpu" else HEAD_ELEMENTS_GPU
    width = min(w for w in HEAD_WIDTHS if w * len(states) >= limit or w == HEAD_WIDTHS[-1])
    for first in range(0, head.weight.shape[0], width):
        bias = None if head.bias is None else head.bias[first : first + width]
        yield first, F.linear(states, head.weight[first : first + width], bias)


def _attend(attention: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, masks: PackMasks) -> Any:
    """[T, H] -> [T, heads * D], before the output projection."""
    n_tokens, width = len(normed), cos.shape[-1]
    q, k, v = (
        projection(normed).view(n_tokens, -1, width)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # [T, heads, D]
    if hasattr(attention, "q_norm"):
        q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
    q, k, v = (states[None].transpose(1, 2) for states in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
    return attend_pack(q, k, v, masks, attention.scaling, _window(attention)).reshape(n_tokens, -1)


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    window = getattr(attention.config, "sliding_window", None)
    return None if hasattr(attention.config, "layer_types") else window  # Mistral's, known to its configuration alone


def _rotations(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, D] each -> [T, 1, D], the sine with the signs of transformers' rotate_half."""
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [T, heads, D]."""
    half = states.shape[-1] // 2
    turned = torch.cat([states[..., half:], states[..., :half]], dim=-1)
    return (states * cos).addcmul_(turned, sin)


def _norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    """RMSNorm of [..., H].

    On a CPU in three passes: batch norm with the tokens as channels divides each token by a given root in one pass, in
    float32 inside.
    """
    weight, epsilon = module.weight, _epsilon(module)
    if states.device.type != "cpu":
        return F.rms_norm(states, weight.shape, weight, epsilon)
    flat = states.reshape(1, -1, states.shape[-1])
    squares = torch.linalg.vector_norm(flat[0], dim=-1, dtype=torch.float32).square_().div_(states.shape[-1])
    normed = F.batch_norm(flat, torch.zeros_like(squares), squares, eps=epsilon)
    return normed.mul_(weight).view(states.shape)


def _epsilon(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether the module computes weight * x / rms(x), tried on a few numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return False
    trial = torch.linspace(-3.0, 4.0, 3 * weight.shape[0], device=weight.device).view(3, -1).to(weight.dtype)
    with torch.inference_mode():
        return torch.allclose(module(trial), _norm(module, trial), rtol=2e-2, atol=1e-5)


def _children(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if child is not None}
