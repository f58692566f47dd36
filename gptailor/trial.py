"""The records that are stored: what was tried, how it ended, what it scored. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class RunStatus(StrEnum):
    """State of a run as its engine wrote it. *lost* is not written: it is computed on read (see launch.py)."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class TrialStatus(StrEnum):
    RUNNING = "running"
    SUCCESS = "success"
    CRASHED = "crashed"
    CANCELLED = "cancelled"


class Origin(StrEnum):
    """Where a trial's configuration came from."""

    INITIAL = "initial"  # the initial design
    RANDOM = "random"  # drawn at random
    MODEL = "model"  # SMAC's surrogate model
    BASELINE = "baseline"  # a published pruning method, see its run file's baselines
    REPLAY = "replay"  # stored trial told to SMAC again on resume


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark, as lm-eval defines it, over `n_samples` examples. stderr is None where unknown."""

    benchmark: str
    metric: str
    score: float
    stderr: float | None
    n_samples: int
    higher_is_better: bool
    is_objective: bool = True

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.metric}"


@dataclass(frozen=True)
class Trial:
    """One configuration at one budget (examples per benchmark) and seed: the question.

    asked_after: how many trials SMAC had been told of when it asked for this one; a replay asks after as many.
    """

    trial_id: int
    config_id: int
    budget: int
    seed: int
    origin: Origin
    configuration: dict[str, Any]
    started_at: datetime
    suggest_seconds: float
    asked_after: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: the answer. A crashed trial has no scores and says why in `error`.

    told_as: its place, from 0, among the trials that SMAC was told of. worker: the name of who scored it.
    """

    status: TrialStatus
    ended_at: datetime
    scores: tuple[Score, ...] = ()
    stitch_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    error: str | None = None
    told_as: int | None = None
    worker: str | None = None

    @property
    def at_work(self) -> tuple[float, float]:
        """When the trial was at work: beginning and end, in seconds since 1970."""
        end = self.ended_at.timestamp()
        return (end - self.stitch_seconds - self.evaluate_seconds, end)


@dataclass(frozen=True)
class Evaluation:
    """A subject's score outside the search: `dense`, `candidate:NAME`, `baseline:NAME` or `config:ID`.

    plan_hash: of the model that was scored; its examples are stored under it. chance: the score of guessing.
    """

    subject: str
    config_id: int | None
    split: str
    score: Score
    evaluated_at: datetime
    plan_hash: str | None = None
    chance: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """One run as it is opened: the single row of `runs`."""

    run_id: str
    name: str
    spec: dict[str, Any]
    base_model: str
    n_layers: int
    n_removed: int
    seed: int
    created_at: datetime
    versions: dict[str, str] = field(default_factory=dict)


def now() -> datetime:
    return datetime.now(UTC)
