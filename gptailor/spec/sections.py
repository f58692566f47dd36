"""The parts of a run file: benchmarks, operations, merges, removal, repair, budget, workers."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gptailor.spec.records import Record
from gptailor.spec.values import (
    NAME,
    SPLIT,
    Count,
    Number,
    Place,
    Share,
    Whole,
    interval,
    known_texts,
    parse_bytes,
    parse_duration,
    share_of,
)
from gptailor.trial import benchmark_name
from gptailor.wording import removal


class SpaceOperation(StrEnum):
    """What the search may do with layers.

    The paper's ablations are [remove], [remove, select] and [remove, fold]: a removed layer's weights go, by a searched
    factor, into the kept layer before it. repair: what was chosen gets weights that are fitted to a dense model's,
    without training (see Repair).
    """

    REMOVE = "remove"
    SELECT = "select"
    MERGE = "merge"
    FOLD = "fold"
    REPAIR = "repair"


DEFAULT_OPERATIONS = (SpaceOperation.REMOVE, SpaceOperation.SELECT, SpaceOperation.MERGE)


class Baseline(StrEnum):
    """Published ways to make a model smaller, to compare a search with (gptailor/baselines/)."""

    RANDOM = "random"
    LAST = "last"
    BLOCK_INFLUENCE = "block_influence"
    MAGNITUDE = "magnitude"
    ANGULAR = "angular"
    LLM_STREAMLINE = "llm_streamline"
    LORP = "lorp"
    SLEB = "sleb"
    SHORTENED_PERPLEXITY = "shortened_perplexity"
    SHORTENED_TAYLOR = "shortened_taylor"
    BLOCK_INFLUENCE_PRUNE_COMP = "block_influence_prune_comp"
    ANGULAR_PRUNE_COMP = "angular_prune_comp"
    BLOCK_INFLUENCE_REPLACEME = "block_influence_replaceme"
    ANGULAR_REPLACEME = "angular_replaceme"
    LLM_PRUNER = "llm_pruner"
    LLM_PRUNER_MIXED = "llm_pruner_mixed"
    SLIMGPT = "slimgpt"
    BESA = "besa"
    LACO = "laco"
    LACO_NOTEBOOK = "laco_notebook"
    GREEDY = "greedy"
    EVOLUTION = "evolution"


class RepairMethod(StrEnum):
    """Repairs of a cut model in closed form, or nearly (gptailor/stitch/edits/)."""

    REPLACEME = "replaceme"
    REPLACEME_COSINE = "replaceme_cosine"
    REFIT = "refit"
    PRUNE_COMP = "prune_comp"
    RCPU = "rcpu"


Reading = tuple[str, str, int | None]
"""What a model reads for a benchmark, whatever the metric: its name, its split, its shots."""


class Benchmark(Record):
    """One lm-eval task (or group of tasks) with the metric it is read by."""

    benchmark: Annotated[str, Field(min_length=1, max_length=200)]
    """An lm-eval task, or a group of them, by its name."""
    metric: Annotated[str, Field(min_length=1, max_length=100)] = "acc"
    """One of the task's metrics, or one of gptailor's: choice_prob, answer_perplexity, agree, closeness."""
    split: str = "validation"
    """train, validation or test, or a part of one: `validation[162:500]` leaves out the first 162 examples of the
    seeded order, which are those that rungs up to 162 read, and ends before the 500th."""
    num_fewshot: Annotated[Whole, Field(ge=0, le=64)] | None = None
    """Worked examples before each question. Without it: as the task's file says, else none."""

    @field_validator("split")
    @classmethod
    def _known_split(cls, value: str) -> str:
        found = SPLIT.fullmatch(value)
        if not found or (found["end"] and int(found["end"]) <= int(found["start"] or 0)):
            raise ValueError("must be train, validation or test, or a part of one such as validation[162:500]")
        return value

    @property
    def key(self) -> str:
        """The benchmark's name with its shots, as it is stored and shown."""
        return benchmark_name(self.benchmark, self.num_fewshot)

    @property
    def name(self) -> str:
        return f"{self.key}/{self.metric}"

    @property
    def reading(self) -> Reading:
        return self.benchmark, self.split, self.num_fewshot

    @property
    def whole_split(self) -> str:
        return self.split.partition("[")[0]

    @property
    def part(self) -> tuple[int, int | None]:
        """The first example and the end of those that count, in nested order; None: to the split's end."""
        found = SPLIT.fullmatch(self.split)
        assert found is not None
        return int(found["start"] or 0), int(found["end"]) if found["end"] else None

    def overlaps(self, other: Benchmark, read: int | None = None) -> bool:
        """Whether this and the first `read` examples of the other (none: all) share examples."""
        if (self.benchmark, self.whole_split) != (other.benchmark, other.whole_split):
            return False
        (first, end), (theirs, their_end) = self.part, other.part
        ends = [bound for bound in (their_end, None if read is None else theirs + read) if bound is not None]
        return first < min(ends, default=math.inf) and theirs < (math.inf if end is None else end)


class HeldOut(Benchmark):
    """A benchmark that only judges the result; read on its test split unless said otherwise."""

    split: str = "test"
    """As an objective's, on a split or part that the search does not read."""


class Merge(Record):
    """How several candidates' layers become one: a mergekit method and the range of its factor."""

    method: str = "task_arithmetic"
    """A method of mergekit: task_arithmetic (the paper's), linear, ties, dare_ties, slerp and others."""
    factor: tuple[Number, Number] = (0.0, 1.0)
    """From the least to the greatest factor: how much of the candidates' differences a merge adds; 1 adds them whole.
    With other methods than task_arithmetic it is mergekit's `lambda` (ties, dare_ties), slerp's `t`, or the weight of
    each candidate (linear, with the rest on the base)."""
    parameters: dict[str, float | int | bool] = Field(default={})
    """Further parameters of the method, such as `{density: 0.5}` for ties."""

    @field_validator("method")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9_]{1,40}", value):
            raise ValueError("must be the name of one of mergekit's methods, such as task_arithmetic, ties or slerp")
        return value

    @field_validator("parameters", mode="before")
    @classmethod
    def _scalars(cls, value: Any) -> Any:
        for name, scalar in value.items() if isinstance(value, dict) else ():
            if not isinstance(scalar, (bool, int, float)) or not math.isfinite(scalar):
                raise ValueError(f"{name} must be a finite number, true or false")
        return value

    @field_validator("factor")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return interval(value, lowest=-2.0, highest=4.0)


class Removal(Record):
    """How much is to go, in another measure than layers, or from how many layers to how many: one of these."""

    parameters: Share | None = None
    """Share of the base's parameters that is to go, such as 20%: the fewest layers that hold as many, whichever go."""
    memory: str | None = None
    """What the weights of the shorter model may take in the run's number type, such as 9GB: the fewest layers without
    which they fit, whichever go."""
    speed: Number | None = None
    """How many times as fast as the dense base new tokens are to be, such as 1.3: measured before the search begins, on
    its device, in plain transformers, one text at a time. The fewest layers without which that is reached."""
    fewest: Annotated[Count | None, Field(alias="from")] = None
    """With `to`: the fewest layers that a plan leaves out, a number or a share. How many go is then a part of the plan,
    and size is an objective."""
    most: Annotated[Count | None, Field(alias="to")] = None
    """With `from`: the most layers that a plan leaves out."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _part(cls, value: Any) -> Any:
        share = share_of(value)
        if value is not None and (type(share) is not float or not 0 < share < 1):
            raise ValueError("must be a share such as 20% or 0.2")
        return share

    @field_validator("memory", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        if value is not None:
            parse_bytes(str(value))
        return value

    @field_validator("speed")
    @classmethod
    def _faster(cls, value: float | None) -> float | None:
        if value is not None and not 1 < value <= 100:
            raise ValueError("must be above 1, which is as fast as the dense base, such as 1.3")
        return value

    @model_validator(mode="after")
    def _one(self) -> Removal:
        is_range = self.fewest is not None or self.most is not None
        if sum([self.parameters is not None, self.memory is not None, self.speed is not None, is_range]) != 1:
            raise ValueError("must say one of parameters, memory or speed, or from and to")
        if is_range and (not self.fewest or not self.most):
            raise ValueError("must say both from and to, from one layer on, such as {from: 4, to: 12}")
        if type(self.fewest) is type(self.most) and is_range and self.fewest >= self.most:  # type: ignore[operator]
            raise ValueError("must go from fewer layers to more, such as {from: 4, to: 12}; write one number alone")
        return self

    @property
    def is_range(self) -> bool:
        """Whether the number of layers is a part of the plan."""
        return self.most is not None

    def __str__(self) -> str:
        return removal(self.model_dump())


class Repair(Record):
    """How a cut model is repaired. Nothing is trained: weights are fitted to what a dense model makes of some texts."""

    method: RepairMethod = RepairMethod.REFIT
    """refit: the output projections' whole matrices, by ridge regression. replaceme and replaceme_cosine: a linear map
    behind the last layer before each gap. rcpu: the same, a rotation. prune_comp: one scale a gap."""
    texts: Place = "objectives"
    """What it is computed from: objectives (prompts with right answers, from the objectives' own examples), base
    (written by the base itself), `file:PATH` (plain text, or .jsonl whose rows have a "text"), `hub:DATA_SET` or
    `hub:DATA_SET:CONFIG`; several, joined by +, share the tokens."""
    tokens: Annotated[Whole, Field(ge=100, le=10_000_000)] | None = None
    """Tokens to read at most. Without it: 12 for each column of the MLP's output projection, 16,384 at most."""
    teacher: str | None = None
    """The dense model to come near to: base, or a candidate by its name. Without it: the one that most of the kept
    layers come from."""
    layers: Literal["kept", "gaps"] = "kept"
    """Of refit: every kept layer from the first gap on, or those before a gap alone."""
    projections: Literal["mlp", "both"] = "mlp"
    """Of refit: the MLP's output projection alone, or the attention's too."""

    @field_validator("texts")
    @classmethod
    def _known_source(cls, value: str) -> str:
        return known_texts(value)

    @model_validator(mode="after")
    def _the_methods_own(self) -> Repair:
        if self.method is not RepairMethod.REFIT and (self.layers, self.projections) != ("kept", "mlp"):
            raise ValueError(f"layers and projections are settings of refit; leave them out for {self.method}")
        return self

    def tokens_for(self, inner: int) -> int:
        """Tokens to read at most. inner: width of the MLP, of which a fit has as many unknowns."""
        return self.tokens if self.tokens is not None else min(12 * inner, 16_384)

    @property
    def settings(self) -> dict[str, str]:
        """Those of the edit that are not its defaults."""
        found = {"teacher": self.teacher or "", "layers": self.layers, "projections": self.projections}
        return {name: value for name, value in found.items() if value not in ("", "kept", "mlp")}


class Budget(Record):
    """Examples per benchmark: the lowest and highest rung, and Hyperband's ratio between rungs."""

    min: Annotated[Whole, Field(ge=1)] = 100
    """Examples per benchmark on the lowest rung, at least: rungs go down from the highest one by the ratio."""
    max: Annotated[Whole, Field(ge=1)] = 1000
    """Examples per benchmark on the highest rung: the full budget."""
    eta: Annotated[Whole, Field(ge=2, le=10)] = 3
    """Ratio of rungs: the best one in so many plans climbs to the next, which reads so many times the examples."""

    @model_validator(mode="after")
    def _min_below_max(self) -> Budget:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be above max ({self.max})")
        return self

    @property
    def rungs(self) -> tuple[int, ...]:
        """Budgets that Hyperband visits, ascending: max / eta^k down to min (100 to 1000 by 3: 111, 333, 1000)."""
        count = math.floor(math.log(self.max / self.min) / math.log(self.eta) + 1e-9) + 1
        return tuple(round(self.max / self.eta**k) for k in reversed(range(count)))


class Slurm(Record):
    """Jobs that a SLURM cluster is asked for: `jobs` of them, a worker each, with `gpus` GPUs, `cores` and `memory`."""

    jobs: Annotated[Whole, Field(ge=1, le=1024)]
    """Jobs to ask for: a worker each."""
    cores: Annotated[Whole, Field(ge=1, le=1024)] = 8
    """Processor cores of a job."""
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[MGT]i?B$")] = "64GB"
    """Host memory of a job."""
    gpus: Annotated[Whole, Field(ge=0, le=64)] = 1
    """GPUs of a job: as many as hold the base."""
    walltime: str = "24h"
    """Time limit of a job, such as 24h."""
    queue: Annotated[str, Field(pattern=NAME)] | None = None
    """SLURM's partition. Without it: the cluster's default."""
    account: Annotated[str, Field(pattern=NAME)] | None = None
    """SLURM's account. Without it: the cluster's default."""

    @field_validator("walltime")
    @classmethod
    def _duration(cls, value: str) -> str:
        parse_duration(value)
        return value


class Workers(Record):
    """Who scores trials, where it is not the engine's own process: one of three."""

    local: Literal["auto"] | int | None = None
    """Processes on this machine. auto: one for each visible GPU (without any, for every two cores). Or their number:
    fewer than GPUs divide them, more share them."""
    scheduler: Annotated[str, Field(max_length=300)] | None = None
    """The address of a Dask scheduler that runs already, such as tcp://host:8786."""
    slurm: Slurm | None = None
    """Jobs that a SLURM cluster is asked for."""

    @field_validator("local", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if value not in ("auto", None) and (type(value) is not int or not 1 <= value <= 256):
            raise ValueError("must be auto, or a number of processes from 1 to 256")
        return value

    @field_validator("scheduler")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.\-]+):\d{1,5}", value):
            raise ValueError("must be the address of a Dask scheduler such as tcp://host:8786 or tls://host:8786")
        return value

    @model_validator(mode="after")
    def _one(self) -> Workers:
        if sum(way is not None for way in (self.local, self.scheduler, self.slurm)) != 1:
            raise ValueError("must say one of local, scheduler or slurm")
        return self
