"""A healed plan's weights: trained once (gptailor/heal/), written into a plain folder, and found again by their digest.

Training gives other bits on another machine, so a healed plan names the weights that came of it and not only how. They
stay in the folder that the heal wrote; the run remembers where that is. What has another digest there is refused.
Layers of different widths are padded with zeros in that folder, behind their own rows and columns: those are cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.structure import layer_list, with_tensors
from gptailor.stitch.edits.case import EditCase, Shapes
from gptailor.store.folder import write_atomically

Tensors = Mapping[str, torch.Tensor]


def healed(case: EditCase) -> list[nn.Module]:
    """The plan's layers with the weights that a heal gave them. Raises UserError where those are not there."""
    shapes = [{name: tensor.shape for name, tensor in layer.state_dict().items()} for layer in case.layers]
    states = case.stitcher.healed(str(case.parameter("weights")), shapes)
    if len(states) != len(case.layers):
        raise UserError(f"edits: the healed weights are of {len(states)} layers, the plan keeps {len(case.layers)}")
    twins = []
    for layer, state in zip(case.layers, states, strict=True):
        device = next(layer.parameters()).device
        twins.append(with_tensors(layer, {name: tensor.to(device) for name, tensor in state.items()}))
    return twins


class HealedFolders:
    """Finds healed weights by their digest: in this process's memory, or in the folders that a run remembers."""

    def __init__(self, run: Path | None = None) -> None:
        """run: the run's folder; None: nothing is remembered."""
        self._run = run
        self.known: dict[str, Sequence[Tensors]] = {}

    def __call__(self, digest: str, shapes: Shapes) -> Sequence[Tensors]:
        """The layers' tensors, on the host. shapes: what the plan's layers have. Raises UserError."""
        if digest not in self.known:
            self.known = {digest: self._read(digest, shapes)}  # one at a time: they are as large as the model
        return self.known[digest]

    def remember(self, digest: str, folder: Path) -> None:
        """Note in the run's folder where the weights are."""
        assert self._run is not None
        self._note(digest).parent.mkdir(exist_ok=True)
        write_atomically(self._note(digest), json.dumps({"folder": str(folder.resolve())}))

    def _note(self, digest: str) -> Path:
        assert self._run is not None
        if not digest.isalnum():
            raise UserError(f"edits: {digest[:40]!r} is no digest of weights")
        return self._run / "healed" / f"{digest}.json"

    def _read(self, digest: str, shapes: Shapes) -> Sequence[Tensors]:
        folder = self.folder(digest)
        states = [_without_padding(*pair) for pair in zip(layer_tensors(_open(folder)), shapes, strict=False)]
        if digest_of(states) != digest:
            raise UserError(f"edits: {folder} holds other weights than those that the plan was healed to ({digest})")
        return states

    def folder(self, digest: str) -> Path:
        """Where the weights are. Raises UserError where nobody knows, or they are gone."""
        try:
            if self._run is None:
                raise OSError
            folder = Path(json.loads(self._note(digest).read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"edits: it is not known where the healed weights {digest} are; heal the plan anew"
            ) from None
        if not folder.is_dir():
            raise UserError(f"edits: the healed model is not in {folder} any more; put it back, or heal the plan anew")
        return folder


def _open(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise UserError(f"edits: {folder} is no healed model: {error}") from error
    return opened


def layer_tensors(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """The tensors of each of a model's layers, by their names in it."""
    return [dict(layer.state_dict()) for layer in layer_list(model)]


def _without_padding(state: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """What was there before the zeros were put behind it."""
    return {
        name: tensor[tuple(slice(n) for n, _ in zip(shapes.get(name, tensor.shape), tensor.shape, strict=False))]
        for name, tensor in state.items()
    }


def digest_of(states: Sequence[Tensors]) -> str:
    """Equal tensors, and only they, have equal digests."""
    found = hashlib.sha256()
    for place, state in enumerate(states):
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            found.update(f"{place} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:20]
