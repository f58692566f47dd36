"""How the configuration of a shorter model is written, and whether every kept layer is in it what it was.

A layer's kind stands in the configuration in many ways: a list with one entry a layer, a list of layer numbers, a count
of first or last layers, a pattern that repeats, overrides by number. Each is rewritten for the layers that stay; then
the model of the new configuration is built on the meta device and each of its layers compared with the one that it
stands for: classes, shapes, plain settings. What differs is not what the base computed, and is never stitched.

Where single layers cannot be spared (the last of Gemma 4 attends to everything, whatever the list says; layers whose
keys and values later ones read), they are fixed: every plan keeps them. Where too few could be removed, the family is
refused.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.skeleton import quiet, reason_of
from gptailor.family.structure import find_layers, per_layer_lists

NUMBERS = re.compile(r"layers?$|indices$|idxs?$|layer_ids$|layers_enum$")
"""Names of lists of layer numbers."""
FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "first_num_dense_layers",
    "moe_layer_start_index",
    "num_hash_layers",
)
LAST = ("num_kv_shared_layers",)
"""Names of counts: so many layers at the beginning, or at the end, are of another kind than the rest."""
END = ("moe_layer_end_index",)
ALIASES = ("num_blocks",)
"""Names of further counts of all layers."""
PATTERNS = ("block_types",)
"""Names of lists that repeat until there is an entry for every layer."""
SHARED = "shared"
ATTENTION = r"(?!linear).*attention"
IDLE = ("store_full_length_kv",)
"""Settings that tell a layer to leave something for later ones: without effect where none of those is left."""

PLAIN = (bool, int, float, str, type(None), FunctionType)
MAX_FIXED = 0.5
"""Share of the layers that may be fixed; beyond, the architecture counts as one that cannot be shortened."""


FEW = "the other layers have to stay"


class Renumbering:
    """Of one architecture, as its configuration has it.

    text: the base's configuration of the language model, dense, a copy. first: the number of the first layer in lists
    of layer numbers. fixed: layers that every plan keeps. indices: attributes by which a layer's parts know where they
    stand, with what they add to the layer's place. outside: settings of modules that are no layers and change with the
    plan. packed: tensors outside the layers that hold a part for each layer side by side, with the dimension.
    """

    def __init__(self, model: PreTrainedModel, first: int = 0) -> None:
        self.name = type(model).__name__
        self.first = first
        self.fixed: frozenset[int] = frozenset()
        self.outside: set[tuple[str, str]] = set()
        self.packed: dict[str, int] = {}
        self._class = type(model)
        self._path = find_layers(model)
        self._config = copy.deepcopy(model.config)
        self.text = self._config.get_text_config()
        self.n_layers: int = self.text.num_hidden_layers
        self.per_layer_lists = per_layer_lists(self.text)
        self.indices = _index_attributes(model.get_submodule(self._path))
        self.fixed = frozenset(_read_by_others(self.per_layer_lists.values()))

    @cached_property
    def _data(self) -> dict[str, Any]:
        return self.text.to_dict()

    @cached_property
    def _same(self) -> dict[str, Any]:
        """The dense configuration's attributes, read from its own file form as those of shorter ones are."""
        return vars(type(self.text).from_dict(copy.deepcopy(self._data)))

    def text_configuration(self, kept: Sequence[int]) -> PreTrainedConfig:
        """The language model's configuration with these layers of the base, ascending.

        transformers' validators raise errors of many classes where there can be no such model.
        """
        data = copy.deepcopy(self._data)
        data |= {key: self._shortened(key, value, kept) for key, value in data.items()}
        mapped = getattr(self.text, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        if mapped in data or not isinstance(getattr(type(self.text), "num_hidden_layers", None), property):
            data[mapped] = len(kept)
        data |= {key: len(kept) for key in ALIASES if data.get(key) == self.n_layers}
        self._spell_out(data, kept)
        return type(self.text).from_dict(data)

    def settings(self, kept: Sequence[int]) -> dict[str, Any]:
        """Attributes of the dense configuration that are others with these layers, with their values.

        None where a shorter one has none.
        """
        shorter = vars(self.text_configuration(kept))
        return {key: shorter.get(key) for key in {*shorter, *self._same} if shorter.get(key) != self._same.get(key)}

    def configuration(self, kept: Sequence[int]) -> PreTrainedConfig:
        """The same, with whatever else the model is made of."""
        text = self.text_configuration(kept)
        if self.text is self._config:
            return text
        whole = copy.deepcopy(self._config)
        name = next(key for key, value in vars(self._config).items() if value is self.text)
        whole.__dict__[name] = text
        return whole

    def skeleton(self, kept: Sequence[int]) -> PreTrainedModel:
        """The shorter model on the meta device."""
        with quiet(), torch.device("meta"):
            made: PreTrainedModel = self._class._from_config(self.configuration(kept))
        return made.eval()

    def _shortened(self, key: str, value: Any, kept: Sequence[int]) -> Any:
        """One entry of the configuration as it stands in the shorter model's."""
        if key == "per_layer_config" and isinstance(value, Mapping):
            own = {int(layer): overrides for layer, overrides in value.items()}
            return {place: own[layer] for place, layer in enumerate(kept) if layer in own}
        if key in FIRST and isinstance(value, int):
            return sum(layer < value for layer in kept)
        if key in LAST and isinstance(value, int):
            return sum(layer >= self.n_layers - value for layer in kept)
        if key in END and isinstance(value, int) and value >= 0:
            return sum(layer <= value for layer in kept) - 1
        if key in PATTERNS and isinstance(value, list | tuple):
            return [value[layer % len(value)] for layer in kept]
        if self._lists_numbers(key, value):
            return [place + self.first for place, layer in enumerate(kept) if layer + self.first in value]
        if key in self.per_layer_lists or (key == "layers_block_type" and _entries(value) == self.n_layers):
            return [value[layer] for layer in kept]
        return value

    def _lists_numbers(self, key: str, value: Any) -> bool:
        """Whether an entry lists layers by number: ascending, each once."""
        return (
            bool(NUMBERS.search(key))
            and isinstance(value, list | tuple)
            and all(isinstance(number, int) and not isinstance(number, bool) for number in value)
            and all(self.first <= number < self.n_layers + self.first for number in value)
            and list(value) == sorted(set(value))
        )

    @cached_property
    def shares(self) -> bool:
        """Whether layers at the end read what earlier ones leave for them."""
        return any(bool(self._data.get(key)) for key in LAST)

    @property
    def lists_numbers(self) -> bool:
        return any(bool(value) and self._lists_numbers(key, value) for key, value in self._data.items())

    def _spell_out(self, data: dict[str, Any], kept: Sequence[int]) -> None:
        """Rules that count layers, written as the lists that the same configuration knows."""
        step = data.get("decoder_sparse_step")
        if "mlp_only_layers" in data and isinstance(step, int) and step > 1:
            named = set(self._data["mlp_only_layers"] or ())
            dense = [layer in named or (layer + 1) % step != 0 for layer in kept]
            data |= {"decoder_sparse_step": 1, "mlp_only_layers": [p for p, is_dense in enumerate(dense) if is_dense]}
        if "attention_types" in data and _entries(data.get("attention_layers")) == len(kept):  # GPT-Neo
            data["attention_types"] = [[list(data["attention_layers"]), 1]]

    def problem(self, kept: Sequence[int], dense: PreTrainedModel) -> str | None:
        """Why these layers of the base cannot be a model; None if they can. dense: the base's skeleton."""
        try:
            shorter = self.skeleton(kept)
        except Exception as error:  # whatever a configuration or a constructor objects to
            return f"transformers says: {reason_of(error)}"
        if len(_list(shorter, self._path)) != len(kept):
            return f"its {self._path} would have another length than its configuration says"
        for place, layer in enumerate(kept):
            mine, its = _list(dense, self._path)[layer], _list(shorter, self._path)[place]
            found = self._difference(mine, its, kept)
            if found is not None:
                return f"layer {layer} would be another one at place {place} ({found})"
        return self._outside_problem(dense, shorter, len(kept))

    def _difference(self, mine: nn.Module, its: nn.Module, kept: Sequence[int]) -> str | None:
        """What of a layer differs between two models: a module, a shape or a setting; None if nothing does.

        A list of all layers' kinds may be that of the kept ones.
        """
        a, b = dict(mine.named_modules()), dict(its.named_modules())
        if a.keys() != b.keys():
            return f"module {min(a.keys() ^ b.keys())}"
        for path, module in a.items():
            other = b[path]
            if type(module) is not type(other):
                return f"{path or 'it'} is a {type(module).__name__}, then a {type(other).__name__}"
            shapes, others = _shapes(module), _shapes(other)
            if shapes != others:
                name = min(key for key in {*shapes, *others} if shapes.get(key) != others.get(key))
                return (
                    f"tensor {f'{path}.{name}'.lstrip('.')} {_said(shapes.get(name))}, then {_said(others.get(name))}"
                )
            values, theirs = _settings(module), _settings(other)
            for name in sorted({*values, *theirs}):
                value, its_value = values.get(name), theirs.get(name)
                idle = name in IDLE and (not self.shares or (value and not its_value))
                same = value == its_value or _shortened_list(value, kept) == its_value
                if not (idle or same or (path, name) in self.indices):
                    return f"{f'{path}.{name}'.lstrip('.')} {_said(value)}, then {_said(its_value)}"
        return None

    def _outside_problem(self, dense: nn.Module, shorter: nn.Module, n_kept: int) -> str | None:
        """Compare what is no layer, and remember what changes with the plan."""
        mine, its = (
            {name: m for name, m in model.named_modules() if not f"{name}.".startswith(f"{self._path}.")}
            for model in (dense, shorter)
        )
        if mine.keys() != its.keys():
            name = min(mine.keys() ^ its.keys())
            return f"module {name} belongs to single layers"
        for path, module in mine.items():
            for name, tensor in module._parameters.items():
                other = its[path]._parameters.get(name)
                if tensor is not None and (other is None or other.shape != tensor.shape):
                    full = f"{path}.{name}"
                    dimension = None if other is None else self._packed_dimension(tensor.shape, other.shape, n_kept)
                    if dimension is None:
                        return f"tensor {full} depends on the layers"
                    self.packed[full] = dimension
            a, b = _settings(module), _settings(its[path])
            known = {full.rpartition(".")[0] for full in self.packed}
            changed = {name for name in {*a, *b} if a.get(name) != b.get(name)}
            if path not in known:
                self.outside |= {(path, name) for name in changed}
        return None

    def _packed_dimension(self, mine: Sequence[int], its: Sequence[int], n_kept: int) -> int | None:
        """Which dimension holds a part for each layer, if one does."""
        changed = [d for d, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b]
        fits = len(changed) == 1 and mine[changed[0]] * n_kept == its[changed[0]] * self.n_layers
        return changed[0] if fits and mine[changed[0]] % self.n_layers == 0 else None


def find_renumbering(dense: PreTrainedModel, n_removed: int) -> Renumbering:
    """How this model's layers can be renumbered when so many are removed.

    dense: the base, live or a skeleton, with all of its layers. Raises UserError, naming the architecture and the first
    layer that would not be what it was.
    """
    found = Renumbering(dense)
    reason = _settle(found, dense, n_removed)
    if reason is not None and found.lists_numbers:
        other = Renumbering(dense, first=1)
        if _settle(other, dense, n_removed) is None:
            return other
    if reason is not None:
        raise UserError(f"{found.name} cannot be shortened by {n_removed} layers: {reason}")
    return found


def _settle(found: Renumbering, dense: PreTrainedModel, n_removed: int) -> str | None:
    """Find the layers that have to stay; None, or the reason why too few could go."""
    everything = range(found.n_layers)

    def without(gone: Iterable[int]) -> str | None:
        kept = sorted(set(everything) - set(gone))
        return found.problem(kept, dense) if kept else None

    reason = without(())
    if reason is not None:
        return reason
    found.fixed |= _last_attention(found, n_removed)
    free_now = [layer for layer in everything if layer not in found.fixed]
    probes = [*_probes(found, n_removed, found.fixed), free_now[::2]]  # with the last of them, each layer goes once
    reasons = [text for text in map(without, probes) if text is not None]
    if not reasons and found.n_layers - len(found.fixed) > n_removed:
        return None
    single = {layer: without([layer]) for layer in everything}
    found.fixed |= {layer for layer, text in single.items() if text is not None}
    free = found.n_layers - len(found.fixed)
    if free <= n_removed or free < found.n_layers * MAX_FIXED:
        return next((text for text in single.values() if text is not None), (reasons or [FEW])[0])
    for probe in _probes(found, n_removed, found.fixed):
        text = without(probe)
        if text is not None and set(probe) in [set(kind) - found.fixed for kind in _kinds(found)]:
            found.fixed |= {max(probe)}  # one of each kind has to stay
        elif text is not None:
            return text
    return None if found.n_layers - len(found.fixed) > n_removed else (reasons or [FEW])[0]


def _probes(found: Renumbering, n_removed: int, fixed: frozenset[int]) -> list[list[int]]:
    """Sets of layers to try without: whole kinds that a plan could remove, as many as asked for, every other one."""
    rng = random.Random(0)
    free = [layer for layer in range(found.n_layers) if layer not in fixed]
    size = min(max(n_removed, 1), len(free) - 1)
    kinds = [[layer for layer in kind if layer not in fixed] for kind in _kinds(found)]
    whole = [kind for kind in kinds if 0 < len(kind) <= n_removed and len(kind) < found.n_layers]
    return [*whole, sorted(rng.sample(free, size)), free[1::2]] if size > 0 else []


def _read_by_others(lists: Iterable[Sequence[Any]]) -> set[int]:
    """Layers whose work later ones share, as a list says: the last one before each 'shared' entry that is not."""
    return {
        next((before for before in range(layer - 1, -1, -1) if values[before] != SHARED), layer)
        for values in lists
        for layer, value in enumerate(values)
        if value == SHARED
    }


def _last_attention(found: Renumbering, n_removed: int) -> set[int]:
    """Of a hybrid whose attention layers could all be removed, the last of them: without one, no cache is kept."""
    kinds = [str(kind) for kind in getattr(found.text, "layer_types", None) or ()]
    attending = [layer for layer, kind in enumerate(kinds) if kind == "hybrid" or re.fullmatch(ATTENTION, kind)]
    return {attending[-1]} if 0 < len(attending) <= n_removed and len(attending) < len(kinds) else set()


def _kinds(found: Renumbering) -> list[list[int]]:
    """Layers by what the configuration's lists say of them."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer in range(found.n_layers):
        kinds.setdefault(tuple(str(values[layer]) for values in found.per_layer_lists.values()), []).append(layer)
    return list(kinds.values())


def _list(model: nn.Module, path: str) -> nn.ModuleList:
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def _entries(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _index_attributes(layers: nn.Module) -> dict[tuple[str, str], int]:
    """(path inside a layer, attribute) -> what it adds to the layer's place.

    Of attributes that say just that in every layer that has them.
    """
    seen: dict[tuple[str, str], list[int]] = {}
    for place, layer in enumerate(layers.children()):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and not name.startswith("_"):
                    seen.setdefault((path, name), []).append(value - place)
    return {
        key: offsets[0]
        for key, offsets in seen.items()
        if len(set(offsets)) == 1 and abs(offsets[0]) <= 1 and (len(offsets) > 1 or "layer" in key[1])
    }


def _shortened_list(value: Any, kept: Sequence[int]) -> list[Any] | None:
    long_enough = isinstance(value, list) and len(value) > kept[-1]
    return [value[layer] for layer in kept] if long_enough else None


def _said(value: object) -> str:
    return "is not there" if value is None else f"is {value}"


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return {name: list(tensor.shape) for name, tensor in tensors if tensor is not None}


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's own plain attributes."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, PLAIN)
