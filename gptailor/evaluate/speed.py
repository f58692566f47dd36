"""What a model is worth in use: speed and memory of folders of models, in plain transformers.

Nothing of the engine's fast path is in it: a folder is opened as any user opens it. It runs as a process of its own,
`python -m gptailor.evaluate.speed`, and prints a JSON line for each finding. Two models are measured in turns, so that
a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteria


@dataclass(frozen=True)
class Setting:
    """What is measured. device, dtype: as torch names them; batches: texts side by side; prompt, new: tokens a text."""

    device: str = "cpu"
    dtype: str = "float32"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 256
    new: int = 32
    rounds: int = 5


@dataclass(frozen=True)
class Timing:
    """Texts read and continued. Seconds until the first new token, and for the others; prompt, new: tokens a text."""

    model: int
    batch: int
    prompt: int
    new: int
    first: float
    rest: float


class _Clock(StoppingCriteria):
    """Notes the time at every new token, and never stops."""

    def __init__(self, device: str) -> None:
        self.device, self.at = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        _wait(self.device)
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def opened(folder: str, setting: Setting) -> PreTrainedModel:
    """The model of a folder (or of a name on the hub), ready."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, setting.dtype))
    return ready(model.to(setting.device).eval())


def ready(model: Any) -> PreTrainedModel:
    """The model, to write greedily, whatever ends a text."""
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    return model


def write(model: Any, batch: int, setting: Setting, seed: int = 0) -> tuple[float, float]:
    """Let the model read random tokens and write `new`: seconds to the first of these, and for the others."""
    draw = torch.Generator().manual_seed(seed)
    n_words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(n_words, (batch, prompt_of(model, setting)), generator=draw)
    ids, clock = ids.to(setting.device), _Clock(setting.device)
    _wait(setting.device)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=setting.new,
            max_new_tokens=setting.new,
            stopping_criteria=[clock],
        )
    return clock.at[0] - started, clock.at[-1] - clock.at[0]


def prompt_of(model: Any, setting: Setting) -> int:
    """Tokens that are read: as many as asked for, and as fit into the model's window beside the new ones."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return setting.prompt if not window else max(1, min(setting.prompt, window - setting.new))


def timings(models: Sequence[PreTrainedModel], setting: Setting) -> Iterator[Timing]:
    """Every model at every batch in turns, `rounds` times, after a round that is not counted.

    The order turns round with every round, so that none is always the one after a pause.
    """
    for number in range(-1, setting.rounds):
        for batch in setting.batches:
            order = range(len(models)) if number % 2 else reversed(range(len(models)))
            for index in order:
                taken = write(models[index], batch, setting, max(number, 0))
                if number >= 0:
                    yield Timing(index, batch, prompt_of(models[index], setting), setting.new, *taken)


def peak_memory(folder: str, setting: Setting) -> int:
    """Bytes that a model and its work at the largest batch hold at most, once it is loaded.

    On a GPU what torch allocates; on a CPU what the process holds more than before it opened the model.
    """
    before = psutil.Process().memory_info().rss
    model = opened(folder, setting)
    gc.collect()
    is_cuda = torch.device(setting.device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    else:
        _forget_peak()
    write(model, max(setting.batches), setting)
    return int(torch.cuda.max_memory_allocated(setting.device)) if is_cuda else _peak() - before


def _forget_peak() -> None:
    """Loading holds more than using does; Linux counts anew when it is told to."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int:
    """Bytes that this process held at most."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """`speed FOLDER FOLDER …` or `memory FOLDER`, and a Setting as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--setting", default="{}")
    asked = parser.parse_args(arguments)
    setting = Setting(**json.loads(asked.setting))
    if asked.what == "memory":
        print(json.dumps({"bytes": peak_memory(asked.folders[0], setting)}), flush=True)
        return
    for timing in timings([opened(folder, setting) for folder in asked.folders], setting):
        print(json.dumps(asdict(timing)), flush=True)


if __name__ == "__main__":
    main()
