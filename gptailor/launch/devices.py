"""What a model can run on here, and how much memory is free: read without torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import pynvml

CORES_PER_WORKER = 2


@dataclass(frozen=True)
class Device:
    """name: as a run file's `device` names it. Memory in bytes; the CPU's and MPS's is the machine's."""

    name: str
    label: str
    free: int
    total: int


def free_devices() -> list[Device]:
    """Every device, GPUs first. Without a driver there are none of those, and that is no error."""
    memory = psutil.virtual_memory()
    devices = list(_cuda())
    if sys.platform == "darwin" and platform.machine() == "arm64":
        devices.append(Device("mps", "Apple GPU", memory.available, memory.total))
    cores = psutil.cpu_count(logical=True) or 1
    label = f"CPU, {cores} core{'s' * (cores > 1)}"
    return [*devices, Device("cpu", label, memory.available, memory.total)]


def places(workers: int | Literal["auto"], device: str) -> list[str]:
    """A name for each worker on this machine, which says where it computes: `cuda:0`, `cuda:0..3`, or `cpu-1`.

    workers: their number; auto: one a visible GPU, without any one per two cores. Fewer workers than GPUs get equal
    shares of them, so that big bases can be split. device: as in a run file.
    """
    gpus = [found.name for found in free_devices() if found.name.startswith("cuda")] if device != "cpu" else []
    if not gpus:
        count = max(1, n_cores() // CORES_PER_WORKER) if workers == "auto" else workers
        return [f"cpu-{place + 1}" for place in range(count)]
    count = len(gpus) if workers == "auto" else workers
    if (share := len(gpus) // count) > 1:
        return [f"cuda:{first}..{first + share - 1}" for first in range(0, count * share, share)]
    rounds = [(gpus[place % len(gpus)], place // len(gpus)) for place in range(count)]
    return [f"{gpu}-{turn + 1}" if turn else gpu for gpu, turn in rounds]


def devices_of(place: str) -> list[str]:
    """The devices of a worker, by its place.

    `cuda:2` and `cuda:3` of `cuda:2..3`, `cuda:0` of `cuda:0-2`, `cpu` of `cpu-1`.
    """
    name = place.partition("-")[0]
    kind, _, numbers = name.partition(":")
    first, _, last = numbers.partition("..")
    return [f"{kind}:{number}" for number in range(int(first), int(last) + 1)] if last else [name]


def device_of(place: str) -> str:
    """The first of them: where the worker's family has its embeddings, and all of it if that fits."""
    return devices_of(place)[0]


def card(name: str) -> str:
    """What a device is called whatever this process may see of the machine: a GPU's UUID; else its name."""
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdigit():
        return name
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver
        return name
    try:
        return str(pynvml.nvmlDeviceGetUUID(list(_visible())[int(number)]))
    except (pynvml.NVMLError, IndexError):
        return name
    finally:
        pynvml.nvmlShutdown()


def n_cores() -> int:
    """Processors that this process may compute on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda() -> Iterator[Device]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver
        return
    try:
        for index, handle in enumerate(_visible()):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            yield Device(f"cuda:{index}", str(pynvml.nvmlDeviceGetName(handle)), int(memory.free), int(memory.total))
    except pynvml.NVMLError:  # a GPU that fell off the bus: what was found until here is still true
        return
    finally:
        pynvml.nvmlShutdown()


def _visible() -> Iterator[object]:
    """GPUs in torch's numbering: CUDA_VISIBLE_DEVICES picks and orders them by number or by UUID."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        chosen = ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
    for part in filter(None, (part.strip() for part in chosen.split(","))):
        if part.isdigit():
            yield pynvml.nvmlDeviceGetHandleByIndex(int(part))
        elif part.startswith(("GPU-", "MIG-")):
            yield pynvml.nvmlDeviceGetHandleByUUID(part)
        else:  # CUDA stops at the first entry that is none, such as -1
            return
