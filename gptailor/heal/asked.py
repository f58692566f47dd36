"""What is asked of a heal: few settings with defaults, each refused in one sentence that names its option."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from gptailor.errors import UserError
from gptailor.spec.sections import Repair

LORA_RATE, FULL_RATE = 1e-3, 2e-4
WRITTEN = 100_000
"""Tokens that the base writes at most, and that other sources give beside it."""
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass(frozen=True)
class HealAsked:
    """How a plan is healed.

    texts: sources joined by +, as a repair's. tokens: to train on, the texts gone through as often as that takes.
    minutes: of training at most; None: no limit. lora: rank of the adapters; 0: the layers' own weights are trained.
    rate: peak learning rate; None: the usual one. teacher: a dense model of the family; "": the one that most of the
    kept layers come from.
    """

    texts: str = "objectives+base"
    tokens: int = 1_000_000
    minutes: float | None = None
    lora: int = 16
    rate: float | None = None
    teacher: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            Repair(texts=self.texts)  # its sources are ours
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"--texts {self.texts}: {said}") from error
        if not 1_000 <= self.tokens <= 1_000_000_000:
            raise UserError(f"--tokens {self.tokens}: must be 1k to 1000M")
        if self.minutes is not None and not 0 < self.minutes <= 100_000:
            raise UserError(f"--minutes {self.minutes:g}: must be above 0")
        if not 0 <= self.lora <= 1024:
            raise UserError(f"--lora {self.lora}: must be a rank from 1 to 1024, or 0 to train the layers themselves")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise UserError(f"--rate {self.rate:g}: must be above 0 and at most 1, such as 0.0005")

    @property
    def text_tokens(self) -> int:
        """Tokens of different texts: what the base writes takes as long as what it teaches, so it writes no more."""
        sources = self.texts.split("+")
        return min(self.tokens, WRITTEN * len(sources)) if "base" in sources else self.tokens

    @property
    def peak_rate(self) -> float:
        return self.rate if self.rate is not None else LORA_RATE if self.lora else FULL_RATE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        """A short name for the heal of a plan: `500k`, `500k-full`."""
        return count_text(self.tokens) + ("" if self.lora else "-full")


def parse_count(text: str, option: str = "--tokens") -> int:
    """A number of tokens: `500k`, `5M`, `0.5M` or `500000`. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if found is None:
        raise UserError(f"{option} {text}: must be a number of tokens such as 500k or 5M")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def count_text(count: int) -> str:
    """The shortest way to write a number of tokens: `500k`, `5M`, `1234`."""
    for unit in ("m", "k"):
        if count % (_UNITS[unit] // 10) == 0 and count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:g}{unit.upper() if unit == 'm' else unit}"
    return str(count)
