"""Which texts hold what is to judge: rows of held-out and selection splits have no place in what a model is trained on.

A text holds a row where the two have WORDS words in a row in common (a row of fewer: all of it), capitals and
punctuation aside. Words that many rows share, such as those around every question, prove nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from gptailor.evaluate.benchmarks import OpenBenchmark

WORDS = 13
FEWEST = 4
"""Words of a row: fewer are found everywhere."""
COMMON = 10
"""Rows that share words, from which on these are the benchmark's own phrases."""
_WORD = re.compile(r"\w+")

Phrase = tuple[str, ...]


class Unseen:
    """What must not be read: the rows of some benchmarks."""

    def __init__(self, benchmarks: Iterable[OpenBenchmark], tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode = tokenizer.decode
        counted = Counter(phrase for phrases in self._rows(benchmarks) for phrase in phrases)
        self._phrases = {phrase for phrase, count in counted.items() if count < COMMON}
        self._lengths = sorted({len(phrase) for phrase in self._phrases})

    def _rows(self, benchmarks: Iterable[OpenBenchmark]) -> set[frozenset[Phrase]]:
        """What tells each example: the phrases of its question and of every option behind it."""
        rows = set()
        for example in (example for benchmark in benchmarks for example in benchmark.examples):
            texts = [str(self._decode(list(window.tokens))) for window in example.windows]
            texts += [prompt.text for prompt in example.prompts]
            words = [found for text in texts if len(found := _words(text)) >= FEWEST]
            rows.add(frozenset(phrase for row in words for phrase in _phrases(row, min(WORDS, len(row)))))
        return rows

    def holds(self, text: Sequence[int]) -> bool:
        """Whether a text, as token ids, holds a row."""
        words = _words(str(self._decode(list(text))))
        return any(phrase in self._phrases for n in self._lengths for phrase in _phrases(words, n))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _phrases(words: Sequence[str], n: int) -> Iterable[Phrase]:
    return (tuple(words[start : start + n]) for start in range(len(words) - n + 1))
