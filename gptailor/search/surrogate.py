"""What SMAC learns from and where it looks, in terms of plans: its model, training data and acquisition search.

Subclasses of SMAC's own parts (2.4); `suggest.py` puts them together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ConfigSpace import Configuration
from numpy.typing import NDArray
from sklearn.linear_model import BayesianRidge
from smac.acquisition.function import EI
from smac.acquisition.maximizer import AbstractAcquisitionMaximizer
from smac.main.config_selector import ConfigSelector
from smac.model.random_forest import RandomForest
from smac.model.random_forest.random_forest import EPMRandomForest
from smac.runhistory.enumerations import StatusType

from gptailor.search.space import NUMBER, PlanConfiguration, PlanSpace


class SpaceExhausted(Exception):
    """No plan of the space is left that was not tried."""


class PlanForest(RandomForest):
    """A Bayesian linear model of the decoded plan, and SMAC's random forest of what that leaves.

    What single changes cost adds up to a good part of what a plan costs, and a linear model learns that from tens of
    noisy plans in a hundred dimensions, as in BOCS (arXiv 1806.08838); a forest alone hardly does. The forest then
    learns what does not add up. Both see features of the plan, so that two encodings of one plan are one point.

    One thread: SMAC's default hands every small prediction to a thread pool, which costs more than it saves.
    """

    def __init__(self, space: PlanSpace, seed: int) -> None:
        super().__init__(
            space.configspace,
            n_trees=20,
            ratio_features=5 / 6,
            min_samples_split=2,
            min_samples_leaf=1,
            seed=seed,
            n_jobs=1,
        )
        # SMAC's bound of 2**20 leaves makes scikit-learn reserve that many nodes for every tree: 95 ms a tree, not 1.
        self._rf_opts["max_leaf_nodes"] = None
        self._space = space
        self._linear = BayesianRidge()

    def _train(self, X: NDArray[np.float64], y: NDArray[np.float64]) -> PlanForest:
        features, costs = self._space.features(X), y.flatten()
        self._linear.fit(features, costs)
        self._rf_opts["max_features"] = max(1, features.shape[1] * 5 // 6)
        self._rf = EPMRandomForest(**self._rf_opts)  # type: ignore[arg-type]
        self._rf.fit(features, costs - self._linear.predict(features))
        return self

    def _predict(
        self,
        X: NDArray[np.float64],
        covariance_type: str | None = "diagonal",  # noqa: ARG002 (SMAC's signature)
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        assert self._rf is not None
        features = self._space.features(X)
        means, deviations = self._linear.predict(features, return_std=True)
        left, variances = (part.ravel() for part in self._rf.predict(features))
        unsure = np.maximum(deviations**2 - 1.0 / self._linear.alpha_, 0.0)  # of the mean: without a trial's own noise
        return (means + left).reshape(-1, 1), (unsure + variances).reshape(-1, 1)


class PlanSelector(ConfigSelector):
    """Trains the surrogate on every configuration, by its cost at the highest rung that it reached.

    Rungs are nested subsets of the same examples, so they estimate the same quantity; SMAC alone would use the highest
    rung only, a handful of points.
    """

    def _collect_data(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        assert self._runhistory is not None and self._runhistory_encoder is not None
        # ParEGO draws new weights before each call, so the forest is trained anew even without a new trial.
        self._previous_entries = -1
        best: dict[int, Any] = {}
        for key, value in self._runhistory.items():
            counts = value.status in (StatusType.SUCCESS, StatusType.CRASHED)
            if counts and (key.config_id not in best or key.budget > best[key.config_id].budget):
                best[key.config_id] = key
        self._considered_budgets = sorted({key.budget for key in best.values()})
        if len(best) < self._min_trials:
            return np.empty((0, 0)), np.empty(0), np.empty((0, 0))
        trials = {key: self._runhistory[key] for key in best.values()}
        X, Y = self._runhistory_encoder._build_matrix(trials, store_statistics=True)
        return X, Y, X

    def _get_evaluated_configs(self) -> list[Configuration]:
        assert self._runhistory is not None
        return list(self._runhistory.get_configs())

    def _get_x_best(self, X: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        assert self._model is not None
        means = self._model.predict_marginalized(X)[0].ravel()
        return X[means.argmin()], float(means.min())


class PlanSearch(AbstractAcquisitionMaximizer):
    """Maximises the acquisition function over plans, a few moves away from the best known ones.

    Moves are those of evolutionary pruning (EvoPress, arXiv 2410.14649: swap a removed with a kept unit, as many
    moves at once as the smaller of two draws from 1-3), one unit more or less where a range is asked for, and changes
    of a layer's sources and factor. They are made and
    scored in arrays, instead of SMAC's tens of thousands of one-exchange neighbours.

    The forest has seen tens of plans of a hundred dimensions, and is believed near them only: a trust region, as in
    TuRBO (arXiv 1910.01465). Plans that are far from all others are the random design's.
    """

    STARTS, NEIGHBOURS, STEPS = 5, 96, 2

    def __init__(self, space: PlanSpace, acquisition: EI, seed: int) -> None:
        super().__init__(space.configspace, acquisition_function=acquisition, challengers=32, seed=seed)
        self._space = space

    def _maximize(self, previous_configs: list[Configuration], n_points: int) -> list[tuple[float, Configuration]]:
        known = np.array([config.get_array() for config in previous_configs])
        current = self._best(known) if len(known) else self._random(self.STARTS)
        seen_vectors, seen_values = [], []
        for _ in range(self.STEPS):
            moved = self._moves(np.repeat(current, self.NEIGHBOURS, axis=0))
            values = self._score(moved)
            seen_vectors.append(moved)
            seen_values.append(values)
            best = values.reshape(len(current), -1).argmax(axis=1) + np.arange(len(current)) * self.NEIGHBOURS
            current = moved[best]
        return self._top(np.concatenate(seen_vectors), np.concatenate(seen_values), known, n_points)

    def _best(self, known: NDArray[np.float64]) -> NDArray[np.float64]:
        """The plans that the surrogate, which smooths over luck, thinks most of."""
        assert self._acquisition_function is not None and self._acquisition_function.model is not None
        means = self._acquisition_function.model.predict_marginalized(known)[0].ravel()
        return known[np.argsort(means, kind="stable")[: self.STARTS]]

    def _top(
        self, vectors: NDArray[np.float64], values: NDArray[np.float64], known: NDArray[np.float64], n_points: int
    ) -> list[tuple[float, Configuration]]:
        """The best points, each plan once and none that was tried.

        First the best of each set of removed layers, as a batch that differs in sources alone would tell little.
        """
        seen = {row.tobytes() for row in self._space.features(known)} if len(known) else set()
        cuts: set[bytes] = set()
        firsts: list[np.intp] = []
        others: list[np.intp] = []
        order = np.argsort(-values, kind="stable")[: 50 * n_points]
        rows = zip(self._space.features(vectors[order]), self._space.removed_mask(vectors[order]), strict=True)
        for index, (row, cut) in zip(order, rows, strict=True):
            if row.tobytes() not in seen:
                seen.add(row.tobytes())
                (others if cut.tobytes() in cuts else firsts).append(index)
                cuts.add(cut.tobytes())
        chosen: list[tuple[float, Configuration]] = []
        for index in [*firsts, *others][:n_points]:
            config = PlanConfiguration(self._configspace, vector=vectors[index])
            config.origin = "Acquisition Function Maximizer: Plan Search"
            chosen.append((float(values[index]), config))
        if not chosen:
            raise SpaceExhausted
        return chosen

    def _score(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        assert self._acquisition_function is not None
        return self._acquisition_function._compute(vectors).ravel()

    def _random(self, count: int) -> NDArray[np.float64]:
        vectors = np.empty((count, len(self._space.configspace)))
        for kind, columns in self._space.columns.items():
            size = (count, len(columns))
            sets = len(self._space.source_sets)
            vectors[:, columns] = self._rng.randint(sets, size=size) if kind == "source" else self._rng.rand(*size)
        if self._space.has_range:
            numbers = self._rng.randint(self._space.removals[0], self._space.n_removed + 1, size=count)
            self._space.set_numbers(vectors, np.arange(count), numbers)
        return vectors

    def _moves(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each row moved 1-3 times.

        Half of the moves are swaps, where layers are removed: what is gone matters more than where a kept layer comes
        from.
        """
        moved = vectors.copy()
        others = [kind for kind in self._space.columns if kind != "removal"]
        others += [NUMBER] if self._space.has_range else []
        kinds = ["removal"] * max(len(others), 1) + others if self._space.n_removed else others
        counts = np.minimum(self._rng.randint(1, 4, len(moved)), self._rng.randint(1, 4, len(moved)))
        for step in range(3):
            rows = np.flatnonzero(counts > step)
            kind = self._rng.randint(len(kinds), size=len(rows))
            for index in range(len(kinds)):
                self._move(moved, rows[kind == index], kinds[index])
        return moved

    def _move(self, vectors: NDArray[np.float64], rows: NDArray[np.intp], kind: str) -> None:
        if not len(rows):
            return
        gone = self._space.removed_mask(vectors[rows])
        if kind == NUMBER:
            self._resize(vectors, rows, gone)
            return
        columns = self._space.columns[kind]
        if kind == "removal":
            back, out = columns[self._one_of(gone)], columns[self._one_of(~gone)]
            vectors[rows, back], vectors[rows, out] = vectors[rows, out], vectors[rows, back]
            return
        column = columns[self._one_of(gone if kind == "fold" else ~gone)]  # others' values mean nothing
        if kind == "source":
            vectors[rows, column] = self._rng.randint(len(self._space.source_sets), size=len(rows))
        else:
            vectors[rows, column] = np.clip(vectors[rows, column] + self._rng.normal(0, 0.2, len(rows)), 0, 1)

    def _resize(self, vectors: NDArray[np.float64], rows: NDArray[np.intp], gone: NDArray[np.bool_]) -> None:
        """One layer more goes, or one comes back; which one is drawn."""
        numbers, columns = gone.sum(axis=1), self._space.columns["removal"]
        least, most = self._space.removals[0], self._space.n_removed
        grows = np.where(numbers == least, True, np.where(numbers == most, False, self._rng.rand(len(rows)) < 0.5))
        free = ~gone
        free[:, sorted(self._space.fixed)] = False
        layer = np.where(grows, self._one_of(free), self._one_of(gone))
        vectors[rows, columns[layer]] = np.where(grows, 1.0, 0.0)
        self._space.set_numbers(vectors, rows, np.where(grows, numbers + 1, numbers - 1))

    def _one_of(self, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
        """One layer of each row, drawn from those that the mask (rows x layers) has."""
        return np.where(mask, self._rng.rand(*mask.shape), -1.0).argmax(axis=1)
