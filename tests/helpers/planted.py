"""A tiny family with planted redundancy: some layers give what they get, so that the right cut is known."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.command_line import write_benchmark
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


def family_with_differences(folder: Path) -> Path:
    """Llamas of 6 layers: layer 3 does nothing, layer 5 has layer 4's weights.

    `one`, `two` and `three` are the base but for layer 1, where one and two went opposite ways, and layer 2, where one
    and three went the same way.
    """
    save_family(folder, tiny_config(), candidates=("one", "two", "three"))
    file = folder / "base" / "model.safetensors"
    base = load_file(file)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        base[f"model.layers.3.{part}.weight"].zero_()
    base |= {k.replace(".4.", ".5."): w.clone() for k, w in base.items() if k.startswith("model.layers.4.")}
    noise = {key: 0.1 * w.std() * torch.randn_like(w) for key, w in base.items() if w.ndim == 2}
    steps = {"base": {}, "one": {1: 1.0, 2: 1.0}, "two": {1: -1.0}, "three": {2: 2.0}}
    for name, layers in steps.items():
        weights = {key: w.clone() for key, w in base.items()}
        for layer, step in layers.items():
            for key in noise:
                if key.startswith(f"model.layers.{layer}."):
                    weights[key] += step * noise[key]
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_own_answers(benchmarks: Path, name: str, base: Path, n: int = 24) -> None:
    """A benchmark of which the base knows every answer: the right option is the one that it finds likeliest."""
    write_benchmark(benchmarks, name, n, 0)
    rows = [json.loads(line) for line in (benchmarks / f"{name}.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for row in rows:
        levels = []
        for option in row["choices"]:
            start = len(tokenizer(row["query"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['query']} {option}")["input_ids"]])
            with torch.inference_mode():
                chances = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            levels.append(float(chances.gather(1, ids[0, start:, None]).sum()) / len(option))
        row["gold"] = max(range(len(levels)), key=levels.__getitem__)
    (benchmarks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
