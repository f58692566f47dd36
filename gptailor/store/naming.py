"""What older versions called a benchmark that a run file asks for at a number of shots: by its plain name.

Names have had the shots in them since store version 7. Rows of before are read under the names of today, so that
nobody else has to know; what their examples gave is not, because prompts were drawn differently then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gptailor.store.stored_spec import StoredBenchmark, StoredSpec
from gptailor.trial import BenchmarkKey

if TYPE_CHECKING:
    import pandas as pd


def names_now(spec: StoredSpec) -> dict[BenchmarkKey, str]:
    """The old (plain) names of a run's benchmarks to today's, where they differ."""
    return _names_now((*spec.objectives, *spec.held_out, *spec.selection))


def objective_names_now(spec: StoredSpec) -> dict[tuple[str, str], str]:
    """The same of the objectives alone by name and metric, as trials' scores have no split."""
    return {(key.benchmark, key.metric): name for key, name in _names_now(spec.objectives).items()}


def _names_now(asked: Iterable[StoredBenchmark]) -> dict[BenchmarkKey, str]:
    asked = list(asked)
    now = {one.key for one in asked}
    old = {BenchmarkKey(one.task, one.metric, one.split): one.benchmark for one in asked if one.task != one.benchmark}
    return {key: name for key, name in old.items() if key not in now}


def renamed(frame: pd.DataFrame, now: Mapping[Any, str], by: list[str]) -> pd.DataFrame:
    """The frame under today's names. by: its columns that make up a key of `now`."""
    if not now or frame.empty:
        return frame
    keys = frame[by].itertuples(index=False, name=None)
    return frame.assign(benchmark=[now.get(key, key[0]) for key in keys])
