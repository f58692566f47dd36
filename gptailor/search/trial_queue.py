"""Which trial is next: the stored ones as long as they last, then what SMAC asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptailor.plan import StitchPlan
from gptailor.search.replay import History, Stored, teach
from gptailor.search.suggest import Suggester, Suggestion
from gptailor.trial import Outcome

Costs = Callable[[Outcome, int], list[float] | None]
"""What SMAC is told of an outcome at a budget; None for a crash."""


@dataclass(frozen=True)
class NextTrial:
    """A trial that was asked for: its number, after how many told ones, and the seconds that asking took."""

    trial_id: int
    suggestion: Suggestion
    asked_after: int
    seconds: float


class TrialQueue:
    """What is tried next, from the first trial on: the history as long as that lasts, then what SMAC asks for.

    `catch_up` goes through what is stored, `next` gives a trial to run, `tell` takes its end. Many trials may be on
    their way at a time: SMAC knows of them and does not ask for them again.
    """

    def __init__(
        self,
        open_suggester: Callable[[Sequence[StitchPlan]], Suggester],
        initial: Sequence[StitchPlan],
        history: History,
        n_trials: int,
        costs: Costs,
        replayed: Callable[[NextTrial, Outcome], None],
        departed: Callable[[int, int], None],
    ) -> None:
        """Begin where the run stands.

        open_suggester: a fresh one, given the plans to begin with. replayed: told of each stored trial. departed: told
        at which trial the replay departs, and how many stored ones a fresh suggester could not be told of.
        """
        self._open_suggester, self._initial = open_suggester, initial
        self._history, self._n_trials, self._costs = history, n_trials, costs
        self._replayed, self._departed = replayed, departed
        self._suggester = open_suggester(initial)
        self._told = {trial.outcome.told_as: number for number, trial in history.finished.items()}
        self._last = max(history.asked_after, default=-1)
        self._on_their_way: dict[int, NextTrial] = {}  # asked for and not told
        self._running: set[int] = set()  # of these, given out by next()
        self._has_departed = False
        self._n_asked = 0
        self.n_told = 0
        self.is_exhausted = False

    def catch_up(self, should_stop: Callable[[], bool]) -> None:
        """Go through the history, as far as it goes without a trial that has to be run first."""
        while not self._has_departed and not should_stop():
            if self._is_through or self.n_told < self._due(self._n_asked):
                if not self._tell_stored():
                    return
            elif self._n_asked in self._history.asked_after:
                self._ask()
            else:
                return  # its line was lost: it is asked for when there is room to run it

    def next(self) -> NextTrial | None:
        """The next trial to run; None where there is none, or none before one that is running has ended."""
        if self._has_departed:
            while self._n_asked in self._history.finished or self._n_asked in self._on_their_way:
                self._n_asked += 1
        too_early = self.n_told < self._due(self._n_asked)
        if too_early or self._is_through:
            left = [n for n in self._on_their_way if n not in self._running and n not in self._history.finished]
            if left:
                return self._give(min(left))
        if too_early and not self._running:  # lines were lost, and it cannot have gone like this
            self._depart()
            return self.next()
        if too_early or self.is_exhausted or self._n_asked >= self._n_trials:
            return None
        number = self._n_asked
        self._ask()
        return self._give(number) if number in self._on_their_way else self.next()

    def tell(self, trial: NextTrial, outcome: Outcome) -> None:
        """What came of a trial that next() gave."""
        asked = trial.suggestion
        self._running.discard(trial.trial_id)
        self._on_their_way.pop(trial.trial_id, None)
        self._history.finished[trial.trial_id] = Stored(asked.config_id, asked.plan, asked.budget, asked.seed, outcome)
        self._tell(asked, outcome)

    def save(self) -> None:
        self._suggester.save()

    @property
    def _is_through(self) -> bool:
        return self._has_departed or self._n_asked > self._last or self._n_asked >= self._n_trials

    def _due(self, number: int) -> int:
        """How many must be told before this trial is asked for.

        Where its line is lost: as many as leaves the number of trials on their way that there was at the one before it.
        """
        if self._is_through:
            return 0
        known = self._history.asked_after
        before = max((other for other in known if other <= number), default=None)
        return number if before is None else number - (before - known[before])

    def _give(self, number: int) -> NextTrial:
        self._running.add(number)
        return self._on_their_way[number]

    def _ask(self) -> None:
        number, before = self._n_asked, time.monotonic()
        suggestion = self._ask_for_new() if self._has_departed else self._suggester.ask()
        stored = self._history.finished.get(number)
        if not self._is_through and (suggestion is None or (stored is not None and not stored.matches(suggestion))):
            self._depart()
        elif suggestion is None:
            self.is_exhausted = True
        else:
            seconds = time.monotonic() - before
            self._on_their_way[number] = NextTrial(number, suggestion, self.n_told, seconds)
            self._n_asked += 1

    def _tell_stored(self) -> bool:
        """Tell the trial that was told next; False where it is not stored."""
        number = self._told.get(self.n_told)
        if number is None or number in self._running:
            return False
        trial = self._on_their_way.pop(number, None)
        if trial is None:  # by then, it was not even asked for: lines were lost
            self._depart()
            return False
        outcome = self._history.finished[number].outcome
        self._tell(trial.suggestion, outcome)
        self._replayed(trial, outcome)
        return True

    def _tell(self, suggestion: Suggestion, outcome: Outcome) -> None:
        self._suggester.tell(suggestion, self._costs(outcome, suggestion.budget), outcome.at_work)
        self.n_told += 1

    def _depart(self) -> None:
        """From now on, a suggester that was told of every stored trial: its own would not ask for them again."""
        stored = self._history.finished
        tried = {trial.plan.hash for trial in stored.values()}
        self._suggester = self._open_suggester([plan for plan in self._initial if plan.hash not in tried])
        refused = teach(
            self._suggester, [(trial, self._costs(trial.outcome, trial.budget)) for trial in stored.values()]
        )
        self._departed(self._n_asked, refused)
        self._has_departed = True
        self._on_their_way = {number: self._on_their_way[number] for number in self._running}
        self._n_asked, self.n_told = 0, len(stored)

    def _ask_for_new(self) -> Suggestion | None:
        """Like ask; what was scored before the replay departed is answered from the store."""
        stored = self._history.finished.values()
        answers = {(trial.plan.hash, trial.budget): trial.outcome for trial in stored}
        while (suggestion := self._suggester.ask()) is not None:
            outcome = answers.get((suggestion.plan.hash, suggestion.budget))
            if outcome is None:
                break
            self._suggester.tell(suggestion, self._costs(outcome, suggestion.budget), outcome.at_work)
        return suggestion
