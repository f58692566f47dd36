"""A number is tied to what it was computed from: the models' files, the settings, the examples as they are read.

A run keeps digests of all three from its start on, and whoever goes on with it compares them first. Other models or
settings are refused, and so are other examples of an objective, because a search cannot be half of one and half of the
other. Of other examples that only judge or choose, the old answers are forgotten, and said to be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.digests import example_digests
from gptailor.family.digests import checkpoint_digests
from gptailor.family.hub import revision_of
from gptailor.family.models import open_reader
from gptailor.family.preflight import look_again
from gptailor.family.sameness import MAX_LINES, refuse_difference
from gptailor.plan import BASE
from gptailor.scoring.item_cache import OPTIONS, ORDER, Items
from gptailor.scoring.plan_scorer import open_run_benchmarks
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import BenchmarkKey, Digests

OLD = (
    "this run was made before digests were kept: whether its models and benchmarks are still those of its scores "
    "cannot be told"
)


def digests_of(spec: RunSpec) -> Digests:
    """Digests of the run's models and settings as they are now. Raises UserError as open_family does."""
    preflight, checkpoints = look_again(spec, download=True)
    settings = {
        "dtype": preflight.dtype,
        "chat_template": json.dumps(spec.chat_template),
        "merge.parameters": json.dumps(spec.merge.parameters, sort_keys=True),
    }
    revisions = {name: revision for name, one in checkpoints.items() if (revision := revision_of(one))}
    return Digests(checkpoint_digests(checkpoints), settings, revisions=revisions)


def refuse_other_models(folder: RunFolder, spec: RunSpec, only: Iterable[str] | None = None) -> str | None:
    """Raise UserError where the run was computed from other models or settings; a sentence for a run that cannot tell.

    only: names of the models that matter, beside the base; by default all.
    """
    known = queries.load_digests(folder)
    if not known.weights:
        return OLD
    refuse_difference(known, digests_of(spec), f"run {folder.run_id}", None if only is None else {BASE, *only})
    return None


class Provenance:
    """What one run was computed from, for those who hold it open: compared where it is known, else written down."""

    def __init__(self, folder: RunFolder, spec: RunSpec, writer: RunWriter, say: Callable[[str], None]) -> None:
        self.folder, self.spec, self.writer, self.say = folder, spec, writer, say
        self.known = queries.load_digests(folder)
        self._answered = {(key.benchmark, key.split) for key in queries.load_examples(folder)}
        self._is_new = not (self.known.weights or self._answered)

    def models(self) -> None:
        """Compare, or write down, the models' files and the settings. Raises UserError."""
        now = digests_of(self.spec)
        if self.known.weights:
            refuse_difference(self.known, now, f"run {self.folder.run_id}")
            return
        if not self._is_new:
            self.say(f"{OLD}; those of now are noted")
        self.writer.record_digests(now)
        self.known = replace(now, examples=self.known.examples)

    def objectives(self, benchmarks: Sequence[OpenBenchmark]) -> None:
        """Compare, or write down, the examples that the search reads, in their seeded order. Raises UserError."""
        changes = (_change(self.known.examples, benchmark) for benchmark in benchmarks)
        found = [change for change in changes if change is not None]
        if found:
            lines = [change.text for change in found[:MAX_LINES]]
            raise UserError(
                "\n".join([*lines, "the trials' scores are of the old ones; put them back, or start a new run"])
            )
        self._note(benchmarks)

    def judges(self, benchmarks: Sequence[OpenBenchmark]) -> set[BenchmarkKey]:
        """Compare, or write down, the examples of benchmarks that judge or choose.

        What was answered to others is forgotten. Returns the keys under which it was stored, to be left out of what is
        known.
        """
        forgotten: set[BenchmarkKey] = set()
        for benchmark in benchmarks:
            change = _change(self.known.examples, benchmark) or self._old_prompts(benchmark)
            if change is not None:
                self.say(f"{change.text}; what was answered before is not used, and scores of it are taken out")
                forgotten |= set(change.keys)
        if forgotten:
            self.writer.forget(sorted(forgotten))
            examples = {key: known for key, known in self.known.examples.items() if key not in forgotten}
            self.known = replace(self.known, examples=examples)
        self._note(benchmarks)
        return forgotten

    def _note(self, benchmarks: Sequence[OpenBenchmark]) -> None:
        """Write down the digests of examples that were not read before."""
        examples = dict(self.known.examples)
        with self.writer.batch():
            for benchmark in benchmarks:
                key, now = key_of(benchmark), example_digests(benchmark)
                known = examples.get(key, [])
                if len(known) < len(now):
                    self.writer.record_example_digests(key, len(known), now[len(known) :])
                    examples[key] = now
        self.known = replace(self.known, examples=examples)

    def _old_prompts(self, benchmark: OpenBenchmark) -> _Change | None:
        """Of answers without digests: few-shot prompts that depended on the way to them."""
        of = benchmark.spec
        has_shots = any(task.config.num_fewshot for task in benchmark.tasks)
        was_answered = not self._answered.isdisjoint((name, of.split) for name in (of.benchmark, of.key))
        if not has_shots or key_of(benchmark) in self.known.examples or not was_answered:
            return None
        text = f"benchmark {of.key} ({of.split}), {of.metric}: an older version drew its few-shot prompts otherwise"
        return _Change(text, _stored_under(benchmark))


@dataclass(frozen=True)
class _Change:
    text: str
    keys: tuple[BenchmarkKey, ...]


def _change(known: Mapping[BenchmarkKey, Sequence[str]], benchmark: OpenBenchmark) -> _Change | None:
    """What of the benchmark's examples is not as it was read before; None where nothing is, or nothing was read."""
    before, now = known.get(key_of(benchmark), []), example_digests(benchmark)
    other = [place for place, (one, two) in enumerate(zip(before, now, strict=False)) if one != two]
    n = min(len(before), len(now))
    if not other:
        return None
    of = benchmark.spec
    first = benchmark.order[other[0]]
    return _Change(
        f"benchmark {of.key} ({of.split}), {of.metric}: {len(other)} of its first {n} examples are not those that "
        f"this run read (rows, prompts, answers or how they are scored); the first is row {first[1]} of {first[0]}",
        _stored_under(benchmark),
    )


def stale_scores(folder: RunFolder, spec: RunSpec, say: Callable[[str], None]) -> set[BenchmarkKey]:
    """Benchmarks whose examples are not those that the run's scores are of, each said.

    Those that cannot be read here are said as well, and are not among them: nothing speaks against their scores.
    """
    known = queries.load_digests(folder).examples
    asked = [one for one in dict.fromkeys(spec.benchmarks) if _key(one) in known]
    if not asked:
        return set()
    reader = open_reader(spec)
    stale: set[BenchmarkKey] = set()
    for reading in dict.fromkeys(one.reading for one in asked):
        alike = [one for one in asked if one.reading == reading]
        most = max(len(known[_key(one)]) for one in alike)
        try:
            opened = open_run_benchmarks(reader, spec, alike, most)
        except UserError as problem:
            say(f"{problem}; whether the run's scores of it are of what is there now cannot be told")
            continue
        for benchmark in opened:
            if change := _change(known, benchmark):
                say(f"{change.text}; scores of the old ones are not given")
                stale.add(key_of(benchmark))
    return stale


def key_of(benchmark: OpenBenchmark) -> BenchmarkKey:
    return _key(benchmark.spec)


def _key(benchmark: Benchmark) -> BenchmarkKey:
    return BenchmarkKey(benchmark.key, benchmark.metric, benchmark.split)


def _stored_under(benchmark: OpenBenchmark) -> tuple[BenchmarkKey, ...]:
    """The benchmark's own key, and those of what metrics of its examples share."""
    of = benchmark.spec
    shots = "" if of.num_fewshot is None else f"@{of.num_fewshot}"
    return (key_of(benchmark), *(BenchmarkKey(of.benchmark, what + shots, of.split) for what in (OPTIONS, ORDER)))


def without(known: Items, forgotten: set[BenchmarkKey]) -> Items:
    """Items of benchmarks that are not forgotten."""
    return {key: items for key, items in known.items() if key.of not in forgotten} if forgotten else known


def summary_digest(benchmark: OpenBenchmark) -> str:
    """One digest of all its examples in their present order."""
    return hashlib.blake2b("".join(example_digests(benchmark)).encode(), digest_size=16).hexdigest()
