"""glibc's heap as model work on a CPU wants it: in huge pages, and keeping what was freed.

A tensor of some megabytes lies on thousands of pages of 4 KiB. Where the processor looks these up slowly, as in many
virtual machines, passes over memory wait for addresses, not for data; pages of 2 MiB need 1/512 of the look-ups. Linux
gives such pages to those who ask (`madvise`, the usual setting), and glibc, from 2.35 on, asks where GLIBC_TUNABLES
says so, which it reads once, when a process begins (glibc manual, Memory Allocation Tunables).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE = "glibc.malloc.hugetlb"
BEGUN = "GPTAILOR_HUGE_PAGES"
"""Environment variable that a process begun anew finds, should its GLIBC_TUNABLES be taken away on the way."""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
MAX_KEPT = 2**31 - 1
"""Bytes: the most that mallopt takes."""


def tunables(environment: Mapping[str, str]) -> dict[str, str]:
    """GLIBC_TUNABLES for a child: what is set, and huge pages where nothing is said of them."""
    found = environment.get(TUNABLES, "")
    return {TUNABLES: found if HUGE in found else ":".join(filter(None, [found, f"{HUGE}=1"]))}


def begin_in_huge_pages(setting: Path = SETTING) -> None:
    """Begin this process anew with huge pages, before it has done anything, where the system gives them if asked."""
    if os.environ.pop(BEGUN, None) or HUGE in os.environ.get(TUNABLES, "") or not sys.executable or not can_ask():
        return
    with suppress(OSError):  # no such setting, no such system: without them
        if "[madvise]" in setting.read_text(encoding="ascii"):
            os.execve(
                sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **tunables(os.environ), BEGUN: "1"}
            )


def can_ask() -> bool:
    """Whether this is glibc 2.35 or newer."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (AttributeError, ValueError, OSError):  # another system
        return False


def keep_freed_memory(n_bytes: int) -> None:
    """Let glibc keep so much freed memory instead of giving it back after every large tensor.

    A fresh page costs a fault; without this, the passes between two products spend most of their time on faults.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, min(n_bytes, MAX_KEPT))
        mallopt(_M_TRIM_THRESHOLD, min(n_bytes, MAX_KEPT))
