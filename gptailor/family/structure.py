"""How a transformers model is built, found by looking instead of by a table of names.

Its layers, the configuration's per-layer lists, the two output projections of a layer.

What cannot be renumbered safely is refused here by name, because a stitched model that silently computes something
else than its exported folder would be worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptailor.errors import UserError
from gptailor.family.checkpoint import NOT_TEXT

NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "token_index")


def find_layers(model: PreTrainedModel) -> str:
    """Qualified name of the one nn.ModuleList that holds the layers, e.g. 'model.layers'. Raises UserError."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(n_layers, int):
        raise UserError(f"{type(model).__name__}: its configuration does not say how many layers there are")
    decoder: Any = model.get_decoder()  # a vision tower may have as many layers
    outer = _lists_of(model, decoder, n_layers) or _lists_of(model, model, n_layers)
    if len(outer) != 1:
        found = f"{len(outer)} lists of {n_layers} modules {outer}" if outer else f"no list of {n_layers} modules"
        raise UserError(
            f"{type(model).__name__} has {found}; only architectures whose layers form one list can be stitched"
        )
    return outer[0]


def _lists_of(model: nn.Module, part: nn.Module, length: int) -> list[str]:
    """Qualified names of the outermost lists of so many modules in a part of the model."""
    start = next(name for name, module in model.named_modules() if module is part)
    inside = [(f"{start}.{name}".strip("."), m) for name, m in part.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [name for name, m in inside if len(m) == length and not NOT_TEXT.search(name)]
    return [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]


def decoder_of(model: PreTrainedModel) -> Any:
    """What gives the states that the output head reads; transformers' get_decoder is something else in a few models."""
    decoder: Any = model.get_decoder()
    layers = layer_list(model)
    if decoder is not model and any(module is layers for module in decoder.modules()):
        return decoder
    return model.get_submodule(find_layers(model).rpartition(".")[0])


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The layers as the model runs them now. Raises UserError (see find_layers)."""
    found = model.get_submodule(find_layers(model))
    assert isinstance(found, nn.ModuleList)
    return found


def per_layer_lists(config: PreTrainedConfig) -> dict[str, tuple[Any, ...]]:
    """The configuration's lists with one entry a layer (layer_types, no_rope_layers, ...), by name."""
    n_layers = config.num_hidden_layers
    return {
        name: tuple(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == n_layers and not name.endswith(NOT_PER_LAYER)
    }


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> nn.Module:
    """A twin of `module` with its own parameters and buffers where `tensors` names them, the same ones elsewhere.

    Nothing is copied: submodules are new, their tensors, settings, configuration objects and hooks are shared (twins
    never stand in one model at the same time, and transformers' recording of hidden states relies on hooks that stay).
    """
    twin: nn.Module = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        name: nn.Parameter(tensors[prefix + name], requires_grad=False) if prefix + name in tensors else parameter
        for name, parameter in module._parameters.items()
    }
    twin._buffers = {name: tensors.get(prefix + name, buffer) for name, buffer in module._buffers.items()}
    twin._modules = {
        name: None if child is None else with_tensors(child, tensors, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return twin


def set_layer_index(layer: nn.Module, index: int, attributes: Mapping[tuple[str, str], int]) -> None:
    """Tell every part of a layer where it stands, so that it finds its keys and values in the cache.

    attributes: (path inside the layer, name) of what says so, with what it adds to the index.
    """
    for (path, name), offset in attributes.items():
        try:
            settings = layer.get_submodule(path).__dict__
        except AttributeError:
            continue  # of another kind of layer
        if isinstance(settings.get(name), int):
            settings[name] = index + offset


def find_output_projections(model: PreTrainedModel, asked: str = "output_scale") -> tuple[str, str]:
    """Names, inside a layer, of the last linear map of its attention and of its MLP.

    Raises UserError, which tells to leave out what was `asked`.

    Both must write into the residual stream directly: where the layer normalises their output again (Gemma 2 and 3),
    a scale on them would be normalised away.
    """
    name, layers = type(model).__name__, layer_list(model)
    layer = layers[0]
    hidden = model.config.get_text_config().hidden_size
    linear = [key for key, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    inside = [key for key in linear if "attn" in key.split(".")[0] or "attention" in key.split(".")[0]]
    outside = [key for key in linear if key not in inside]
    ends = (inside[-1:], outside[-1:])
    fused = any(parameter.ndim > 2 for one in layers for parameter in one.parameters())
    if fused or not all(ends) or any(_width_of(one, end[0]) != hidden for end in ends for one in layers):
        raise UserError(f"{asked}: the output projections of {name} are not known; leave {asked} out")
    projections = (inside[-1], outside[-1])
    if _normalised_away(model, layer, projections):
        raise UserError(
            f"{asked}: {name} normalises the outputs of its attention and MLP again, so that a scale on them has "
            f"no effect; leave {asked} out"
        )
    return projections


def _width_of(layer: nn.Module, name: str) -> int | None:
    """What the linear map of this name writes; None where the layer has none (experts behind dense first layers)."""
    module = dict(layer.named_modules()).get(name)
    if isinstance(module, Conv1D):
        return int(module.nf)
    return module.out_features if isinstance(module, nn.Linear) else None


def scaled(layer: nn.Module, projections: Sequence[str], factor: float) -> nn.Module:
    """A twin of the layer whose output projections, biases included, are multiplied; computed in float32."""
    tensors = {}
    for name in projections:
        for key, value in layer.get_submodule(name).named_parameters(recurse=False):
            tensors[f"{name}.{key}"] = (value.detach().float() * factor).to(value.dtype)
    return with_tensors(layer, tensors)


@torch.inference_mode()
def _normalised_away(model: PreTrainedModel, layer: nn.Module, projections: Sequence[str]) -> bool:
    """Run the layer on one token of the model, as it is and with halved projections; is there no difference?"""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        hook.remove()
    args, kwargs = calls[0]
    outputs = [variant(*args, **kwargs) for variant in (layer, scaled(layer, projections, 0.5))]
    whole, halved = (output.float() if torch.is_tensor(output) else output[0].float() for output in outputs)
    return bool((whole - halved).abs().max() <= 1e-3 * whole.abs().max())
