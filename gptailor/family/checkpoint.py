"""What a model folder says of itself: config.json and safetensors headers, never a weight.

A safetensors file begins with 8 bytes (little-endian length) and that many bytes of JSON, so the names, types, shapes
and places of 7 billion parameters are read in milliseconds, and a wrong folder is refused before anything is loaded.
Folders come from other people: sizes are capped before parsing, file names in an index may not leave the folder, and
pickles and remote code are refused here, once, for base model and candidates alike.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from gptailor.wording import gigabytes

DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 64 << 20
MAX_JSON_BYTES = 32 << 20
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
NOT_TEXT = re.compile(r"vision|image|audio|speech")
"""In the names of what a multimodal model has beside its language model."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Unreadable(Exception):
    """A folder or file that cannot be a model; its text is one problem, without the place."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of `file`. dtype is safetensors' name, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A full model or a LoRA adapter, seen from outside. folder is None for a hub model not yet downloaded.

    where: its key in the run file, for messages. config: config.json (full model) or adapter_config.json (adapter).
    """

    where: str
    label: str
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    is_adapter: bool = False
    licence: str | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of a composite configuration."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @cached_property
    def layer_prefix(self) -> str | None:
        """What stands before the layer number in tensor names ('model.layers.').

        The numbering from 0 to L-1 or further that holds most tensors, with L from the configuration; None where no
        such numbering is found. Numbers from L on are layers that predict further tokens (DeepSeek-V3, GLM-4.5).
        """
        numbers: dict[str, set[int]] = defaultdict(set)
        tensors: Counter[str] = Counter()
        for name in self.tensors:
            for match in re.finditer(r"\.(\d+)\.", name):
                prefix = name[: match.start() + 1]
                numbers[prefix].add(int(match[1]))
                tensors[prefix] += 1
        wanted = set(range(self.n_layers or 0))
        numbers = {prefix: seen for prefix, seen in numbers.items() if not NOT_TEXT.search(prefix)}
        exact = [prefix for prefix, seen in numbers.items() if seen == wanted]
        further = [prefix for prefix, seen in numbers.items() if seen > wanted and seen == set(range(len(seen)))]
        return max(exact or further, key=lambda prefix: (tensors[prefix], prefix), default=None) if wanted else None

    @property
    def n_layers(self) -> int | None:
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(self.text_config.get(key), int):
                return int(self.text_config[key])
        kinds = self.text_config.get("layers_block_type")  # Nemotron-H says it in this way alone
        return len(kinds) if isinstance(kinds, list) else None

    def size(self, *keys: str) -> int | None:
        """A whole number of the configuration under the first of several names, e.g. ('hidden_size', 'n_embd')."""
        return next((int(self.text_config[k]) for k in keys if isinstance(self.text_config.get(k), int)), None)

    def layer_of(self, name: str) -> int | None:
        """Index of the layer that a tensor belongs to.

        None for embeddings, norms and heads, and for layers beyond the model's own.
        """
        number = self._number(name)
        return number if number is not None and number < (self.n_layers or 0) else None

    def is_beyond_layers(self, name: str) -> bool:
        """Whether a tensor belongs to a layer that is numbered after the model's last."""
        number = self._number(name)
        return number is not None and number >= (self.n_layers or 0)

    def _number(self, name: str) -> int | None:
        prefix = self.layer_prefix
        if prefix is None or not name.startswith(prefix):
            return None
        number = name[len(prefix) :].split(".", 1)[0]
        return int(number) if number.isdigit() else None

    @cached_property
    def inner_tensors(self) -> dict[str, TensorInfo]:
        """The layers' tensors by what follows the prefix: '7.mlp.up_proj.weight'."""
        start = len(self.layer_prefix or "")
        return {name[start:]: info for name, info in self.tensors.items() if self.layer_of(name) is not None}


def read_checkpoint(folder: Path, where: str, label: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read a local folder. What is wrong but does not hinder reading is listed in `.problems`. Raises Unreadable."""
    problems: list[str] = []
    is_full = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    is_adapter = (folder / "adapter_config.json").is_file() and not is_full
    if is_full and (folder / "adapter_config.json").is_file():
        # transformers would follow the adapter to a base of its own choosing
        problems.append("holds both a full model and an adapter_config.json; give a folder with one of them")
    config_name = "adapter_config.json" if is_adapter else "config.json"
    config = read_json(folder / config_name)
    if not trust_remote_code:
        problems += remote_code_problems(folder, is_adapter)
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder, is_adapter):
        found, wrong = _read_header(folder / file)
        tensors |= found
        problems += wrong
    return Checkpoint(where, label, folder, config, tensors, is_adapter, _licence(folder), tuple(problems))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises Unreadable."""
    if not path.is_file():
        raise Unreadable(f"{path.name} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise Unreadable(f"{path.name} is larger than {gigabytes(MAX_JSON_BYTES)}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise Unreadable(f"{path.name} must hold a JSON object")
    return data


def remote_code_problems(folder: Path, is_adapter: bool) -> list[str]:
    """Configuration files that ask for code to be run: from the model's folder, or a kernel from the hub."""
    problems = []
    config = {} if is_adapter else read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        for key, value in part.items() if isinstance(part, dict) else ():
            if key.endswith("_implementation") and "/" in str(value):
                problems.append(f"config.json asks for code from the hub to be run ({key}: {value}); remove the line")
    for name in () if is_adapter else ("config.json", "tokenizer_config.json"):
        if name == "config.json" and is_built_in(config):
            continue  # transformers' own class is used, and no code of the folder's
        if (folder / name).is_file() and (wanted := read_json(folder / name).get("auto_map")):
            classes = ", ".join(sorted(wanted)) if isinstance(wanted, dict) else str(wanted)
            problems.append(
                f"{name} asks for code of its own to be run (auto_map: {classes}); use a model that transformers has "
                "built in, or set trust_remote_code: true if you trust its author"
            )
    return problems


def is_built_in(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the architecture as a language model, so that no code of the folder's is needed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # a second, for who needs it

    return str(config.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def weight_files(folder: Path, is_adapter: bool = False) -> list[str]:
    """Names of the safetensors files that hold the weights. Raises Unreadable with what to do instead."""
    single = ADAPTER if is_adapter else WEIGHTS
    if (folder / single).is_file():
        return [single]
    if not is_adapter and (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise Unreadable(f"{INDEX} has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise Unreadable(f"{INDEX} names {name!r}, which is not a safetensors file of this folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise Unreadable(f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}")
        return names
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise Unreadable(
            f"only pickled weights are here ({', '.join(pickles[:3])}); they can run code when opened and are refused: "
            "convert them to safetensors first (save_pretrained of transformers writes it)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; {', '.join(others[:3])} is another form of them: rename it if it is whole" if others else ""
    raise Unreadable(f"no weights: expected {single}" + ("" if is_adapter else f" or {INDEX}") + hint)


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """All tensors that a safetensors file announces, and what is wrong with them. Raises Unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise Unreadable(f"{path.name} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        if len(start) < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise Unreadable(f"{path.name} is not a safetensors file, or is cut off ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{path.name} has a damaged header ({error})") from error
    if not isinstance(header, dict):
        raise Unreadable(f"{path.name} has a damaged header (not a JSON object)")
    header.pop("__metadata__", None)
    return tensors_from_header(header, path.name, data_start=8 + length, file_size=size)


def tensors_from_header(
    header: Mapping[str, Any], file: str, *, data_start: int = 0, file_size: int | None = None
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Tensors of a parsed header ({name: {dtype, shape, data_offsets}}), and problems. Raises Unreadable."""
    tensors: dict[str, TensorInfo] = {}
    problems = []
    try:
        for name, entry in header.items():
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (data_start + int(offset) for offset in entry["data_offsets"])
            tensors[name] = info = TensorInfo(file, str(entry["dtype"]), shape, begin, end)
            width = DTYPE_BYTES.get(info.dtype)
            if width is not None and end - begin != info.n_elements * width:
                problems.append(f"{file}: tensor {name} of shape {list(shape)} has {end - begin:,} bytes in its header")
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{file} has a damaged header ({error!r})") from error
    last = max((info.end for info in tensors.values()), default=data_start)
    if file_size is not None and last > file_size:
        cut = sorted(name for name, info in tensors.items() if info.end > file_size)
        problems.append(
            f"{file} is cut off: {file_size:,} bytes, its header describes {last:,} "
            f"(first tensor lost: {cut[0]}); download it again"
        )
    return tensors, problems


def _licence(folder: Path) -> str | None:
    """The licence named in the model card's front matter, if any."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > MAX_JSON_BYTES:
        return None
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError):
        return None  # a card is read for one word; a broken one is no reason to refuse the model
    named = front.get("license_name") or front.get("license") if isinstance(front, dict) else None
    return str(named)[:100] if named else None
