"""A tiny family with planted redundancy: some layers give what they get, so that the right cut is known."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.families import save_family, tiny_config

IDENTITIES = {"base": (2, 3), "math": (3, 4)}
"""Source -> the layers that do nothing there; they are copies of each other."""


def planted_family(folder: Path) -> Path:
    """`base` and `math`, Llamas of 6 layers, two of which are identities."""
    save_family(folder, tiny_config(), candidates=("math",))
    for name, layers in IDENTITIES.items():
        file = folder / name / "model.safetensors"
        weights = load_file(file)
        for layer in layers:
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                weights[f"model.layers.{layer}.{part}.weight"].zero_()
        first, second = (f"model.layers.{layer}." for layer in layers)
        weights |= {key.replace(first, second): w.clone() for key, w in weights.items() if key.startswith(first)}
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def own_words(model: torch.nn.Module, n: int = 12, tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    """Texts that the model writes itself, so that every layer that does something lowers their loss; two batches."""
    ids = torch.arange(3, 3 + 7 * n, 7)[:, None]
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.clone().chunk(2)]


def family_with_a_linear_layer(folder: Path, config, size: float = 1.0) -> Path:
    """A family whose layer 3 adds a linear map of what layer 2's MLP projection reads, and nothing else.

    size: of the map, as a share of what such maps are.
    """
    save_family(folder, config, candidates=())
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    before, removed = model.model.layers[2], model.model.layers[3]
    with torch.no_grad():
        before.mlp.down_proj.weight.zero_()
        removed.self_attn.o_proj.weight.zero_()
        removed.mlp.down_proj.weight.mul_(size)
        for name in ("gate_proj", "up_proj"):
            getattr(removed.mlp, name).weight.copy_(getattr(before.mlp, name).weight)
    model.save_pretrained(folder / "base")
    return folder
