"""The model that learns: a copy of the plan's own, of which the layers alone may change.

Embeddings, final norm and output head stay the base's, as in every plan, so that what was healed is again a list of
layers. With LoRA (PEFT) small adapters beside the layers' linear maps are trained, and merged when they are asked for.
What is trained is in float32; where products are in bfloat16, so is all that is not trained, held so once instead of
being cast anew at every step. Adapters are merged into the plan's own tensors, not into these.
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
from gptailor.family.structure import decoder_of, find_layers, layer_list
from gptailor.heal.cost import SHORT


class Student:
    """model: what a trainer trains; it gives last hidden states, [texts, tokens, hidden], and no logits (loss.py).

    plain: the same without PEFT's cover. writes_out: whether attention is written out for short texts.
    """

    def __init__(self, stitched: PreTrainedModel, lora: int, seed: int, in_bfloat16: bool = False) -> None:
        """Copy a stitched model. lora: rank of the adapters; 0: the layers' own weights are trained.

        in_bfloat16: whether products will be. Raises UserError for an architecture whose layers have no linear map that
        adapters go beside.
        """
        self._before = list(layer_list(stitched))
        self.plain: PreTrainedModel = copy.deepcopy(stitched)
        self.plain.requires_grad_(False)
        if not lora:
            for parameter in layer_list(self.plain).parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        for parameter in filter(torch.is_floating_point, self.plain.parameters()):
            parameter.data = parameter.data.to(_dtype(parameter.requires_grad, in_bfloat16))
        self._path = find_layers(self.plain)
        self.model: Any = self.plain
        if lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = _with_adapters(self.plain, self._path, lora)
            for part in self._adapters(self.plain).values():
                part.cast_input_dtype_enabled = not in_bfloat16  # the products cast what they read themselves
        self._decoder = decoder_of(self.plain)
        self._fused = self.plain.config._attn_implementation
        self.writes_out = in_bfloat16 and self.plain.device.type == "cpu" and self._fused == "sdpa"
        # no bound method: accelerate would bind it to the model
        self.plain.forward = lambda *args, **inputs: self._states(*args, **inputs)

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        if self.writes_out:
            self.plain.config._attn_implementation = "eager" if input_ids.shape[1] <= SHORT else self._fused
        states: torch.Tensor = self._decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return states

    @property
    def n_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.plain.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def layers(self) -> list[dict[str, torch.Tensor]]:
        """The layers' tensors as they are now, adapters merged, on the host and in the number types that they had."""
        return list(map(self._tensors, layer_list(self.plain), self._before))

    def _tensors(self, layer: nn.Module, before: nn.Module) -> dict[str, torch.Tensor]:
        adapted = self._adapters(layer)
        trained, found = dict(layer.named_parameters()), {}
        for name, old in before.state_dict().items():
            owner = name.rpartition(".")[0]
            tensor = trained[name] if name in trained and trained[name].requires_grad else old
            if owner in adapted and name.endswith(".weight"):
                tensor = old + adapted[owner].get_delta_weight("default").to(old.device)
            found[name] = tensor.to("cpu", old.dtype, copy=True)  # some stay in float32, as transformers keeps them
        return found

    @staticmethod
    def _adapters(module: nn.Module) -> dict[str, Any]:
        """Linear maps with adapters beside them, by name."""
        from peft.tuners.lora import LoraLayer

        return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def _dtype(is_trained: bool, in_bfloat16: bool) -> torch.dtype:
    return torch.bfloat16 if in_bfloat16 and not is_trained else torch.float32


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
