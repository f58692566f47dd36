"""LoRA adapters (PEFT folders) as candidates: checked from their headers, merged into layers by PEFT itself.

PEFT knows scaling, rank-stabilised LoRA, DoRA and the rest; nothing of that arithmetic is repeated here. One layer at
a time is merged, in float32 and cast once, so that an adapter gives the weights that the folder written by
`merge_and_unload()` on a float32 base would give, without ever holding a second copy of the base.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.family.checkpoint import ADAPTER, Checkpoint, TensorInfo
from gptailor.family.skeleton import Shape

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|"
    r"bias|weight|base_layer\.(bias|weight)|modules_to_save\.\w+|token_adapter\.trainable_tokens_\w+|"
    r"trainable_tokens_\w+)(\.weight)?"
)


_PART = re.compile(r"\.(?:lora_|token_adapter|trainable_tokens|base_layer|modules_to_save|weight|bias)")


def adapter_problems(adapter: Checkpoint, shapes: Mapping[str, Shape], path: str) -> Iterator[str]:
    """What of a LoRA adapter does not fit the base: its kind, its target modules, its shapes.

    shapes: of the base's tensors, by the model's own names; path: of its list of layers. What is adapted outside the
    layers is not used, and so not looked at.
    """
    config = adapter.config
    if str(config.get("peft_type")).upper() != "LORA":
        yield f"is a {config.get('peft_type')} adapter; only LoRA adapters can be merged into layers"
        return
    if config.get("megatron_config"):
        yield "is made for Megatron layers (megatron_config), which this base does not have"
    if config.get("layer_replication"):
        yield "replicates layers (layer_replication); give an adapter that keeps the base's layers"
    if config.get("target_parameters"):
        yield "adapts single parameters (target_parameters), such as stacked experts, which is not known here"
        return
    in_layers = [name for name in adapter.tensors if name.startswith(f"base_model.model.{path}.")]
    if not in_layers:
        yield f"{ADAPTER} holds nothing for the base's layers ({path}); embeddings and head stay the base's"
    ranks: dict[str, set[int]] = defaultdict(set)
    swapped = bool(config.get("fan_in_fan_out"))
    for name in in_layers:
        info, match = adapter.tensors[name], _TENSOR.fullmatch(name)
        if match is None:
            yield f"{ADAPTER}: tensor {name} is not one that PEFT writes for LoRA"
            continue
        module, part = match["module"], match["part"]
        target = shapes.get(f"{module}.weight")
        if target is None:
            yield f"{ADAPTER}: adapts module {module}, which the base does not have"
        elif part in ("lora_A", "lora_B") and len(target) == 2:
            yield from _shape_problem(name, info, target, part, swapped)
            ranks[module].add(info.shape[0 if part == "lora_A" else 1] if len(info.shape) == 2 else 0)
        elif part == "weight" and info.shape != target:
            yield f"{ADAPTER}: tensor {name} has shape {list(info.shape)}, the base's has {list(target)}"
    for module, found in ranks.items():
        if len(found) > 1 or (not config.get("rank_pattern") and [*found] != [config.get("r")]):
            yield f"adapter_config.json says rank {config.get('r')}, {ADAPTER} has rank {sorted(found)} for {module}"
    targets = config.get("target_modules")
    for module in targets if isinstance(targets, list) else ():
        if not any(f".{module}." in name for name in adapter.tensors):
            yield f"adapter_config.json targets {module}, but {ADAPTER} has no weights for it"


def _shape_problem(name: str, info: TensorInfo, target: Shape, part: str, swapped: bool) -> Iterator[str]:
    n_out, n_in = reversed(target) if swapped else target
    wanted = n_in if part == "lora_A" else n_out
    if len(info.shape) != 2 or info.shape[1 if part == "lora_A" else 0] != wanted:
        yield f"{ADAPTER}: tensor {name} has shape {list(info.shape)}, the base's module is {n_in} to {n_out} wide"


def adapter_targets(adapter: Checkpoint, shapes: Mapping[str, Shape]) -> set[str]:
    """Names of the base's tensors that the adapter changes."""
    modules = {match["module"] for name in adapter.tensors if (match := _TENSOR.fullmatch(name))}
    return {f"{module}.weight" for module in modules if f"{module}.weight" in shapes}


def adapter_notes(adapter: Checkpoint, base: Checkpoint, path: str) -> Iterator[str]:
    """What its owner should know: what of it is not used, and for which base it was made."""
    outside = sorted(
        {
            _PART.split(name.removeprefix("base_model.model."))[0]
            for name in adapter.tensors
            if not name.startswith(f"base_model.model.{path}.")
        }
    )
    if outside:
        yield f"it also adapts {', '.join(outside[:3])}; embeddings and head stay the base's"
    made_for = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/")
    if made_for and not _is_named(made_for, base):
        yield f"adapter_config.json says that it was made for {made_for}; the base here is {base.label}"


def _is_named(made_for: str, base: Checkpoint) -> bool:
    """Whether an adapter's word for its base may mean this one: its id, its folder, or a folder of the same name."""
    name = made_for.replace("\\", "/").rpartition("/")[2].lower()
    own = [base.label.rpartition("/")[2], *([] if base.folder is None else [base.folder.name])]
    named = base.config.get("_name_or_path")
    return name in [one.lower() for one in (*own, *([str(named).rstrip("/").rpartition("/")[2]] if named else []))]


class Adapter:
    """An adapter's weights on the host, ready to be merged into one layer after the other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from peft import LoraConfig
        from safetensors.torch import load_file

        assert checkpoint.folder is not None
        self.where = checkpoint.where
        self.config = LoraConfig.from_pretrained(str(checkpoint.folder))
        self.config.inference_mode = True
        self.tensors = load_file(str(checkpoint.folder / ADAPTER))

    def merge_into(self, layer: nn.Module, path: str) -> dict[str, torch.Tensor] | None:
        """The layer's adapted state, by name inside the layer; None where the adapter leaves it alone.

        layer: a float32 twin of the base's layer, whose modules are used up. path: the layer's qualified name in the
        model, e.g. model.layers.7, which target patterns are matched against.
        """
        from peft import PeftModel, set_peft_model_state_dict

        mine = {name: t for name, t in self.tensors.items() if name.startswith(f"base_model.model.{path}.")}
        if not mine:
            return None
        holder = nn.Module()
        *parents, last = path.split(".")
        here = holder
        for part in parents:
            here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.add_module(last, layer)
        config = copy.deepcopy(self.config)
        config.modules_to_save = [
            name for name in config.modules_to_save or () if any(f".{name}." in tensor for tensor in mine)
        ] or None
        config.trainable_token_indices = None  # of the embeddings, which stay the base's
        try:
            model = PeftModel(holder, config)
            outcome: Any = set_peft_model_state_dict(model, mine)
            if outcome.unexpected_keys:
                raise ValueError(f"PEFT does not know tensor {outcome.unexpected_keys[0]}")
            merged = model.merge_and_unload()
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:  # whatever PEFT objects to
            raise UserError(f"{self.where}: PEFT cannot merge this adapter into {path}: {error}") from error
        return {name: tensor.detach() for name, tensor in merged.get_submodule(path).state_dict().items()}
