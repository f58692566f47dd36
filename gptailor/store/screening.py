"""Which candidates a run's search begins with, where they were screened: a small file in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gptailor.store.folder import RunFolder, write_atomically
from gptailor.wording import plural

FILE = "screening.json"


@dataclass(frozen=True)
class Screening:
    """Who stays. left_out: the others, and how far each is behind where it is least so (None: it gives no numbers).

    examples: scored on the way, per objective.
    """

    kept: tuple[str, ...]
    left_out: Mapping[str, float | None]
    examples: int

    @property
    def text(self) -> str:
        """For people, a sentence or two."""
        asked, names = len(self.kept) + len(self.left_out), ", ".join(self.kept) or "none"
        stay = (
            f"screening: {len(self.kept)} of {plural(asked, 'candidate')} stay ({names}), by {self.examples} examples "
        )
        if not self.left_out:
            return f"{stay}an objective"
        behind = [f"{name} ({'no numbers' if lag is None else f'{lag:.3f}'})" for name, lag in self.left_out.items()]
        return (
            f"{stay}an objective; left out, as others are clearly ahead on every objective and no layer helps: "
            f"{', '.join(behind)}"
        )


def read_screening(folder: RunFolder) -> Screening | None:
    """None where the run has not screened its candidates."""
    path = folder.path / FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return Screening(tuple(found["kept"]), found["left_out"], found["examples"])


def write_screening(folder: RunFolder, screening: Screening) -> None:
    write_atomically(folder.path / FILE, json.dumps(asdict(screening)))
