"""What people do to files between two looks at them: a model trained again into its folder, right answers corrected."""

from __future__ import annotations

import json
import os
from pathlib import Path


def change_one_number(file: Path, tensor: str = "model.layers.3.mlp.up_proj.weight") -> None:
    """One number of a tensor, in a file of the same size and date as before."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    state[tensor][5, 7] += 0.01
    times = file.stat()
    save_file(state, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def correct(folder: Path, name: str) -> None:
    """Other right answers for all rows of a benchmark of `write_benchmark`; the old ones again the third time."""
    path = folder / f"{name}.jsonl"
    corrected = [row | {"gold": (row["gold"] + 1) % 3} for row in map(json.loads, path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in corrected))
