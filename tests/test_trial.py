"""Subjects: what the store and the command line write, as a record."""

from __future__ import annotations

import pytest

from gptailor.trial import DENSE, HEALED, KEPT, REPAIRED, Subject, SubjectKind


@pytest.mark.parametrize(
    ("text", "subject", "label"),
    [
        ("dense", DENSE, "Dense base"),
        ("candidate:math", Subject.candidate("math"), "math, dense"),
        ("baseline:sleb", Subject.baseline("sleb"), "sleb on base"),
        ("baseline:besa@math", Subject.baseline("besa", "math"), "besa (zeros, not smaller) on math"),
        ("baseline:random-3@math", Subject.baseline("random-3", "math"), "random-3 on math"),
        ("config:7", Subject.config(7), "Plan 7"),
        ("config:1000007", Subject.config(REPAIRED + 7), "Plan 7, repaired"),
        ("config:2000000", Subject.config(HEALED), "Healed plan 1"),
        ("config:3000000", Subject.config(KEPT), "Kept plan 1"),
        (
            "repaired:config:7/refit-base",
            Subject.repaired(Subject.config(7), "refit-base"),
            "Plan 7, repaired (refit-base)",
        ),
        ("healed:config:7/1M", Subject.healed(Subject.config(7), "1M"), "Plan 7, healed (1M)"),
        (
            "healed:baseline:sleb@math/1M",
            Subject.healed(Subject.baseline("sleb", "math"), "1M"),
            "sleb on math, healed (1M)",
        ),
    ],
)
def test_a_subject_is_its_text(text: str, subject: Subject, label: str) -> None:
    assert Subject.parse(text) == subject and str(subject) == text and subject.label == label
    assert subject.kind is SubjectKind(text.partition(":")[0])
    assert subject.config_id == (int(text.removeprefix("config:")) if text.startswith("config:") else None)


@pytest.mark.parametrize("text", ["", "dense:", "config:", "config:x", "config:-1", "config:²", "candidate:", "plan:7"])
def test_other_text_names_no_subject(text: str) -> None:
    with pytest.raises(ValueError, match="use dense, candidate:NAME, baseline:METHOD"):
        Subject.parse(text)
