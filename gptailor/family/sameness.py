"""Whether the models and settings that are here are those that a run was computed from; what differs is refused."""

from __future__ import annotations

from gptailor.errors import UserError
from gptailor.family.checkpoint import Checkpoint, Unreadable
from gptailor.family.digests import checkpoint_digests
from gptailor.family.hub import open_checkpoint, revision_of
from gptailor.plan import BASE
from gptailor.spec.run import RunSpec
from gptailor.trial import Digests

MAX_LINES = 6


def refuse_other_files(spec: RunSpec, known: Digests, whose: str) -> None:
    """Raise UserError where the models' files are not those of `known`, which is of `whose`.

    No library of models is opened for that, so it is quick. Models of the hub that are not in the local cache are not
    fetched, and not compared.
    """
    if not known.weights:
        return
    here: dict[str, Checkpoint] = {}
    for name, location in {BASE: spec.base_model, **spec.candidates}.items():
        try:
            found = open_checkpoint(location, name, trust_remote_code=spec.trust_remote_code, download=False)
        except Unreadable as error:
            raise UserError(f"{_where(name)}: {error}") from error
        if found.folder is not None:
            here[name] = found
    now = Digests(checkpoint_digests(here), revisions={name: revision_of(one) or "" for name, one in here.items()})
    refuse_difference(known, now, whose, set(here))


def refuse_difference(known: Digests, now: Digests, whose: str, only: set[str] | None = None) -> None:
    """Raise UserError naming every file and key in which models and settings differ from `whose`.

    only: the models that matter.
    """
    lines = []
    for name, file in sorted({*known.weights, *now.weights}):
        before, after = known.weights.get((name, file)), now.weights.get((name, file))
        if before == after or (only is not None and name not in only):
            continue
        what = "is gone" if after is None else "is new" if before is None else "is not what it was"
        lines.append(f"{_where(name)}: {file} {what}{_moved(known, now, name)}")
    for key, value in now.settings.items():
        if (before := known.settings.get(key, value)) != value:
            lines.append(f"{key}: is {value}, and was {before}")
    if lines:
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise UserError(
            "\n".join(
                [
                    f"the models or settings here are not those of {whose}:",
                    *lines[:MAX_LINES],
                    *more,
                    "scores of one are none of the other: put back what was there, or start a new run",
                ]
            )
        )


def _where(name: str) -> str:
    return "base_model" if name == BASE else f"candidates.{name}"


def _moved(known: Digests, now: Digests, name: str) -> str:
    before, after = known.revisions.get(name), now.revisions.get(name)
    if not before or not after or before == after:
        return ""
    return f" (revision {before[:12]} of the hub is meant, and {after[:12]} is here)"
