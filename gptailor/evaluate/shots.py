"""Few-shot examples that do not depend on what else is asked: those that lm-eval draws when it reads the whole split.

lm-eval draws a document's examples when it comes to it, from one generator for all: a subset, or one of another size,
gets other prompts. Here the draws of the documents in between are made too, and thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptailor.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


class Drawn:
    """In a sampler's place: what was drawn for the documents that are asked for, in their order."""

    def __init__(self, draws: Iterator[Sequence[dict[str, Any]]]) -> None:
        self._draws = draws

    def sample(self, **_asked: Any) -> Sequence[dict[str, Any]]:
        return next(self._draws)


@contextmanager
def drawn_as_for_all(task: ConfigurableTask, documents: Sequence[int]) -> Iterator[None]:
    """Inside, requests for these documents (ascending) have the examples of a pass over the whole split.

    Raises UserError where there are fewer examples than shots.
    """
    sampler, shots = getattr(task, "sampler", None), task.config.num_fewshot or 0
    if sampler is None or not shots or not documents:
        yield
        return
    try:
        task.sampler = Drawn(iter(_draw(task, shots, documents)))
        yield
    finally:
        task.sampler = sampler


def _draw(task: ConfigurableTask, shots: int, documents: Sequence[int]) -> list[Sequence[dict[str, Any]]]:
    wanted, docs = set(documents), task.eval_docs
    leaves_itself_out = task.fewshot_cfg.split == task.config.test_split  # as in ConfigurableTask.fewshot_context
    found = []
    for place in range(max(documents) + 1):
        try:
            draw = task.sampler.sample(n=shots, eval_doc=docs[place] if leaves_itself_out else None)
        except (ValueError, AssertionError) as error:
            pool = len(task.sampler.df)
            raise UserError(
                f"task {task.task_name}: num_fewshot is {shots}, and it has {pool} examples to draw from"
            ) from error
        if place in wanted:
            found.append(draw)
    return found
