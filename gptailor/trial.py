"""The records that are stored: what was tried, how it ended, what it scored. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple


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


REPAIRED = 1_000_000
"""Numbers of configurations from here on are repaired plans: configuration N, repaired, is REPAIRED + N."""
HEALED = 2_000_000
"""Numbers from here on are healed plans, in the order in which they were healed."""
KEPT = 3_000_000
"""Numbers from here on are plans that were kept when they were judged: repaired ones and one-shot cuts, in their
order."""


SIZE = "size"
"""The objective that a run with a range of sizes has beside its benchmarks: the share of the base's layers that a plan
keeps. Lower is better; it is exact, and costs no examples."""


def is_repaired(config_id: int) -> bool:
    return REPAIRED <= config_id < HEALED


def is_healed(config_id: int) -> bool:
    return HEALED <= config_id < KEPT


def next_number(first: int, taken: Iterable[int]) -> int:
    """The next free number of those from `first` on, which is HEALED or KEPT."""
    return max((number for number in taken if first <= number < first + REPAIRED), default=first - 1) + 1


def benchmark_name(benchmark: str, shots: int | None = None) -> str:
    """A benchmark's name in the store and on pages: `gsm8k`, or `gsm8k@5` where the run file asks for five shots.

    One benchmark at two numbers of shots is two benchmarks.
    """
    return benchmark if shots is None else f"{benchmark}@{shots}"


OF_ITS_OWN_UNIT = frozenset(
    {
        *("perplexity", "word_perplexity", "byte_perplexity", "answer_perplexity", "bits_per_byte"),
        *("f1", "mcc", "bleu", "chrf", "chrf++", "ter", "brier_score", "likelihood", "bypass"),
    }
)
"""Metrics of lm-eval, and ours, that are no share of examples."""


def is_share(metric: str, higher_is_better: bool, aggregation: Any = None) -> bool:
    """Whether a score is a share of examples, as an accuracy is, and may be averaged with others.

    aggregation: how the score joins its items, where it is known.
    """
    if not higher_is_better or metric.partition(",")[0] in OF_ITS_OWN_UNIT:
        return False
    return aggregation in ("mean", "nanmean", "mean by task") if isinstance(aggregation, str) else True


def averaged_together(asked: Sequence[tuple[str, bool]]) -> list[int]:
    """Places of the objectives, each a metric and whether higher is better, whose scores make one average.

    Shares of examples, or all where none is one.
    """
    shares = [place for place, (metric, higher) in enumerate(asked) if is_share(metric, higher)]
    return shares or list(range(len(asked)))


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark, as lm-eval defines it, over `n_samples` examples. stderr is None where unknown.

    benchmark: its name with its shots, see `benchmark_name`.
    """

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


class BenchmarkKey(NamedTuple):
    """What tells a benchmark's results apart in the store: its columns benchmark, metric, split."""

    benchmark: str
    metric: str
    split: str


def asked_key(asked: Mapping[str, Any]) -> BenchmarkKey:
    """A benchmark as a stored run file lists it: how its scores are found."""
    name = benchmark_name(str(asked.get("benchmark")), asked.get("num_fewshot"))
    return BenchmarkKey(name, str(asked.get("metric") or "acc"), str(asked.get("split") or ""))


class ItemKey(NamedTuple):
    """Where what each example gave is stored: the model's plan, and the columns of the benchmark."""

    plan_hash: str
    benchmark: str
    metric: str
    split: str

    @property
    def of(self) -> BenchmarkKey:
        return BenchmarkKey(*self[1:])


class SubjectKind(StrEnum):
    """In the order in which people read them."""

    DENSE = "dense"
    CANDIDATE = "candidate"
    BASELINE = "baseline"
    CONFIG = "config"
    REPAIRED = "repaired"
    HEALED = "healed"


CHANGED = (SubjectKind.REPAIRED, SubjectKind.HEALED)
"""Plans that were others before."""


@dataclass(frozen=True)
class Subject:
    """Who has a score: the dense base, a candidate, a baseline's plan, a configuration, a repaired or a healed plan.

    Stored and typed as text: `dense`, `candidate:NAME`, `baseline:METHOD[@SOURCE]`, `config:ID`,
    `repaired:SUBJECT/NAME`, `healed:SUBJECT/NAME`. name: a candidate's, a method's, with its number where it has
    several seeds, a repair's or a heal's. source: the candidate that a baseline shortens (None: it shortens the base),
    or the subject that was repaired or healed, as text.
    """

    kind: SubjectKind
    name: str = ""
    source: str | None = None
    config_id: int | None = None

    @classmethod
    def candidate(cls, name: str) -> Subject:
        return cls(SubjectKind.CANDIDATE, name)

    @classmethod
    def baseline(cls, method: str, source: str | None = None) -> Subject:
        return cls(SubjectKind.BASELINE, method, source)

    @classmethod
    def config(cls, config_id: int) -> Subject:
        return cls(SubjectKind.CONFIG, config_id=int(config_id))

    @classmethod
    def repaired(cls, before: Subject, name: str) -> Subject:
        return cls(SubjectKind.REPAIRED, name, str(before))

    @classmethod
    def healed(cls, before: Subject, name: str) -> Subject:
        return cls(SubjectKind.HEALED, name, str(before))

    @property
    def before(self) -> Subject | None:
        """Who a repaired or healed subject was before; None for every other."""
        if self.kind in CHANGED and self.source is not None:
            return Subject.find(self.source)
        if self.config_id is not None and is_repaired(self.config_id):
            return Subject.config(self.config_id - REPAIRED)
        method, plus, _ = self.name.rpartition(REPAIRED_BY)
        return Subject.baseline(method, self.source) if self.kind is SubjectKind.BASELINE and plus else None

    @classmethod
    def parse(cls, text: str) -> Subject:
        """The subject of such a text. Raises ValueError for any other."""
        found = cls.find(text)
        if found is None:
            raise ValueError(
                f"{text!r} names no subject: use dense, candidate:NAME, baseline:METHOD[@SOURCE], config:ID, "
                "repaired:SUBJECT/NAME or healed:SUBJECT/NAME"
            )
        return found

    @classmethod
    def find(cls, text: str) -> Subject | None:
        """Like parse; None for any other text."""
        kind, _, name = text.partition(":")
        if text == SubjectKind.DENSE:
            return DENSE
        if kind == SubjectKind.CONFIG and name.isascii() and name.isdigit():
            return cls.config(int(name))
        if kind == SubjectKind.CANDIDATE and name:
            return cls.candidate(name)
        if kind == SubjectKind.BASELINE and name:
            method, _, source = name.partition("@")
            return cls.baseline(method, source or None)
        if kind in CHANGED:
            before, _, own = name.rpartition("/")
            subject = cls.find(before)
            return None if subject is None or not own else cls(SubjectKind(kind), own, str(subject))
        return None

    def __str__(self) -> str:
        match self.kind:
            case SubjectKind.DENSE:
                return "dense"
            case SubjectKind.CONFIG:
                return f"config:{self.config_id}"
            case SubjectKind.REPAIRED | SubjectKind.HEALED:
                return f"{self.kind}:{self.source}/{self.name}"
            case _:
                return f"{self.kind}:{self.name}" + (f"@{self.source}" if self.source else "")

    @property
    def label(self) -> str:
        """As a person reads it: `Dense base`, `math, dense`, `sleb on math`, `Plan 7`, `Plan 7, healed (1M)`."""
        match self.kind:
            case SubjectKind.DENSE:
                return "Dense base"
            case SubjectKind.CANDIDATE:
                return f"{self.name}, dense"
            case SubjectKind.BASELINE:
                return f"{self.name}{_REMARKS.get(self.name.partition(LESS)[0], '')} on {self.source or 'base'}"
            case SubjectKind.REPAIRED | SubjectKind.HEALED:
                return f"{self.before.label if self.before else self.source}, {self.kind} ({self.name})"
            case SubjectKind.CONFIG if self.config_id is not None and is_repaired(self.config_id):
                return f"Plan {self.config_id - REPAIRED}, repaired"
            case SubjectKind.CONFIG if self.config_id is not None and self.config_id >= KEPT:
                return f"Kept plan {self.config_id - KEPT + 1}"
            case SubjectKind.CONFIG if self.config_id is not None and self.config_id >= HEALED:
                return f"Healed plan {self.config_id - HEALED + 1}"
            case SubjectKind.CONFIG:
                return f"Plan {self.config_id}"


REPAIRED_BY = "+"
"""Between a baseline's name and the method that its plan was repaired by, in a run that repairs."""
LESS = "_less_"
"""Between a baseline's name and the number of layers that go, where a run cuts at several."""
_REMARKS = {"besa": " (zeros, not smaller)"}
"""What has to stand beside a baseline's numbers."""

DENSE = Subject(SubjectKind.DENSE)


@dataclass(frozen=True)
class Evaluation:
    """A subject's score outside the search.

    config_id: of a configuration, or of a baseline's plan. plan_hash: of the model that was scored; its examples are
    stored under it. chance: the score of guessing. aggregation: how the score joins its items. resampled: where that is
    not their mean, the score over resamples of the examples (gptailor/evaluate/resampling.py).
    """

    subject: Subject
    config_id: int | None
    split: str
    score: Score
    evaluated_at: datetime
    plan_hash: str | None = None
    chance: float | None = None
    aggregation: str | None = None
    resampled: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Digests:
    """What a run's numbers were computed from.

    weights: (model, file) -> digest. settings: key of the run file -> its value, as text. examples: by benchmark, a
    digest an example in the seeded order, of those that were read so far. revisions: of models from the hub.
    """

    weights: Mapping[tuple[str, str], str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[BenchmarkKey, list[str]] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)


class Quantity(StrEnum):
    """What a model is worth in use; the first two count tokens of all texts side by side."""

    DECODE = "decode"  # new tokens a second
    PREFILL = "prefill"  # read tokens a second, until the first new one is there
    FIRST_TOKEN = "first_token"  # seconds
    MEMORY = "memory"  # bytes at most while it writes
    DISK = "disk"  # bytes of its files


@dataclass(frozen=True)
class Measurement:
    """One quantity of an exported plan beside the dense base, measured in turns in one process.

    device: its name and what torch calls the numbers, such as `cpu, float32`. batch: texts side by side. value, dense:
    medians over the rounds. ratio: the median of each round's value by dense. spread, ratio_spread: half the width of
    their middle halves.
    """

    subject: Subject
    config_id: int | None
    plan_hash: str
    device: str
    quantity: Quantity
    batch: int
    value: float
    spread: float
    dense: float
    ratio: float
    ratio_spread: float
    measured_at: datetime


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
