"""A shortened model is tried before anybody relies on it: does it compute what its layers computed in the base?

The comparison of modules and settings (renumbering.py) cannot see what a forward pass does with a layer's number, with
weights that layers share, or with tokens to come. So a few plans are stitched, on the base's own weights, and must
give what the base gives when the removed layers hand on what they are given; a model read from the written
configuration must give the same, with a cache as well; and a token must not change what was said before it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.renumbering import Renumbering
from gptailor.family.repointing import Repointing, passing_through
from gptailor.family.skeleton import quiet, reason_of
from gptailor.family.spread import is_spread
from gptailor.family.structure import layer_list

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUGH = 5e-2
"""Largest difference of logits, relative to the largest: the same numbers in another order, or in half precision."""
MANY = 10**9
"""Parameters from which one plan has to do."""
N_TOKENS = 10


_PROVEN: set[str] = set()


def prove(model: PreTrainedModel, renumbering: Renumbering, n_removed: int) -> None:
    """Raise UserError, naming the architecture, where a shortened model is not what its layers are.

    model: the base, live, with all of its layers; it is left as it was. What was proven of a configuration holds for
    other weights.
    """
    name, layers = type(model).__name__, list(layer_list(model))
    try:
        dense = _logits(model)
    except Exception as error:  # one that reads more than tokens, say
        raise UserError(f"{name} does not run on tokens alone: {reason_of(error)}") from error
    _refuse_non_finite(model, dense)
    known = f"{model.config.to_json_string()} {n_removed} {model.dtype}"
    if known in _PROVEN:
        return
    try:
        if _apart(_logits(model, change_last=True)[:, :-1], dense[:, :-1]) > _tolerance(model):
            raise UserError(f"{name} looks at tokens to come: it is an encoder, and no text can be scored with it")
        _refuse_mute(model)
        caches = _cached_logits(model) is not None
        live = Repointing(model, renumbering)
        try:
            for gone in _plans(renumbering, n_removed, 1 if model.num_parameters() > MANY else 2):
                problem = _problem(live, layers, gone, caches)
                if problem is not None:
                    raise UserError(f"{name} without layers {', '.join(map(str, gone))} {problem}")
        finally:
            live.show(layers, range(len(layers)))
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises when it is shortened
        raise UserError(f"{name} does not run when layers are removed: {reason_of(error)}") from error
    _PROVEN.add(known)


def _problem(live: Repointing, layers: Sequence[nn.Module], gone: Sequence[int], caches: bool) -> str | None:
    """What is wrong with the model less some layers; None if nothing is. caches: whether the dense one keeps one."""
    model, kept = live.model, [layer for layer in range(len(layers)) if layer not in gone]
    with passing_through([layers[layer] for layer in gone]):
        expected = _logits(live.show(layers, range(len(layers))))
    shorter = live.show([layers[layer] for layer in kept], kept)
    found = _logits(shorter)
    if _apart(found, expected) > _tolerance(model):
        return "is not what its other layers computed in the base: they depend on their number, or on each other"
    with_cache = _cached_logits(shorter) if caches else None
    if caches and with_cache is None:
        return "cannot keep a cache, so that it cannot generate"
    if is_spread(model):
        return None  # made again, it would not fit on one device
    rebuilt = _rebuilt(shorter)
    theirs = _cached_logits(rebuilt) if with_cache is not None else None
    same_cache = with_cache is None or (theirs is not None and _apart(with_cache, theirs) <= ROUGH)
    if _apart(_logits(rebuilt), found) > _tolerance(model) or not same_cache:
        return "cannot be written as a configuration: read again, it computes something else"
    return None


def _plans(renumbering: Renumbering, n_removed: int, n: int) -> list[list[int]]:
    """Sets of layers to remove: n_removed drawn ones, then every other layer."""
    rng = random.Random(1)
    free = [layer for layer in range(renumbering.n_layers) if layer not in renumbering.fixed]
    size = min(max(n_removed, 1), len(free) - 1)
    if size < 1:
        return []
    return [sorted(rng.sample(free, size)), free[:-1:2]][:n]


@torch.inference_mode()
def _logits(model: PreTrainedModel, change_last: bool = False) -> torch.Tensor:
    ids = _ids(model)
    if change_last:
        ids[:, -1] = (ids[:, -1] + 1) % model.config.get_text_config().vocab_size
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    return logits


def _ids(model: PreTrainedModel) -> torch.Tensor:
    """Tokens over the vocabulary, the first ones left out: padding and other marks."""
    size = model.config.get_text_config().vocab_size
    low = min(16, size // 2)
    return (torch.arange(N_TOKENS, device=model.device) * 7919 % (size - low) + low)[None]


@torch.inference_mode()
def _cached_logits(model: PreTrainedModel) -> torch.Tensor | None:
    """Logits of the last two tokens, each given after a cache of those before it; None where that cannot be done."""
    ids, caller = _ids(model), cast(Any, model)
    try:
        with quiet():  # versions of transformers differ in the argument's name
            first = caller(input_ids=ids[:, :-2], use_cache=True)
            second = caller(input_ids=ids[:, -2:-1], past_key_values=first.past_key_values, use_cache=True)
            third = caller(input_ids=ids[:, -1:], past_key_values=second.past_key_values, use_cache=True)
    except Exception:  # no such argument, no cache, or one that cannot be used like this
        return None
    return torch.cat([second.logits, third.logits], dim=1).float().cpu()


@torch.inference_mode()
def _refuse_mute(model: PreTrainedModel) -> None:
    """Raise UserError where the dense model, as transformers has it, cannot write a word."""
    ids, caller = _ids(model), cast(Any, model)
    try:
        with quiet():
            caller.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    except Exception as error:  # whatever a model's own code raises
        raise UserError(f"{type(model).__name__} cannot generate: {reason_of(error)}") from error


@torch.inference_mode()
def _rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """The model as anybody makes it of its configuration and its tensors."""
    where: dict[str, Any] = {} if model.device.type == "cpu" else {"device_map": {"": model.device}}
    with quiet():
        made: PreTrainedModel = type(model).from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=dict(model.state_dict()), dtype=model.dtype, **where
        )
    return made.eval()


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return difference if difference == difference else float("inf")


def _tolerance(model: PreTrainedModel) -> float:
    return TOLERANCE.get(model.dtype, ROUGH)


def _refuse_non_finite(model: PreTrainedModel, logits: torch.Tensor) -> None:
    if bool(torch.isfinite(logits).all()):
        return
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"base_model: tensor {name} holds NaN or infinite values")
    raise UserError(
        f"base_model: {type(model).__name__} gives NaN in {str(model.dtype).removeprefix('torch.')}; "
        "try another dtype, such as float32"
    )
