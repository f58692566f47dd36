"""Jobs side by side: one thread a processor, each computing its jobs alone.

Small products and sums split over processors wait for each other at every step; whole packs and whole layers do not. It
also makes scores independent of how many processors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], jobs: Sequence[T], sizes: Sequence[int]) -> list[R]:
    """work(job) of every job, in their order; the largest are begun first, so that threads end together.

    An exception ends the others after the job they are at, and is raised.
    """
    n_threads = torch.get_num_threads()
    order = sorted(range(len(jobs)), key=lambda i: -sizes[i])
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {index: pool.submit(work, jobs[index]) for index in order}
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(n_threads)
    failed = [future for future in futures.values() if not future.cancelled() and future.exception()]
    return [future.result() for future in (*failed, *(futures[index] for index in range(len(jobs))))]
