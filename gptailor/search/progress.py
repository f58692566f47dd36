"""What a person sees of a running search: a bar on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol, TextIO

from tqdm import tqdm

from gptailor.schedule import REFERENCES, schedule
from gptailor.spec.run import RunSpec
from gptailor.trial import Outcome, RunStatus, Score, Subject, Trial, TrialStatus
from gptailor.wording import duration


class Progress(Protocol):
    """Who is told how the search goes (a terminal, a log)."""

    def started(self, spec: RunSpec, done: int) -> None: ...
    def reference(self, subject: Subject, scores: tuple[Score, ...]) -> None: ...
    def trial(self, trial: Trial, outcome: Outcome, retention: float | None, replayed: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def ended(self, status: RunStatus, error: str | None) -> None: ...


class Report:
    """Tells of a search's steps on a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._bar: tqdm | None = None
        self._total = 0
        self._fresh, self._replayed = 0, 0  # trials run now, and those that were stored
        self._began = time.monotonic()
        self._best: tuple[int, float] | None = None  # (budget, mean retention)

    def started(self, spec: RunSpec, done: int) -> None:
        self._spec, self._total, self._began = spec, spec.trials, time.monotonic()
        several = len(spec.budget.rungs) > 1 and not spec.baselines
        self._referred = REFERENCES * spec.budget.max if several and not done else 0
        rungs = ", ".join(map(str, spec.budget.rungs))
        self.note(f"{spec.name}: {spec.trials} trials on rungs of {rungs} examples a benchmark")
        if done:
            self.note(f"{done} trials are stored and will not be run again")
        if self._stream.isatty():
            self._bar = tqdm(total=spec.trials, file=self._stream, unit="trial", dynamic_ncols=True, leave=True)

    def reference(self, subject: Subject, scores: tuple[Score, ...]) -> None:
        self.note(f"{subject}: {_line(scores)}")

    def trial(self, trial: Trial, outcome: Outcome, retention: float | None, replayed: bool) -> None:
        self._fresh += not replayed
        self._replayed += replayed
        if retention is not None:
            self._best = max(self._best or (0, float("-inf")), (trial.budget, retention))
        if self._bar is not None:
            best = f"{self._best[1]:.1%} of dense at {self._best[0]}" if self._best else "none"
            self._bar.set_postfix_str(f"rung {trial.budget}, best {best}", refresh=False)
            self._bar.update()
        elif not replayed:
            self._print(
                f"trial {trial.trial_id + 1}/{self._total}  rung {trial.budget}  {_result(outcome, retention)}  "
                f"{duration(outcome.stitch_seconds + outcome.evaluate_seconds)}  {self._time_left()}"
            )
        if outcome.status is TrialStatus.CRASHED and not replayed:
            self.note(f"trial {trial.trial_id + 1} crashed: {(outcome.error or '').strip().splitlines()[-1]}")

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def ended(self, status: RunStatus, error: str | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._print(f"{status}" + (f": {error}" if error else ""))

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:  # `... | head` has seen enough; hours of search are not lost for it
            self._stream = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
        except OSError:  # a full disk has no room for the log either; it waits in the stream until there is
            pass

    def _time_left(self) -> str:
        """By the examples that the trials to come will read: they cost anything between nothing and the whole rung."""
        done = self._replayed + self._fresh
        if done >= self._total:
            return "done"
        read = self._referred + self._examples(done) - self._examples(self._replayed)
        seconds = (time.monotonic() - self._began) * (self._examples(self._total) - self._examples(done)) / read
        return f"about {duration(seconds)} left"

    def _examples(self, trials: int) -> int:
        """Per benchmark, in the first so many trials; those of baselines are all of the highest rung."""
        if self._spec.baselines:
            return trials * self._spec.budget.max
        return sum(rung.examples for rung in schedule(self._spec.budget, trials))


def _result(outcome: Outcome, retention: float | None) -> str:
    if outcome.status is not TrialStatus.SUCCESS or retention is None:
        return str(outcome.status)
    return f"{_line(outcome.scores)}  ({retention:.1%} of dense)"


def _line(scores: tuple[Score, ...]) -> str:
    return "  ".join(f"{score.benchmark} {score.metric} {score.score:.4f}" for score in scores)
