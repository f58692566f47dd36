"""From what a run file names (a folder or a hub id) to a checkpoint on this machine, or its headers on the hub.

A check before a run must not download gigabytes: a hub model that is not in the local cache yet is judged by its
configuration and by the headers of its weight files, which the hub serves by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import huggingface_hub as hub
from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled, SafetensorsParsingError

from gptailor import shipped
from gptailor.family.checkpoint import (
    ADAPTER,
    INDEX,
    WEIGHTS,
    Checkpoint,
    TensorInfo,
    Unreadable,
    read_checkpoint,
    read_json,
    remote_code_problems,
    tensors_from_header,
)

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "README.md"]
OTHER_FORMS = ["consolidated*", "*.fp16.*", "*.fp32.*", "original/*", "onnx/*"]  # the same weights once more
T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(location: str, where: str, *, trust_remote_code: bool, download: bool) -> Checkpoint:
    """The checkpoint of a local folder or hub id. Without `download`, a hub model may come without a folder.

    Raises Unreadable: nothing is there, it is not a model, or the hub cannot be asked.
    """
    path = shipped.find(location)
    if path.is_dir():
        return read_checkpoint(path, where, _name_of(path), trust_remote_code=trust_remote_code)
    if path.exists():
        raise Unreadable(f"{location} is a file; expected a model's folder or a hub id such as owner/name")
    if not _ID.fullmatch(location):
        raise Unreadable(f"{location}: no such folder")
    folder = _cached(location)
    if folder is None and not download:
        return _remote(location, where, trust_remote_code)
    if folder is None:
        folder = Path(
            _ask(
                location, lambda: hub.snapshot_download(location, allow_patterns=PATTERNS, ignore_patterns=OTHER_FORMS)
            )
        )
    return read_checkpoint(folder, where, location, trust_remote_code=trust_remote_code)


def _name_of(folder: Path) -> str:
    """A folder's name; of a snapshot in a hub cache (models--OWNER--NAME/snapshots/COMMIT) the model's id."""
    *_, model, kind, name = ("", "", *folder.resolve().parts)
    return model.removeprefix("models--").replace("--", "/", 1) if kind == "snapshots" else name


def revision_of(checkpoint: Checkpoint) -> str | None:
    """The commit of a hub model, whose cache keeps each under `snapshots/COMMIT`; None of other folders."""
    folder = checkpoint.folder
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _cached(repo: str) -> Path | None:
    """The snapshot in the local cache, if its weights are all there."""
    try:
        folder = Path(
            hub.snapshot_download(repo, allow_patterns=PATTERNS, ignore_patterns=OTHER_FORMS, local_files_only=True)
        )
    except FileNotFoundError:
        return None
    if (folder / WEIGHTS).is_file() or (folder / ADAPTER).is_file():
        return folder
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {})
        return folder if all((folder / str(name)).is_file() for name in shards.values()) else None
    return None


def _remote(repo: str, where: str, trust_remote_code: bool) -> Checkpoint:
    """Configuration and weight headers straight from the hub."""
    api = hub.HfApi()
    siblings = {str(s.rfilename) for s in _ask(repo, lambda: api.model_info(repo)).siblings or ()}
    is_adapter = ADAPTER in siblings and WEIGHTS not in siblings and INDEX not in siblings
    if not is_adapter and not siblings & {WEIGHTS, INDEX}:
        others = sorted(name for name in siblings if name.endswith(".safetensors"))
        hint = f"; it has {', '.join(others[:3])}, another form of them" if others else "; pickled weights are refused"
        raise Unreadable(f"{repo}: the hub has no safetensors weights for it{hint}")
    for name in siblings & {"config.json", "adapter_config.json", "tokenizer_config.json"}:
        folder = Path(_ask(repo, partial(hub.hf_hub_download, repo, name))).parent
    config = read_json(folder / ("adapter_config.json" if is_adapter else "config.json"))
    problems = [] if trust_remote_code else remote_code_problems(folder, is_adapter)
    if is_adapter:
        files = {ADAPTER: _ask(repo, lambda: api.parse_safetensors_file_metadata(repo, ADAPTER))}
    else:
        files = _ask(repo, lambda: api.get_safetensors_metadata(repo)).files_metadata
    tensors: dict[str, TensorInfo] = {}
    for file, metadata in files.items():
        header = {name: vars(info) for name, info in metadata.tensors.items()}
        found, wrong = tensors_from_header(header, file)
        tensors |= found
        problems += wrong
    return Checkpoint(where, repo, None, config, tensors, is_adapter, problems=tuple(problems))


def _ask(repo: str, question: Callable[[], T]) -> T:
    """Run one hub call; every way it can fail becomes one sentence."""
    try:
        return question()
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise Unreadable(f"{repo}: its weights on the hub are not readable safetensors") from error
    except (OSError, HTTPError) as error:  # offline, no such model, gated, or the network broke
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        raise Unreadable(
            f"{repo}: no such folder, not in the local hub cache, and the hub could not be asked ({reason}); "
            "download it first or give a folder"
        ) from error
