from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptailor.measures import hypervolume, knee, pareto_front

POINTS = arrays(float, st.tuples(st.integers(1, 12), st.integers(2, 3)), elements=st.integers(0, 5).map(float))


@given(POINTS)
def test_front_is_what_the_definition_says(points: np.ndarray) -> None:
    expected = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert pareto_front(points).tolist() == expected


@given(POINTS)
def test_dominated_points_add_no_volume(points: np.ndarray) -> None:
    corner = np.full(points.shape[1], -1.0)
    front = points[pareto_front(points)]
    assert hypervolume(points, corner) == pytest.approx(hypervolume(front, corner))


def test_hypervolume_of_known_points() -> None:
    assert hypervolume([[1, 2], [2, 1]], [0, 0]) == 3.0
    assert hypervolume([[0.4], [0.7]], [0.5]) == pytest.approx(0.2)
    assert hypervolume([[0.1, 0.1]], [0.5, 0.5]) == 0.0


def test_non_finite_points_are_never_on_the_front() -> None:
    points = [[np.nan, 9.0], [1.0, 1.0], [np.inf, 0.0]]
    assert pareto_front(points).tolist() == [False, True, False]
    assert hypervolume(points, [0, 0]) == 1.0


def test_knee() -> None:
    assert knee([[0, 10], [8, 8], [10, 0], [1, 1]]) == 1
    assert knee([[3.0], [5.0], [4.0]]) == 1
    assert knee([[np.nan, 1.0]]) is None
    assert knee(np.empty((0, 2))) is None
