"""Seconds by part of the work: each counts once, and other threads' do not."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from gptailor.stopwatch import Part, Stopwatch
from gptailor.trial import now


def test_a_second_counts_for_the_innermost_part() -> None:
    began = time.monotonic()
    watch = Stopwatch()
    with watch.of(Part.REFERENCES):
        time.sleep(0.05)
        with watch.of(Part.STORE):
            time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), watch.of(Part.STORE):
        raise ZeroDivisionError
    spent = watch.seconds()
    assert 0.05 <= spent[Part.REFERENCES] < spent[Part.STORE]
    assert list(spent) == [Part.REFERENCES, Part.STORE, Part.OTHER], "in the order of a run's life"
    assert sum(spent.values()) == pytest.approx(time.monotonic() - began, abs=0.02)
    watch.move(0.02, Part.STORE, Part.STITCH)
    moved = watch.seconds()
    assert moved[Part.STITCH] == 0.02 and moved[Part.STORE] == pytest.approx(spent[Part.STORE] - 0.02)
    watch.move(1000.0, Part.STITCH, Part.SCORE)
    assert Part.STITCH not in watch.seconds() and watch.seconds()[Part.SCORE] == pytest.approx(0.02)


def test_it_begins_with_the_command_and_leaves_other_threads_out() -> None:
    watch = Stopwatch(now() - timedelta(seconds=30), Part.START)

    def store() -> None:
        with watch.of(Part.STORE):
            time.sleep(0.05)

    thread = threading.Thread(target=store)
    thread.start()
    thread.join()
    assert watch.seconds() == {Part.START: pytest.approx(30.05, abs=0.05)}
