"""A look into weight files without reading them whole: numbers that are none, and how far two models are apart.

A file that went wrong is wrong in whole tensors or pages of them, and two models that have nothing in common differ
everywhere: a few pages of each tensor tell, in a fraction of a second for 7 billion parameters. Small files are read
whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from gptailor.family.checkpoint import Checkpoint, TensorInfo
from gptailor.family.skeleton import DTYPES

WHOLE = 128 << 20
"""Bytes of a model up to which it is read whole."""
PAGE = 1 << 14
N_PAGES = 2
N_COMPARED = 24
"""Matrices whose distance is taken, spread over the layers."""


def first_non_finite(checkpoint: Checkpoint) -> str | None:
    """The first tensor with a NaN or an infinity in what is looked at; None where there is none, or no file here."""
    if checkpoint.folder is None:
        return None
    whole = sum(info.end - info.begin for info in checkpoint.tensors.values()) <= WHOLE
    for name, info in checkpoint.tensors.items():
        for page in _pages(checkpoint.folder, info, whole):
            if not bool(torch.isfinite(page).all()):
                return name
    return None


def distance(candidate: Checkpoint, base: Checkpoint) -> float | None:
    """How far the candidate's layers are from the base's, relative to the base's own size: 0 is equal.

    None where no files are here or the layers have no matrices in common.
    """
    if candidate.folder is None or base.folder is None or candidate.is_adapter:
        return None
    mine, its = base.inner_tensors, candidate.inner_tensors
    names = [n for n, info in mine.items() if len(info.shape) > 1 and n in its and its[n].shape == info.shape]
    total = own = 0.0
    for name in names[:: max(1, len(names) // N_COMPARED)]:
        if its[name].dtype != mine[name].dtype:
            continue
        pairs = zip(_pages(base.folder, mine[name], False), _pages(candidate.folder, its[name], False), strict=True)
        for a, b in pairs:
            total += float((a.double() - b.double()).square().sum())
            own += float(a.double().square().sum())
    return math.sqrt(total / own) if own > 0 and math.isfinite(total) else None


def _pages(folder: Path, info: TensorInfo, whole: bool) -> Iterator[torch.Tensor]:
    """Some of a floating-point tensor's numbers: all, or pages at its beginning and its end."""
    dtype = DTYPES.get(info.dtype)
    if dtype is None or not dtype.is_floating_point or info.end <= info.begin:
        return
    size = info.end - info.begin
    starts = [0] if whole or size <= PAGE * N_PAGES else [0, (size - PAGE) // 16 * 16]
    length = size if len(starts) == 1 else PAGE
    with (folder / info.file).open("rb") as file:
        for start in starts:
            file.seek(info.begin + start)
            data = bytearray(file.read(length))
            if len(data) >= dtype.itemsize:
                yield torch.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype=dtype)
