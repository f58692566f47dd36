"""Layers of different widths in a form that knows one width: plain transformers, and whatever reads its folders.

Widths that are the same in every layer are said in the configuration. Where they differ, narrower layers get heads and
channels of zeros up to the widest layer: a head whose rows of q, k, v and columns of o are zero, and a channel whose
rows of gate and up and columns of down are, add nothing. So that is exact, and saves what the widest layer saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.structure import with_tensors
from gptailor.plan import StitchPlan
from gptailor.stitch.edits.registry import EDITS, keeps_shapes
from gptailor.stitch.edits.width import Widths
from gptailor.stitch.stitcher import Stitcher

CHANNELS, HEADS, GROUPS, HEAD_DIM = "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"


@contextmanager
def in_one_width(stitcher: Stitcher, plan: StitchPlan) -> Iterator[tuple[PreTrainedModel, tuple[str, ...]]]:
    """The plan's model, with one width for all layers while it lasts, and a sentence for each thing worth knowing.

    Raises UserError where the model's configuration cannot say the width.
    """
    model = stitcher.stitch(plan)
    if all(map(keeps_shapes, plan.edits)):
        yield model, _zeros(stitcher, plan)
        return
    layers, config = stitcher.layers(plan), model.config.get_text_config()
    each = [Widths.of(layer, "export", type(model).__name__) for layer in layers]
    groups, channels = max(its.groups for its in each), max(its.channels for its in each)
    wanted = {CHANNELS: channels, HEADS: groups * each[0].heads, GROUPS: groups, HEAD_DIM: each[0].head_dim}
    if unknown := [key for key in (CHANNELS, HEADS) if not isinstance(getattr(config, key, None), int)]:
        raise UserError(
            f"export: the configuration of {type(model).__name__} has no {' and no '.join(unknown)}, so that it cannot "
            "say how wide the layers are; nothing that others could load can be written"
        )
    before = {key: getattr(config, key, None) for key in wanted}
    even = [_padded(layer, its, groups, channels) for layer, its in zip(layers, each, strict=True)]
    try:
        for key, value in wanted.items():
            setattr(config, key, value)
        yield stitcher.point(plan, even), _padding(stitcher, plan, even, wanted)
    finally:
        for key, old in before.items():
            setattr(config, key, old)
            if old is None:
                delattr(config, key)
        stitcher.point(plan, layers)


def _padded(layer: nn.Module, its: Widths, groups: int, channels: int) -> nn.Module:
    """A twin of the layer with zeros up to these widths; the layer itself where it has them."""
    more_groups, more_channels = groups - its.groups, channels - its.channels
    rows = dict.fromkeys(("gate_proj", "up_proj"), more_channels)
    rows |= dict.fromkeys(("k_proj", "v_proj"), more_groups * its.head_dim)
    rows["q_proj"] = more_groups * its.heads * its.head_dim
    columns = {"o_proj": rows["q_proj"], "down_proj": more_channels}
    tensors: dict[str, torch.Tensor] = {}
    for name, more in rows.items():
        for key, value in layer.get_submodule(its.paths[name]).named_parameters(recurse=False):
            if more:
                padding = (0, 0, 0, more) if value.ndim == 2 else (0, more)
                tensors[f"{its.paths[name]}.{key}"] = F.pad(value.detach(), padding)
    for name, more in columns.items():
        if more:
            weight = layer.get_submodule(its.paths[name]).get_parameter("weight")
            tensors[f"{its.paths[name]}.weight"] = F.pad(weight.detach(), (0, more))
    return with_tensors(layer, tensors) if tensors else layer


def _padding(stitcher: Stitcher, plan: StitchPlan, even: list[nn.Module], wanted: dict[str, int]) -> tuple[str, ...]:
    """What is to be said of a model whose layers were made one width."""
    own = stitcher.n_parameters(plan)
    written = stitcher.family.other_parameters + sum(p.numel() for layer in even for p in layer.parameters())
    if written == own:
        return ()
    return (
        f"Its layers have different widths, which plain transformers does not know: narrower ones are padded with "
        f"zeros to {wanted[HEADS]} heads and {wanted[CHANNELS]} channels. It computes the same and holds "
        f"{written:,} parameters instead of {own:,}.",
    )


def _zeros(stitcher: Stitcher, plan: StitchPlan) -> tuple[str, ...]:
    """What is to be said of a model with zeros in its weights."""
    if not any(EDITS[edit.method].leaves_out for edit in plan.edits):
        return ()
    tensors = [p for layer in stitcher.layers(plan) for p in layer.parameters()]
    share = sum(int((p == 0).sum()) for p in tensors) / sum(p.numel() for p in tensors)
    return (
        f"{share:.1%} of its layers' weights are zeros. It is as large as without them, and no faster where zeros are "
        "multiplied as other numbers are.",
    )
