"""How fast a device multiplies matrices, and whether another number type would be faster on it."""

from __future__ import annotations

import time
from functools import cache

MEASURE_SECONDS = 0.2
WORTH_SAYING = 1.5
"""From this ratio on, another type is advised."""


@cache  # the check asks twice
def matmul_speed(device: str, width: int, dtype: str, seconds: float = MEASURE_SECONDS) -> float | None:
    """Floating-point operations a second of a product such as a model of this width has.

    None where the device is full.
    """
    import torch

    try:
        left = torch.ones(1024, width, dtype=getattr(torch, dtype), device=device)
        right = torch.ones(width, 4 * width, dtype=left.dtype, device=device)
        count, until = 0, time.monotonic() + seconds
        (left @ right).sum().item()
        began = time.monotonic()
        while not count or time.monotonic() < until:
            (left @ right)[0, 0].item()
            count += 1
        return count * 2 * left.shape[0] * right.numel() / (time.monotonic() - began)
    except torch.OutOfMemoryError:
        return None


def type_advice(device: str, width: int, dtype: str) -> str | None:
    """What to say where a processor multiplies `dtype` much slower than float32; None where all is well.

    Processors without bfloat16 units (AVX-512 BF16, AMX) emulate it: seven times slower than float32 on one with AVX2.
    GPUs are not asked: all that have the memory for a family multiply 16 bits faster.
    """
    if device.partition(":")[0] != "cpu" or dtype == "float32":
        return None
    half, single = matmul_speed(device, width, dtype), matmul_speed(device, width, "float32")
    if not half or not single or single < WORTH_SAYING * half:
        return None
    return (
        f"dtype: this processor multiplies float32 {single / half:.1f} times as fast as {dtype}; with `dtype: float32` "
        f"a run takes less time and twice the memory"
    )
