"""What a person adds to a run in the dashboard: a name, a note, tags.

A small file, so that the engine's database stays the engine's alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from gptailor.errors import UserError
from gptailor.store.folder import RunFolder, write_atomically

MAX_NAME, MAX_NOTE, MAX_TAG, MAX_TAGS = 80, 20_000, 40, 20
_MAX_BYTES = 8 * (MAX_NOTE + MAX_NAME + MAX_TAG * MAX_TAGS)


@dataclass(frozen=True)
class Notes:
    """name: shown instead of the run file's, where not empty. Raises UserError for what is too long."""

    name: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME:
            raise UserError(f"name: at most {MAX_NAME} characters, got {len(self.name)}")
        if len(self.note) > MAX_NOTE:
            raise UserError(f"note: at most {MAX_NOTE:,} characters, got {len(self.note):,}")
        if len(self.tags) > MAX_TAGS or any(not tag.strip() or len(tag) > MAX_TAG for tag in self.tags):
            raise UserError(f"tags: at most {MAX_TAGS}, each of 1-{MAX_TAG} characters")
        for field, text in (("name", self.name), *(("tags", tag) for tag in self.tags)):
            if any(ord(c) < 32 or ord(c) == 127 for c in text):
                raise UserError(f"{field}: control characters are not accepted")


def read_notes(folder: RunFolder) -> Notes:
    """The run's notes; empty ones where there are none, or none that can be read."""
    try:
        if folder.notes.stat().st_size > _MAX_BYTES:
            return Notes()
        data = json.loads(folder.notes.read_text(encoding="utf-8"))
        return Notes(str(data["name"]), str(data["note"]), tuple(map(str, data["tags"])))
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return Notes()


def write_notes(folder: RunFolder, notes: Notes) -> None:
    """Replace the run's notes. Raises UserError where the run is gone or its folder cannot be written."""
    text = json.dumps(asdict(notes), ensure_ascii=True, indent=1)
    try:
        write_atomically(folder.notes, text)
    except OSError as error:
        raise UserError(f"run {folder.run_id}: the notes cannot be saved: {error.strerror}") from error
