"""Run files: what a person asks of a search. YAML in and out, every field validated, every refusal names its field.

`RunSpec` is frozen: it is written into the run's folder as it is and never changes while the run lives.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from gptailor.errors import UserError
from gptailor.plan import BASE, layers_of
from gptailor.runfile import apply_change, explain, kind, load_yaml, read_text
from gptailor.trial import benchmark_name
from gptailor.wording import removal

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$"
_SPLIT = re.compile(r"(train|validation|test)(\[(?P<start>\d{0,9}):(?P<end>\d{0,9})\])?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_PLAIN, _KEYED = "<plain>", "<keyed>"  # of two forms of one key, which no path into a run file names
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
"""Not what merely looks like one: '60' is text, true is no number, 1 is no flag."""


def parse_duration(text: str) -> float:
    """Seconds of '90s', '45m', '2h', '1d' or a sum such as '1h30m'. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(n + u for n, u in parts) != text.replace(" ", ""):
        raise ValueError("must be a duration such as 90s, 45m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds:
        raise ValueError("must be longer than nothing, such as 90s, 45m, 2h or 1h30m")
    return seconds


def parse_bytes(text: str) -> float:
    """Bytes of '9GB', '512 MiB' and the like. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?([MGT]i?B)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError("must be an amount such as 9GB or 512MiB")
    return float(found[1]) * _BYTES[found[2]]


def _share(value: Any) -> Any:
    """The share that a text such as '25%' means; anything else as it is."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?%", value.strip()) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


def _number_of_layers(value: Any) -> Any:
    value = _share(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "must be a number of layers such as 8, a fraction of them such as 0.25, or keys such as {parameters: 20%}, "
            "{memory: 9GB}, {speed: 1.3} or {from: 4, to: 12}"
        )
    if value < 0 or not math.isfinite(value) or (isinstance(value, float) and value >= 1 and value != int(value)):
        raise ValueError("must be a whole number of layers such as 8, or a fraction between 0 and 1 such as 0.25")
    if isinstance(value, float) and value == 1:
        raise ValueError("could mean one layer or all of them; write 1 for one layer, or a fraction below 1")
    return int(value) if value >= 1 else value


def _interval(value: tuple[float, float], *, lowest: float, highest: float) -> tuple[float, float]:
    low, high = value
    if not lowest <= low <= high <= highest:
        raise ValueError(f"must be [low, high] with {lowest} <= low <= high <= {highest}")
    return round(low, 6), round(high, 6)  # ConfigSpace has no finer ranges


def _texts(value: str) -> str:
    for source in value.split("+"):
        if source not in ("objectives", "base") and not re.fullmatch(r"(file|hub):.+", source):
            raise ValueError("must be objectives, base, file:PATH or hub:DATA_SET, or several joined by +")
    return value


ODD = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's names for control characters, halves of characters (bytes that are no UTF-8) and ends of lines."""


def _plain_path(text: str) -> str:
    """A path or a hub id as it can be written into files and looked up on a disk."""
    odd = [c for c in text if unicodedata.category(c) in ODD]
    if odd:
        raise ValueError(f"has the character {odd[0]!a}, which cannot be in a path here; rename the folder")
    if any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("has a name of more than 255 bytes, which no folder has")
    return text


Place = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_plain_path)]


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


class _Record(BaseModel):
    """The text below a field says what its key means.

    The reference page, the JSON schema and the Launch page's help are made of it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, serialize_by_alias=True
    )


Reading = tuple[str, str, int | None]
"""What a model reads for a benchmark, whatever the metric: its name, its split, its shots."""


class Benchmark(_Record):
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
        found = _SPLIT.fullmatch(value)
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
        found = _SPLIT.fullmatch(self.split)
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


class Merge(_Record):
    """How several candidates' layers become one: a mergekit method and the range of its factor."""

    method: str = "task_arithmetic"
    """A method of mergekit: task_arithmetic (the paper's), linear, ties, dare_ties, slerp and others."""
    factor: tuple[Number, Number] = (0.0, 1.0)
    """From the least to the greatest factor: how much of the candidates' differences a merge adds; 1 adds them whole.
    With other methods than task_arithmetic it is mergekit's `lambda` (ties, dare_ties), slerp's `t`, or the weight of
    each candidate (linear, with the rest on the base)."""
    parameters: dict[str, float | int | bool] = {}
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
        return _interval(value, lowest=-2.0, highest=4.0)


_PERCENT = {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"}
Share = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, _PERCENT]})]
Count = Annotated[
    int | float,
    BeforeValidator(_number_of_layers),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "number"}, _PERCENT]}),
]
"""Layers: a number of them, or a share."""


class Removal(_Record):
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
        share = _share(value)
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


class Repair(_Record):
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
        return _texts(value)

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


class Budget(_Record):
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


class Slurm(_Record):
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
    queue: Annotated[str, Field(pattern=_NAME)] | None = None
    """SLURM's partition. Without it: the cluster's default."""
    account: Annotated[str, Field(pattern=_NAME)] | None = None
    """SLURM's account. Without it: the cluster's default."""

    @field_validator("walltime")
    @classmethod
    def _duration(cls, value: str) -> str:
        parse_duration(value)
        return value


class Workers(_Record):
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


class RunSpec(_Record):
    """One run, as asked. Paths are relative to the folder in which the run is started, also when it is resumed."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    """What people call the run."""
    base_model: Place
    """The model whose embeddings, final norm and output head are kept: a Hugging Face model's folder on this machine,
    or a hub id such as owner/name."""
    candidates: dict[str, Place] = {}
    """Fine-tunes of the base that may lend layers, each under a name: folders or hub ids of full models or of LoRA
    adapters (PEFT folders)."""
    remove: Annotated[
        Annotated[Count, Tag(_PLAIN)] | Annotated[Removal, Tag(_KEYED)],
        Discriminator(lambda value: _KEYED if isinstance(value, (Mapping, Removal)) else _PLAIN),
    ]
    """How many layers to leave out: a number such as 8, or a share of them such as 0.25 or 25%, rounded up. Or the
    measure that they are to reach: `{parameters: 20%}`, `{memory: 9GB}`, `{speed: 1.3}`. Or a range, such as
    `{from: 4, to: 12}`: the search then looks for the best plans of every size at once."""
    operations: tuple[SpaceOperation, ...] = DEFAULT_OPERATIONS
    """What may happen to layers. remove: leave layers out. select: take a layer from one candidate. merge: make one of
    several. fold: put a removed layer's weights, by a searched factor, into the kept layer before it. repair: fit the
    weights of the best plans, once they are found, to a dense model's work. The paper's ablations are remove alone,
    remove with select, and remove with fold."""
    merge: Merge = Merge()
    """How several candidates' layers become one."""
    repair: Repair | None = None
    """How plans are repaired, where operations lists repair: a search's best plans, which are then judged on the
    selection beside themselves unrepaired, and baselines."""
    output_scale: tuple[Number, Number] | None = None
    """Search a factor on each kept layer's output projections too, from the least to the greatest, such as
    `[0.8, 1.2]`; an export folds it into the weights."""
    objectives: Annotated[tuple[Benchmark, ...], Field(min_length=1, max_length=32)]
    """What the search optimises: benchmarks, each with a metric and a split."""
    held_out: Annotated[tuple[HeldOut, ...], Field(max_length=64)] = ()
    """What the result is judged by and the search never sees: benchmarks on other splits."""
    selection: Annotated[tuple[Benchmark, ...], Field(max_length=32)] = ()
    """Benchmarks on splits that neither the search nor the held-out results use: the best plans are scored there before
    one is called best."""
    include_path: tuple[Place, ...] = ()
    """Folders on this machine that hold lm-eval task files, besides lm-eval's own."""
    budget: Budget = Budget()
    """How many examples of each benchmark a plan is scored on."""
    trials: Annotated[Whole, Field(ge=1, le=100_000)] = 500
    """Plans to try, each on one rung. The paper takes 500."""
    aim: Literal["front", "mean"] = "front"
    """Of several objectives: front looks for their best trade-offs, mean for the best mean retention."""
    screen: Literal["auto"] | Flag = "auto"
    """Whether candidates are screened before the search, so that those that help nowhere do not widen its space. auto:
    from six candidates on."""
    suggester: Literal["smac", "random"] = "smac"
    """Who proposes plans. random is there to compare SMAC with: the same start and rungs, then plans drawn at
    random."""
    baselines: tuple[Baseline, ...] = ()
    """Published ways to make a model smaller, each on the base and on every candidate, under the same budget of
    examples: they leave as many layers out, or make layers narrower until as many parameters are gone. Where any are
    listed, their plans are scored instead of searching; compare such a run with one that searches."""
    baselines_on: tuple[str, ...] = ()
    """The models that the baselines shorten: base, or candidates by their names. Without it: all of them."""
    baselines_texts: Place = "objectives"
    """What baselines that edit weights are computed from (llm_pruner, slimgpt, besa, and those with a repair of their
    own): as a repair's texts."""
    walltime: str | None = None
    """Time limit of all trials together, such as 90m or 2h30m."""
    trial_walltime: str | None = None
    """Time limit of one trial, which then counts as crashed."""
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    """The same seed gives the same trials."""
    device: str = "auto"
    """Where models are computed: cpu, mps, cuda, one GPU such as cuda:1, or auto: the first GPU (more, if the base
    needs them), else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; auto: as the base is stored."""
    batch_size: Literal["auto"] | int = "auto"
    """auto, or a number of rows, which stand for 128 tokens each: fewer take less memory."""
    workers: Workers | None = None
    """Who scores trials side by side. Without it: the engine's own process, one trial after another."""
    chat_template: Flag = False
    """Put prompts into the tokenizer's chat template: for models that were tuned to converse."""
    chat_template_args: dict[str, bool | int | float | str] = {}
    """Settings that the chat template itself reads, such as `{enable_thinking: false}`."""
    trust_remote_code: Flag = False
    """Run the Python code that a model's folder brings. The dashboard never sets it."""

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if any(ord(c) < 32 or ord(c) == 127 for c in value) or not value.strip():
            raise ValueError("must have a visible character and no control characters")
        return value.strip()

    @field_validator("candidates")
    @classmethod
    def _candidate_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.match(_NAME, name) or name == BASE or "+" in name:
                raise ValueError(
                    f"{name!r} cannot name a candidate: use 1-64 letters, digits, '_', '.' or '-', and not {BASE!r}"
                )
        if len(value) > 16:
            raise ValueError(f"{len(value)} candidates; at most 16 are supported")
        return value

    @field_validator("operations")
    @classmethod
    def _known_set(cls, value: tuple[SpaceOperation, ...]) -> tuple[SpaceOperation, ...]:
        if len(set(value)) != len(value) or not value:
            raise ValueError(
                "must list each of remove, select, merge, fold, repair at most once, and at least one of them"
            )
        return value

    @field_validator("baselines_texts")
    @classmethod
    def _known_texts(cls, value: str) -> str:
        return _texts(value)

    @field_validator("chat_template_args", mode="before")
    @classmethod
    def _single_values(cls, value: Any) -> Any:
        for name, setting in value.items() if isinstance(value, dict) else ():
            if not isinstance(setting, (bool, int, float, str)):
                raise ValueError(f"{name} must be true, false, a number or text")
        return value

    @field_validator("output_scale")
    @classmethod
    def _scale_interval(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return value if value is None else _interval(value, lowest=0.0, highest=4.0)

    @field_validator("walltime", "trial_walltime")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
            raise ValueError("must be auto, cpu, mps, cuda or a certain GPU such as cuda:1")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or not 1 <= value <= 4096):
            raise ValueError("must be auto, or a number of rows from 1 to 4096")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        lends = {SpaceOperation.SELECT, SpaceOperation.MERGE} & set(self.operations)
        if lends and not self.candidates:
            raise ValueError("candidates: selecting or merging needs at least one; or set operations: [remove]")
        if SpaceOperation.MERGE in lends and len(self.candidates) < 2:
            raise ValueError("operations: merge needs two or more candidates; with one, use [remove, select]")
        if SpaceOperation.REMOVE not in self.operations and self.remove:
            raise ValueError(f"remove: is {self.remove}, but operations does not list remove; set remove: 0 or add it")
        if SpaceOperation.REMOVE in self.operations and not self.remove:
            raise ValueError("remove: is 0, but operations lists remove; give a number of layers or drop it")
        if SpaceOperation.FOLD in self.operations and SpaceOperation.REMOVE not in self.operations:
            raise ValueError("operations: fold says what becomes of removed layers; add remove")
        self._check_repair()
        if self.chat_template_args and not self.chat_template:
            raise ValueError("chat_template_args: are settings of the chat template; set chat_template: true")
        if self.baselines and not self.remove:
            raise ValueError("baselines: they leave layers out; set remove to how many")
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError("baselines: the same one is listed twice")
        for name in self.baselines_on:
            if name != BASE and name not in self.candidates:
                raise ValueError(f"baselines_on: {name!r} is neither {BASE!r} nor a candidate of this run")
        if self.workers is not None and re.fullmatch(r"cuda:\d+", self.device):
            raise ValueError(f"device: {self.device} is one GPU, and workers divide all of them; use auto or cuda")
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError("objectives: the same benchmark and metric is listed twice")
        judges = [(judge.name, judge.split) for judge in self.held_out]
        if len(set(judges)) != len(judges):
            raise ValueError("held_out: the same benchmark, metric and split is listed twice")
        for key, ones in (("held_out", self.held_out), ("selection", self.selection)):
            for index, one in enumerate(ones):
                self._check_unread(f"{key}.{index}", one)
        for index, chooser in enumerate(self.selection):
            if any(chooser.overlaps(judge) for judge in self.held_out):
                raise ValueError(
                    f"selection.{index}: {chooser.benchmark} on its {chooser.split} split is held out; the selection "
                    "needs examples of its own"
                )
        if len({(o.name, o.split) for o in self.selection}) < len(self.selection):
            raise ValueError("selection: the same benchmark, metric and split is listed twice")
        return self

    def _check_repair(self) -> None:
        """Raise ValueError where it is not clear what is to be repaired, by whom, or on what it is judged."""
        if SpaceOperation.REPAIR not in self.operations:
            if self.repair is not None:
                raise ValueError("repair: says how, but operations does not list repair; add it, or drop the key")
            return
        if SpaceOperation.REMOVE not in self.operations:
            raise ValueError("operations: repair mends what removed layers leave; add remove")
        if not self.selection and not self.baselines:
            raise ValueError(
                "operations: repair needs selection splits, on which repaired plans are judged beside themselves "
                "unrepaired; add some under selection"
            )
        teacher = self.repair.teacher if self.repair else None
        if teacher not in (None, BASE) and teacher not in self.candidates:
            raise ValueError(f"repair.teacher: {teacher!r} is neither {BASE!r} nor a candidate of this run")

    @property
    def repairs(self) -> Repair | None:
        """How plans are repaired, where they are."""
        return (self.repair or Repair()) if SpaceOperation.REPAIR in self.operations else None

    def _check_unread(self, where: str, one: Benchmark) -> None:
        """Raise ValueError where the search reads what is to judge or to choose its plans."""
        for objective in self.objectives:
            if one.overlaps(objective, self.budget.max):
                unread = f"{one.whole_split}[{objective.part[0] + self.budget.max}:]"
                raise ValueError(
                    f"{where}: {one.benchmark} on its {one.split} split is an objective of the search; use another "
                    f"split, or what the search does not read of it, {unread}"
                )

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """Every benchmark that the run file names, whatever for."""
        records = {key: record_of(field.annotation) for key, field in type(self).model_fields.items()}
        keys = [key for key, record in records.items() if record is not None and issubclass(record, Benchmark)]
        return tuple(benchmark for key in keys for benchmark in getattr(self, key))

    @property
    def batch_tokens(self) -> int | Literal["auto"]:
        """Packs are cut by tokens, whatever the number of rows: a batch size of N stands for N x 128 tokens."""
        return "auto" if self.batch_size == "auto" else self.batch_size * 128

    @property
    def walltime_seconds(self) -> float | None:
        return None if self.walltime is None else parse_duration(self.walltime)

    @property
    def trial_walltime_seconds(self) -> float | None:
        return None if self.trial_walltime is None else parse_duration(self.trial_walltime)

    def n_removed(self, n_layers: int) -> int:
        """Layers to remove from a base of `n_layers`, of a range the most. Raises UserError."""
        return self.removals(n_layers)[-1]

    def removals(self, n_layers: int) -> range:
        """The numbers of layers that a plan may leave out: one, or those of a range. Raises UserError.

        A fraction is rounded up, as in the paper. Where `remove` says another measure, gptailor/family/removal.py puts
        the number in its place.
        """
        asked = self.remove
        if not isinstance(asked, Removal):
            return range(count := _layers(asked, n_layers), count + 1)
        assert asked.fewest is not None and asked.most is not None, "not known before the base is read"
        fewest, most = _layers(asked.fewest, n_layers), _layers(asked.most, n_layers)
        if fewest >= most:
            raise UserError(f"remove: from {asked.fewest} to {asked.most} is {fewest} to {most} of {n_layers} layers")
        return range(fewest, most + 1)

    @property
    def has_range(self) -> bool:
        """Whether plans differ in how many layers they leave out, so that size is an objective."""
        return isinstance(self.remove, Removal) and self.remove.is_range

    def removing(self, n_removed: int) -> RunSpec:
        """The same run with this number of layers for `remove`."""
        return self.model_copy(update={"remove": n_removed})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _layers(asked: int | float, n_layers: int) -> int:
    count = layers_of(asked, n_layers)
    if not 0 <= count < n_layers:
        raise UserError(f"remove: {asked} takes {count} of {n_layers} layers; at least one must stay")
    return count


def evenly(numbers: range, most: int) -> list[int]:
    """Up to `most` of these numbers, with equal steps as near as that goes, both ends among them, ascending."""
    if len(numbers) <= most:
        return list(numbers)
    step = (len(numbers) - 1) / (most - 1)
    return [numbers[round(index * step)] for index in range(most)]


def load_spec(path: str | Path, changes: list[str] | None = None) -> RunSpec:
    """Read a run file and apply `key=value` changes (dotted keys, YAML values). Raises UserError."""
    return parse_spec(read_text(Path(path), "run file"), changes, where=f"run file {path}")


def parse_spec(text: str, changes: list[str] | None = None, where: str = "run file") -> RunSpec:
    """Like load_spec, from text."""
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected keys such as 'name' and 'base_model', got {kind(data)}")
    for change in changes or []:
        apply_change(data, change)
    return build_spec(data, where)


def build_spec(data: dict[str, Any], where: str = "run file") -> RunSpec:
    """Validate plain data. Raises UserError that lists every wrong field: path, value, and what would be accepted."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if len(found) > 1:  # a list whose one entry is wrong is too short as well, says pydantic
            found = [problem for problem in found if problem["type"] != "too_short" or not problem["input"]]
        for problem in found:
            problem["loc"] = tuple(part for part in problem["loc"] if part not in (_PLAIN, _KEYED))
        lines = [explain(dict(problem), keys_at) for problem in found]
        raise UserError("\n".join([f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}", *lines])) from error


def describe(key: str) -> str:
    """What a key of the run file means, as its field says: `budget.min`, `workers.slurm.jobs`. Raises KeyError."""
    record: type[BaseModel] = RunSpec
    for part in key.split("."):
        field = fields_of(record)[part]
        record = record_of(field.annotation) or record
    return " ".join((field.description or "").split())


def fields_of(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """A record's fields by the keys that stand for them in a run file."""
    return {field.alias or name: field for name, field in record.model_fields.items()}


def record_of(annotation: Any) -> type[BaseModel] | None:
    """The record whose keys stand below a field of this type, if any do: Benchmark of tuple[Benchmark, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(record_of, get_args(annotation))), None)


def keys_at(path: Sequence[str]) -> tuple[str, ...]:
    """The keys that are accepted below a path into a run file, such as `selection.0` or `workers.slurm`.

    None below a plain value. List indices and names of candidates count for nothing.
    """
    record: type[BaseModel] = RunSpec
    for part in path:
        if part in fields_of(record):
            below = record_of(fields_of(record)[part].annotation)
            if below is None:
                return ()
            record = below
    return tuple(fields_of(record))
