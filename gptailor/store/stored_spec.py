"""What a saved run asked, as its store says it, whichever version wrote it.

A run file that is to run is validated (gptailor/spec/). One that has run is only read: a key that is missing, or is
not what it should be, is taken as a run file without it, and what this version does not know stays in `keys`. Nothing
but the standard library is needed, as small processes read stores too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gptailor.plan import layers_of
from gptailor.trial import BenchmarkKey, benchmark_name
from gptailor.wording import removal

T = TypeVar("T")


@dataclass(frozen=True)
class StoredBenchmark:
    """A benchmark that a run file names, as the columns of the store name it: with its shots, where it asks for some.

    task: lm-eval's name, the same whatever the shots.
    """

    benchmark: str
    metric: str
    split: str
    task: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.metric}"

    @property
    def key(self) -> BenchmarkKey:
        return BenchmarkKey(self.benchmark, self.metric, self.split)


@dataclass(frozen=True)
class StoredBudget:
    """Examples per benchmark on the lowest and highest rung, and the ratio between rungs."""

    min: int = 100
    max: int = 1000
    eta: int = 3


@dataclass(frozen=True)
class StoredSpec:
    """A saved run's run file; keys: all of it as it is stored, for what compares run files key by key."""

    base_model: str = ""
    candidates: Mapping[str, str] = field(default_factory=dict)
    remove: float | None = None
    operations: tuple[str, ...] = ()
    objectives: tuple[StoredBenchmark, ...] = ()
    held_out: tuple[StoredBenchmark, ...] = ()
    selection: tuple[StoredBenchmark, ...] = ()
    baselines: tuple[str, ...] = ()
    budget: StoredBudget = StoredBudget()
    trials: int = 0
    seed: int = 0
    walltime: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_range(self) -> bool:
        """Whether plans differ in how many layers they leave out, so that size is an objective."""
        return _mapping(self.keys.get("remove")).get("to") is not None

    def fewest_removed(self, n_layers: int, n_removed: int) -> int:
        """Layers that a plan leaves out at least, of a base of `n_layers`. n_removed: at most."""
        asked = _mapping(self.keys.get("remove")).get("from")
        if not self.has_range or not isinstance(asked, (int, float)):
            return n_removed
        return layers_of(asked, n_layers)

    @property
    def removal(self) -> str:
        """How much was to go, in words; '' where that is not known."""
        asked = self.keys.get("remove")
        return removal(asked if isinstance(asked, Mapping) else self.remove)


def read_stored_spec(stored: object) -> StoredSpec:
    """The record of a stored run file: JSON text, the object of it, or nothing where a journal lost its first line."""
    keys = _mapping(stored)
    plain = StoredSpec()
    budget = _mapping(keys.get("budget"))
    return StoredSpec(
        base_model=_of(str, keys.get("base_model"), plain.base_model),
        candidates={str(name): str(place) for name, place in _mapping(keys.get("candidates")).items()},
        remove=keys["remove"] if type(keys.get("remove")) in (int, float) else None,
        operations=tuple(_texts(keys.get("operations"))),
        objectives=tuple(_benchmarks(keys.get("objectives"), "validation")),
        held_out=tuple(_benchmarks(keys.get("held_out"), "test")),
        selection=tuple(_benchmarks(keys.get("selection"), "validation")),
        baselines=tuple(_texts(keys.get("baselines"))),
        budget=StoredBudget(
            _of(int, budget.get("min"), plain.budget.min),
            _of(int, budget.get("max"), plain.budget.max),
            _of(int, budget.get("eta"), plain.budget.eta),
        ),
        trials=_of(int, keys.get("trials"), plain.trials),
        seed=_of(int, keys.get("seed"), plain.seed),
        walltime=_of(str, keys.get("walltime"), "") or None,
        device=_of(str, keys.get("device"), plain.device),
        dtype=_of(str, keys.get("dtype"), plain.dtype),
        keys=keys,
    )


def read_versions(stored: object) -> dict[str, str]:
    """The column `versions` of a run: package -> version, `device`, and `dtype`, the type that auto stood for."""
    return {str(name): str(version) for name, version in _mapping(stored).items()}


def _mapping(value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, Mapping) else {}


def _of(kind: type[T], value: object, otherwise: T) -> T:
    return value if isinstance(value, kind) and not isinstance(value, bool) else otherwise


def _texts(value: object) -> Iterator[str]:
    yield from (item for item in value if isinstance(item, str)) if isinstance(value, (list, tuple)) else ()


def _benchmarks(value: object, split: str) -> Iterator[StoredBenchmark]:
    for one in value if isinstance(value, (list, tuple)) else ():
        if isinstance(one, Mapping) and isinstance(one.get("benchmark"), str):
            shots = one.get("num_fewshot")
            name = benchmark_name(one["benchmark"], shots if type(shots) is int else None)
            metric, asked = _of(str, one.get("metric"), "acc"), _of(str, one.get("split"), split)
            yield StoredBenchmark(name, metric, asked, one["benchmark"])
