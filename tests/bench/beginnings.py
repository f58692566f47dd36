"""Would a cache of hidden states pay? `python tests/bench/beginnings.py RUN_FOLDER ...`

Plans that agree on their first layers have equal hidden states there for the same examples. For the trials of real
searches, in their order, this counts the layer passes (a layer times an example) that earlier trials had already done:
an upper bound of what such a cache saves, with room without bound and with room for the states of few plans.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.store import queries
from gptailor.store.folder import RunFolder

Key = tuple[object, ...]


def key_of(choice: LayerChoice) -> Key:
    return (*choice.weights_key, choice.output_scale)


def common(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Layers at the beginning that two plans share."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def share_saved(trials: Sequence[tuple[list[Key], int, int]], room: int | None) -> float:
    """Share of layer passes done before. trials: (layers' keys, examples scored from, to); room: plans remembered."""
    done = saved = 0
    seen: list[tuple[list[Key], int]] = []  # of each plan: layers, examples it was scored on (from the first)
    for keys, first, last in trials:
        recent = seen if room is None else seen[-room:]
        done += len(keys) * (last - first)
        for example in range(first, last):
            saved += max((common(keys, other) for other, end in recent if end > example), default=0)
        seen.append((keys, last))
    return saved / done if done else 0.0


def trials_of(folder: RunFolder) -> list[tuple[list[Key], int, int]]:
    tables = queries.read_run(folder)
    plans = {r.config_id: StitchPlan.from_json(json.loads(r.plan)) for r in tables.plans.itertuples()}
    scored: dict[int, int] = {}
    trials = []
    for trial in tables.trials.sort_values("trial_id").itertuples():
        first, last = scored.get(trial.config_id, 0), int(trial.budget)
        if last > first:
            trials.append(([key_of(choice) for choice in plans[trial.config_id].kept], first, last))
            scored[trial.config_id] = last
    return trials


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name).resolve()
        trials = trials_of(RunFolder.of(str(path.parent), path.name))
        shares = {room: share_saved(trials, room) for room in (1, 8, None)}
        said = ", ".join(f"{share:.1%} with {room or 'all'} plans remembered" for room, share in shares.items())
        print(f"{path.name}: {len(trials)} scored trials; saved at most {said}")


if __name__ == "__main__":
    main()
