#!/usr/bin/env python3
"""Make a pool of twelve candidates of the demo's base for data/experiments/growing.yaml: strong, weak and broken ones.

    python data/demo/pool.py          # seconds; writes data/demo/pool/, which is not committed

Nothing is trained. The demo's fine-tunes are there as they are; half of a fine-tune's difference makes a weak one; the
main directions of its difference make a LoRA adapter; the mean of two makes a mixed one. One is broken: its layers'
matrices are noise of the base's size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODELS = Path(__file__).resolve().parent / "models"
POOL = Path(__file__).resolve().parent / "pool"
SKILLS = ("sums", "code", "prose")
RANK = 16
WEAK = 0.3
"""Share of a fine-tune's difference from the base that a weak one has."""
Weights = dict[str, torch.Tensor]


def weights(name: str) -> Weights:
    return {key: tensor.float() for key, tensor in load_file(MODELS / name / "model.safetensors").items()}


def save(name: str, tensors: Weights) -> None:
    """A full model: the base's folder with other weights."""
    shutil.copytree(MODELS / "base", POOL / name)
    kept = {key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}
    save_file(kept, POOL / name / "model.safetensors", metadata={"format": "pt"})


def moved(base: Weights, tuned: Weights, share: float) -> Weights:
    """The base plus a share of what the fine-tune differs by."""
    return {key: base[key] + share * (tuned[key] - base[key]) for key in base}


def adapter(name: str, base: Weights, tuned: Weights) -> None:
    """A PEFT folder: the RANK main directions of what each of the layers' matrices differs by."""
    tensors: Weights = {}
    for key in (key for key in base if ".layers." in key and base[key].ndim == 2):
        u, s, v = torch.linalg.svd(tuned[key] - base[key], full_matrices=False)
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = v[:RANK].contiguous()
        tensors[f"{stem}.lora_B.weight"] = (u[:, :RANK] * s[:RANK]).contiguous()
    (POOL / name).mkdir(parents=True)
    save_file(tensors, POOL / name / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in tensors})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (POOL / name / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    shutil.rmtree(POOL, ignore_errors=True)
    base, tuned = weights("base"), {skill: weights(skill) for skill in SKILLS}
    for skill, own in tuned.items():
        save(f"{skill}_weak", moved(base, own, WEAK))
        adapter(f"{skill}_lora", base, own)
    save("sums_code", {key: (tuned["sums"][key] + tuned["code"][key]) / 2 for key in base})
    save("code_prose", {key: (tuned["code"][key] + tuned["prose"][key]) / 2 for key in base})
    noise = torch.Generator().manual_seed(0)
    is_matrix = {key: ".layers." in key and base[key].ndim == 2 for key in base}
    random = {key: torch.randn(base[key].shape, generator=noise) * base[key].std() for key in base if is_matrix[key]}
    save("broken", base | random)
    print(*sorted(path.name for path in POOL.iterdir()))


if __name__ == "__main__":
    main()
