"""LoRA adapters as PEFT writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_adapter(folder: Path, base: Path, *, targets=("q_proj", "down_proj"), **changes) -> Path:
    """A LoRA adapter with random weights, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(targets)}
    config = LoraConfig(**(settings | changes))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder
