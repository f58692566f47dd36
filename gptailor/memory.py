"""What fits where, before a run is started: predicted from headers, against what is free now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptailor.launch.devices import device_of, places
from gptailor.plan import BASE
from gptailor.spec import RunSpec, SpaceOperation

PROCESS_BYTES = 1_200_000_000
"""What an engine process holds before any model: Python, torch, transformers, lm-eval, SMAC."""
ELSEWHERE = "each worker's device"


@dataclass(frozen=True)
class Memory:
    """Bytes on the run's device (host memory on a CPU), predicted, by part, against what is free (None: unknown)."""

    device: str
    parts: Mapping[str, int]
    free: int | None

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def verdict(self) -> str:
        """One sentence: does it fit?"""
        if self.free is None:
            return f"{gigabytes(self.needed)} needed on {self.device}; what is free there cannot be read"
        amount = f"{gigabytes(self.needed)} needed on {self.device}, {gigabytes(self.free)} free"
        if self.needed <= self.free:
            return f"fits: {amount}"
        if self.device.startswith("cuda") and self.needed - self.parts.get("candidates", 0) <= self.free:
            return f"fits, with candidates kept in host memory, which is slower: {amount}"
        return f"does not fit: {amount}; choose another device, a smaller model or fewer candidates"


def local_workers(spec: RunSpec) -> list[str]:
    """The places of the run's workers on this machine; none where it has none, or where they are elsewhere."""
    workers = None if spec.baselines else spec.workers
    return places(workers.local, spec.device) if workers is not None and workers.local is not None else []


def predict_memory(spec: RunSpec, family: Any) -> Memory:
    """Predicted, from above: what models share is not known before they are read. Raises UserError for a device.

    Workers that share a device have models of their own there; on a CPU all map the same files.
    """
    from gptailor.evaluate.evaluator import BYTES_PER_TOKEN, CPU_TOKENS, LOGIT_BYTES, LOGITS
    from gptailor.family.residence import pick_device
    from gptailor.stitch.stitcher import CACHE_SHARE

    names = local_workers(spec)
    if names:
        device = device_of(names[0])
    elif spec.workers is not None and not spec.baselines:
        device = ELSEWHERE
    else:
        device = str(pick_device(spec.device))
    there = max(1, sum(device_of(name) == device for name in names))
    copies = 1 if device == "cpu" else there
    base = family.model_bytes[BASE]
    makes_layers = SpaceOperation.MERGE in spec.operations or spec.output_scale is not None
    tokens = CPU_TOKENS if spec.batch_tokens == "auto" else int(spec.batch_tokens)
    logits = min(LOGITS, tokens * family.vocab_size) * LOGIT_BYTES
    parts = {
        "base": copies * base,
        "candidates": copies * (sum(family.model_bytes.values()) - base),
        "merged layers": there * int(CACHE_SHARE * family.distinct_bytes) if makes_layers else 0,
        "working memory": there * (tokens * min(BYTES_PER_TOKEN, 64 * family.hidden_size) + logits),
    }
    if device in ("cpu", "mps"):
        parts["libraries"] = (1 + len(names)) * PROCESS_BYTES
    free = None if device == ELSEWHERE else free_bytes(device)
    return Memory(device, {part: size for part, size in parts.items() if size}, free)


def free_bytes(device: str) -> int | None:
    """Free memory of a GPU, or of the host; None where the driver does not say."""
    if not device.startswith("cuda"):
        import psutil

        return int(psutil.virtual_memory().available)
    import pynvml

    try:
        pynvml.nvmlInit()
        index = int(device.partition(":")[2] or 0)
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).free)
    except pynvml.NVMLError:
        return None


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
