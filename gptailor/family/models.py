"""The family in memory: the base as a live model, the candidates as layers, equal tensors held once.

Weight files are mapped, not read: on a CPU a tensor costs memory when it is first used, and a candidate's tensor whose
bytes equal the base's is replaced by the base's before it is ever mapped. Of candidates, layers alone are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from gptailor.errors import UserError
from gptailor.family.adapters import Adapter
from gptailor.family.checkpoint import Checkpoint, TensorInfo, Unreadable, is_built_in
from gptailor.family.preflight import FLOATS, Inspection, Preflight, inspect_family
from gptailor.family.proof import prove
from gptailor.family.renumbering import Renumbering
from gptailor.family.repointing import Repointing
from gptailor.family.residence import Visitors, n_bytes, pick_devices, rooms_for, settle, tensors_of
from gptailor.family.skeleton import configuration_of
from gptailor.family.spread import home_of
from gptailor.family.structure import (
    find_layers,
    find_output_projections,
    layer_list,
    with_tensors,
)
from gptailor.plan import BASE
from gptailor.spec.run import RunSpec

CHUNK = 1 << 20
SMALL = 1 << 26
"""Parameters of a base up to which a check opens it; the search tries larger ones when it opens them."""


@dataclass(frozen=True)
class Reader:
    """What reads a family's texts, without its weights."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    preflight: Preflight


class Family:
    """A base model and its candidates, opened.

    model: the base, live, in evaluation mode; stitching re-points its layer list. device: where it takes tokens and
    gives logits; its layers may live on others too. names: the candidates, in the run file's order. layers_path:
    qualified name of the layer list in the model. per_layer_lists: the configuration's lists with an entry for each
    layer of the base. other_parameters: of what is no layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Mapping[str, list[nn.Module]],
        preflight: Preflight,
        renumbering: Renumbering,
        device: torch.device,
        spec: RunSpec,
        labels: Mapping[str, str],
        visitors: Mapping[torch.device, Visitors] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.preflight = preflight
        self.renumbering = renumbering
        self.device = device
        self.spec = spec
        self.dtype: torch.dtype = model.dtype
        self.layers_path = find_layers(model)
        self._layers = {BASE: list(layer_list(model)), **candidates}
        self._visitors = visitors or {}
        self._homes = [home_of(layer) for layer in self._layers[BASE]]
        self._labels = dict(labels)
        self._projections: tuple[str, str] | None = None
        self.live = Repointing(model, renumbering)
        self.per_layer_lists = renumbering.per_layer_lists
        self.layer_parameters = tuple(sum(p.numel() for p in layer.parameters()) for layer in self._layers[BASE])
        self.other_parameters = sum(p.numel() for p in model.parameters()) - sum(self.layer_parameters)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._layers if name != BASE)

    @property
    def n_layers(self) -> int:
        return len(self._layers[BASE])

    @property
    def inner_size(self) -> int:
        """Width of the MLP, where the configuration says it; else what is usual."""
        config = self.model.config.get_text_config()
        said = getattr(config, "intermediate_size", 0)
        widest = max(said, default=0) if isinstance(said, Sequence) else said  # Gemma 3n: one a layer
        return int(widest or 4 * config.hidden_size)

    @property
    def folder(self) -> Path:
        """The base's own folder on this machine, a downloaded one's included."""
        return Path(self.tokenizer.name_or_path)

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer, self.model.config, self.preflight)

    def layer(self, index: int, source: str = BASE) -> nn.Module:
        """One layer of the base or of a candidate, on the device of the base's.

        Its tensors are the family's own: do not write. Raises UserError for a source that is not in the family.
        """
        try:
            home = self._layers[source][index]
        except KeyError:
            raise UserError(f"{source!r} is not in this family; it has {', '.join(self._layers)}") from None
        device = self._homes[index]
        if device not in self._visitors or all(tensor.device == device for tensor in home.parameters()):
            return home
        return self._visitors[device].get((source, index), home)

    def label(self, name: str) -> str:
        """What a model is called elsewhere: its hub id, or the name of its folder."""
        return self._labels[name]

    @property
    def output_projections(self) -> tuple[str, str]:
        """Names, inside a layer, of the two modules that an output scale multiplies. Raises UserError."""
        return self.projections_for("output_scale")

    def projections_for(self, asked: str) -> tuple[str, str]:
        """Names, inside a layer, of the last linear maps of its attention and of its MLP.

        They write into the residual stream. Raises UserError, which tells to leave out what was asked.
        """
        if self._projections is None:
            self._projections = find_output_projections(self.model, asked)
        return self._projections

    @property
    def distinct_bytes(self) -> int:
        """Bytes of all different tensors: what shared memory cannot make smaller."""
        lists = [layer for layers in self._layers.values() for layer in layers]
        return n_bytes([*self.model.state_dict().values(), *tensors_of(lists)])


def open_reader(spec: RunSpec) -> Reader:
    """The base's tokenizer and configuration. Raises UserError as open_family does."""
    found = inspect_family(spec, download=True)
    base = found.checkpoints[BASE]
    return Reader(_open_tokenizer(base, spec.trust_remote_code), found.skeleton.config, found.preflight)


def open_family(spec: RunSpec) -> Family:
    """Open base and candidates of a run (see `preflight` for what is refused). Raises UserError."""
    found = inspect_family(spec, download=True)
    with without_progress_bars():
        return _open(spec, found)


def _open(spec: RunSpec, found: Inspection) -> Family:
    devices = pick_devices(spec.device)
    checkpoints, preflight = found.checkpoints, found.preflight
    base = checkpoints[BASE]
    tokenizer = _open_tokenizer(base, spec.trust_remote_code)
    model = open_base(base, getattr(torch, preflight.dtype), spec.trust_remote_code)
    candidates = {
        name: _adapted_layers(model, base, checkpoint)
        if checkpoint.is_adapter
        else _full_layers(model, base, checkpoint)
        for name, checkpoint in checkpoints.items()
        if name != BASE
    }
    visitors = None
    if devices[0].type != "cpu":
        visitors = settle(model, candidates, rooms_for(n_bytes(tensors_of([model])), devices))
    prove(model, found.renumbering, preflight.n_removed or 1)
    labels = {name: checkpoint.label for name, checkpoint in checkpoints.items()}
    family = Family(model, tokenizer, candidates, preflight, found.renumbering, devices[0], spec, labels, visitors)
    if spec.output_scale is not None:
        _ = family.output_projections  # refused now, not in the first trial
    if spec.repairs is not None:
        family.projections_for("repair")  # and not after the last one
    return family


def prove_small(spec: RunSpec) -> Preflight:
    """preflight, and the proof on the base's own weights where they are here and few: what the search would refuse.

    Raises UserError.
    """
    return try_family(spec)[0]


def try_family(spec: RunSpec) -> tuple[Preflight, Reader | None]:
    """prove_small, and what reads the family's texts; None where the base is not on this machine. Raises UserError."""
    found = inspect_family(spec)
    base = found.checkpoints[BASE]
    if base.folder is None:
        return found.preflight, None
    _prove_few(spec, found)
    tokenizer = _open_tokenizer(base, spec.trust_remote_code)
    return found.preflight, Reader(tokenizer, found.skeleton.config, found.preflight)


def _prove_few(spec: RunSpec, found: Inspection) -> None:
    """The proof, where the base's weights are few. Raises UserError."""
    base, n_removed = found.checkpoints[BASE], found.preflight.n_removed or 1
    if found.preflight.n_parameters > SMALL:
        return
    with without_progress_bars():
        model = open_base(base, getattr(torch, found.preflight.dtype), spec.trust_remote_code)
        try:
            prove(model, found.renumbering, n_removed)
        except UserError as error:
            raise UserError(f"the models do not fit together: 1 problem\nbase_model: {error}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """A mapped file is loaded in no time, and the terminal belongs to the command line."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _open_tokenizer(base: Checkpoint, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(base.folder), trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        # transformers has no error of its own for a folder that it cannot make a tokenizer of
        raise UserError(f"base_model: transformers cannot open {base.label}'s tokenizer: {error}") from error


def open_base(base: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base's live model, on the host. Raises UserError."""
    assert base.folder is not None
    trusted = trust_remote_code and not is_built_in(base.config)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            str(base.folder),
            config=configuration_of(base.config, base.folder, trust_remote_code),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trusted,
        )
    except (Unreadable, ValueError, OSError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        # transformers has no error of its own for a folder that it cannot make a model of
        raise UserError(f"base_model: transformers cannot open {base.label}: {error}") from error
    model, info = opened
    _complain("base_model", info)
    return model.eval().requires_grad_(False)


def _complain(where: str, info: Mapping[str, Any]) -> None:
    """Raise UserError where weights that the model needs were not in the file."""
    missing = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors of the model are not in its files, the first is {missing[0]}")


def _full_layers(model: PreTrainedModel, base: Checkpoint, checkpoint: Checkpoint) -> list[nn.Module]:
    """A full model's layers as twins of the base's, mapped from its files; what equals the base is the base's.

    transformers itself turns file tensors into parameters (architectures may rename, split or stack them). All that is
    no layer is handed in from the base, so that nothing is initialised or opened for it.
    """
    path = find_layers(model)
    own = model.state_dict()
    state = {name: tensor for name, tensor in own.items() if not name.startswith(f"{path}.")}
    for inner, tensor in _mapped_layers(checkpoint):
        name = f"{path}.{inner}"
        same = name in own and _equal_bytes(checkpoint, base, inner)
        state[name] = own[name] if same else tensor
    opened: Any = type(model).from_pretrained(
        None, config=model.config, state_dict=state, dtype=model.dtype, output_loading_info=True
    )
    shell, info = opened
    _complain(checkpoint.where, info)
    return [
        with_tensors(mine, _own(its.state_dict(), mine.state_dict()))
        for mine, its in zip(layer_list(model), layer_list(shell), strict=True)
    ]


def _own(its: Mapping[str, torch.Tensor], mine: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`its` tensors, where different from `mine`."""
    return {name: tensor for name, tensor in its.items() if not _same(tensor, mine[name])}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values; different tensors are told apart by their beginnings, without mapping the rest into memory."""
    head = slice(0, 512)
    return a.data_ptr() == b.data_ptr() or (torch.equal(a.view(-1)[head], b.view(-1)[head]) and torch.equal(a, b))


def _adapted_layers(model: PreTrainedModel, base: Checkpoint, checkpoint: Checkpoint) -> list[nn.Module]:
    """The base's layers with a LoRA adapter merged in: the stored weights in float32, then the run's type."""
    adapter, path = Adapter(checkpoint), find_layers(model)
    run_dtype = str(model.dtype).removeprefix("torch.")
    as_stored = all(FLOATS.get(info.dtype) == run_dtype for info in base.tensors.values())
    stored = {} if as_stored else dict(_mapped_layers(base))
    adapted = []
    for index, layer in enumerate(layer_list(model)):
        mine = layer.state_dict()
        originals = {name: stored.get(f"{index}.{name}", tensor) for name, tensor in mine.items()}
        # Copies, as PEFT merges in place: in a float32 run these would be the base's own tensors.
        exact = {name: tensor.to(torch.float32, copy=True) for name, tensor in originals.items()}
        merged = adapter.merge_into(with_tensors(layer, exact), f"{path}.{index}") or {}
        state = {name: tensor.to(mine[name].dtype) for name, tensor in merged.items()}
        adapted.append(with_tensors(layer, _own(state, mine)))
    return adapted


def _mapped_layers(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Name (the layer's number and what follows) and mapped tensor of everything that belongs to a layer."""
    assert checkpoint.folder is not None
    files: dict[str, list[str]] = {}
    for inner, info in checkpoint.inner_tensors.items():
        files.setdefault(info.file, []).append(inner)
    for file, names in files.items():
        with safe_open(checkpoint.folder / file, framework="pt") as opened:
            for inner in names:
                yield inner, opened.get_tensor(f"{checkpoint.layer_prefix}{inner}")


def _equal_bytes(mine: Checkpoint, other: Checkpoint, inner: str) -> bool:
    """Is a layer's tensor the same, bit for bit, in two checkpoints?

    Read from the files, so that nothing is mapped for it; different tensors differ in their first bytes, so it is cheap
    to find out.
    """
    a, b = mine.inner_tensors[inner], other.inner_tensors.get(inner)
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with _at(mine, a) as first, _at(other, b) as second:
        left = a.end - a.begin
        step = 4096
        while left > 0:
            step = min(step, left)
            if first.read(step) != second.read(step):
                return False
            left -= step
            step = CHUNK
    return True


def _at(checkpoint: Checkpoint, info: TensorInfo) -> FileIO:
    assert checkpoint.folder is not None
    file = FileIO(checkpoint.folder / info.file)
    file.seek(info.begin)
    return file
