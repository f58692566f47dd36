"""mergekit itself, run on a file of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def run_mergekit(text: str, out: Path) -> dict[str, torch.Tensor]:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(out), options=MergeOptions(copy_tokenizer=False))
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
