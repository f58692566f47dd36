"""`RunSpec`: one run, as asked. It is frozen: it is written into the run's folder as it is and stays so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from gptailor.errors import UserError
from gptailor.plan import BASE, layers_of
from gptailor.spec.records import Record, record_of
from gptailor.spec.sections import (
    DEFAULT_OPERATIONS,
    Baseline,
    Benchmark,
    Budget,
    HeldOut,
    Merge,
    Removal,
    Repair,
    SpaceOperation,
    Workers,
)
from gptailor.spec.values import NAME, Count, Flag, Number, Place, Whole, interval, known_texts, parse_duration

PLAIN, KEYED = "<plain>", "<keyed>"  # of two forms of one key, which no path into a run file names


class RunSpec(Record):
    """One run, as asked. Paths are relative to the folder in which the run is started, also when it is resumed."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    """What people call the run."""
    base_model: Place
    """The model whose embeddings, final norm and output head are kept: a Hugging Face model's folder on this machine,
    or a hub id such as owner/name."""
    candidates: dict[str, Place] = Field(default={})
    """Fine-tunes of the base that may lend layers, each under a name: folders or hub ids of full models or of LoRA
    adapters (PEFT folders)."""
    remove: Annotated[
        Annotated[Count, Tag(PLAIN)] | Annotated[Removal, Tag(KEYED)],
        Discriminator(lambda value: KEYED if isinstance(value, (Mapping, Removal)) else PLAIN),
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
    chat_template_args: dict[str, bool | int | float | str] = Field(default={})
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
            if not re.match(NAME, name) or name == BASE or "+" in name:
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
        return known_texts(value)

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
        return value if value is None else interval(value, lowest=0.0, highest=4.0)

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
