"""What a command says while it works: lines for a person, or JSON lines (`--json`) for the program that started it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One thing that a command says.

    text: what is done now, or what came of it, for people. share: of the whole command that is done, from 0 to 1, where
    it is known. result: what came of it, for programs. error: why the command ends.
    """

    text: str = ""
    share: float | None = None
    result: dict[str, Any] | None = None
    error: str | None = None

    def __str__(self) -> str:
        return self.text if self.share is None else f"{self.share:4.0%} {self.text}"


Say = Callable[[Event], None]


def say_to_people(event: Event) -> None:
    print(event, flush=True)


def say_to_programs(event: Event) -> None:
    print(json.dumps({"event": asdict(event)}), flush=True)


def read_events(output: str) -> list[Event]:
    """The events among a command's output; other lines are words of libraries, or the rest of a line that was cut."""
    found = []
    for line in output.splitlines():
        try:
            found.append(Event(**json.loads(line)["event"]))
        except (ValueError, TypeError, KeyError):
            continue
    return found
