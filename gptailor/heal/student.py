"""The model that learns: the plan's own, copied in float32, of which the layers alone may change.

Embeddings, final norm and output head stay the base's, as in every plan, so that what was healed is again a list of
layers. With LoRA (PEFT) small adapters beside the layers' linear maps are trained, and merged when they are asked for.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptailor.errors import UserError
from gptailor.family.structure import find_layers, layer_list


class Student:
    """model: what a trainer trains. plain: the same without PEFT's cover. dtype: of the tensors that it gives."""

    def __init__(self, stitched: PreTrainedModel, lora: int, seed: int) -> None:
        """Copy a stitched model. lora: rank of the adapters; 0: the layers' own weights are trained.

        Raises UserError for an architecture whose layers have no linear map that adapters go beside.
        """
        self.dtype = stitched.dtype
        self.plain: PreTrainedModel = copy.deepcopy(stitched).float()
        self.plain.requires_grad_(False)
        self._path = find_layers(self.plain)
        self.model: Any = self.plain
        if lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = _with_adapters(self.plain, self._path, lora)
        else:
            for parameter in layer_list(self.plain).parameters():
                parameter.requires_grad_(parameter.is_floating_point())

    @property
    def n_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.plain.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def layers(self) -> list[dict[str, torch.Tensor]]:
        """The layers' tensors as they are now, adapters merged, on the host and in the family's number type."""
        return [self._tensors(layer) for layer in layer_list(self.plain)]

    def _tensors(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        from peft.tuners.lora import LoraLayer

        adapted: dict[str, Any] = {name: part for name, part in layer.named_modules() if isinstance(part, LoraLayer)}
        found: dict[str, torch.Tensor] = {}
        for name, tensor in layer.state_dict().items():
            if ".lora_" in name:
                continue
            owner, _, inner = name.partition(".base_layer.")
            if inner == "weight":
                tensor = tensor + adapted[owner].get_delta_weight("default")
            own = f"{owner}.{inner}" if inner else name
            found[own] = tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        return found


def _with_adapters(model: PreTrainedModel, path: str, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = {
        name.rpartition(".")[2]
        for layer in layer_list(model)
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    }
    if not linear:
        raise UserError(
            f"--lora: the layers of {type(model).__name__} have no linear map to put an adapter beside; give --lora 0"
        )
    names = "|".join(map(re.escape, sorted(linear)))
    targets = rf"{re.escape(path)}\.\d+\.(.+\.)?({names})"
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers asks its own models by an old name
        return get_peft_model(model, settings)
