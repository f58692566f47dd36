"""Digests of the files that a model is made of, so that another model in the same folder is noticed.

Of a weight file, each tensor's name, type and shape are read from its header, and its values from the file: all of
them, or in files larger than WHOLE spots that are spread evenly over every tensor (training changes all of a tensor;
19 MB are read of 13 GB). Beside the weights: config.json, an adapter's adapter_config.json, and of the base the
tokenizer's files. A large file's digest is kept in the user's cache folder and taken from there as long as the file's
place, size, times and inode are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gptailor.family.checkpoint import TOKENIZER_FILES, Checkpoint, TensorInfo, read_json
from gptailor.plan import BASE

WHOLE = 256 << 20
"""Bytes of a file up to which all of it is read."""
SPOTS, SPOT = 16, 4096
"""Of a tensor in a larger file: how many spots are read, and their bytes."""
SCHEME = 1
"""Raised when what is hashed changes."""
WORTH_KEEPING = 16 << 20
"""Bytes of a file from which a digest is kept: smaller ones are read in no time."""
SETTLED_SECONDS = 2.0
"""How long a file has to be as it is before its digest is kept: a clock may not tell two writes in a row apart."""
OF_THE_TOKENIZER = (*TOKENIZER_FILES, "tokenizer_config.json", "merges.txt", "chat_template.jinja")
NO_MATTER = ("_name_or_path", "transformers_version")
"""Keys of a configuration that change with the folder or the library, and with no number."""

FileDigests = dict[tuple[str, str], str]
"""(model, file) -> digest; the model is BASE or a candidate's name."""


def checkpoint_digests(checkpoints: Mapping[str, Checkpoint]) -> FileDigests:
    """Digests of every file of checkpoints (by name), whose folders are here."""
    found: FileDigests = {}
    jobs: list[tuple[str, Path, dict[str, TensorInfo]]] = []
    for name, checkpoint in checkpoints.items():
        assert checkpoint.folder is not None
        for file in sorted({info.file for info in checkpoint.tensors.values()}):
            tensors = {tensor: info for tensor, info in checkpoint.tensors.items() if info.file == file}
            jobs.append((name, checkpoint.folder / file, tensors))
        for file in _other_files(name, checkpoint):
            found[name, file] = _digest_of_text(checkpoint.folder / file)
    with ThreadPoolExecutor(8) as pool:  # a disk answers several at a time
        digests = pool.map(lambda job: weight_digest(job[1], job[2]), jobs)
        found |= {(name, path.name): digest for (name, path, _), digest in zip(jobs, digests, strict=True)}
    return found


def weight_digest(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """Digest of a safetensors file with these tensors."""
    of = path.stat()
    state = [SCHEME, str(path.resolve()), of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino]
    kept = _cache_file(path)
    with suppress(OSError, ValueError, TypeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["digest"])
    digest = _digest_of_tensors(path, tensors, of.st_size <= WHOLE)
    age = time.time() - max(of.st_mtime, of.st_ctime)
    if of.st_size >= WORTH_KEEPING and age > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time, no more
            kept.parent.mkdir(parents=True, exist_ok=True)
            fresh = kept.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({"state": state, "digest": digest}), encoding="utf-8")
            os.replace(fresh, kept)
    return digest


def _digest_of_tensors(path: Path, tensors: Mapping[str, TensorInfo], whole: bool) -> str:
    made = hashlib.blake2b(digest_size=16)
    file = os.open(path, os.O_RDONLY)
    try:
        for name, info in sorted(tensors.items()):
            made.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            for begin, length in _spans(info, whole):
                made.update(os.pread(file, length, begin))
    finally:
        os.close(file)
    return made.hexdigest()


def _spans(info: TensorInfo, whole: bool) -> Iterable[tuple[int, int]]:
    """(place, bytes) of what is read of a tensor."""
    size = info.end - info.begin
    if whole or size <= SPOTS * SPOT:
        step = 1 << 22
        return ((at, min(step, info.end - at)) for at in range(info.begin, info.end, step))
    return ((info.begin + (size - SPOT) * spot // (SPOTS - 1), SPOT) for spot in range(SPOTS))


def _other_files(name: str, checkpoint: Checkpoint) -> list[str]:
    files = ["adapter_config.json" if checkpoint.is_adapter else "config.json"]
    assert checkpoint.folder is not None
    if name == BASE:
        files += [file for file in OF_THE_TOKENIZER if (checkpoint.folder / file).is_file()]
    return files


def _digest_of_text(path: Path) -> str:
    if path.name == "config.json":
        kept = {key: value for key, value in read_json(path).items() if key not in NO_MATTER}
        data = json.dumps(kept, sort_keys=True).encode()
    else:
        data = path.read_bytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _cache_file(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = hashlib.blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest()
    return root / "gptailor" / "digests" / f"{place}.json"
