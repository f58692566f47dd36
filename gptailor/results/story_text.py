"""A run's story, and the table of runs, as text for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptailor.results.run_list import runs_json
from gptailor.wording import as_table, duration, span

LEAST_SHARE = 0.005
"""Of a run's seconds, from which on a part of them is told."""


def runs_text(root: str | Path) -> str:
    rows = [
        (
            run["run_id"],
            run["status"],
            f"{run['trials']}/{run['trials_asked']}",
            f"-{span(_fewest(run), run['removed'])} of {run['layers']}" if run["layers"] else "",
            *(f"{run[key]:.1%}" if run[key] is not None else "" for key in ("retention", "held_out")),
        )
        for run in runs_json(root)
    ]
    if not rows:
        return f"No runs in {root}. Start one: python -m gptailor search data/presets/demo.yaml"
    return as_table([("run", "state", "trials", "layers", "retention", "held out"), *rows])


def run_text(story: dict[str, Any]) -> str:
    trials = story["trials"]
    rungs = ", ".join(f"{count} at {rung} examples" for rung, count in trials["by_rung"].items())
    lines = [
        f"{story['name']}  ({story['run_id']}): {story['status']}",
        *([f"  {story['error']}"] if story["error"] else []),
        f"{story['base_model']}, {span(_fewest(story), story['removed'])} of {story['layers']} layers removed; "
        f"candidates {', '.join(story['candidates']) or 'none'}",
        f"{trials['done']} of {trials['asked']} trials: {rungs or 'none yet'}",
    ]
    if story["seconds"]:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in story["seconds_per_trial"].items())
        lines.append(f"{duration(story['seconds'])} in all; a trial on average: {parts}")
    if spent := story["seconds_by_part"]:
        whole = sum(spent.values())
        parts = ", ".join(f"{part} {duration(value)}" for part, value in spent.items() if value >= LEAST_SHARE * whole)
        lines.append(f"Where {duration(whole)} of its processes went: {parts}")
    header = ("", *story["objectives"], "retention", "plan")
    rows = [
        (subject, *(_cell(scores.get(o)) for o in story["objectives"]), "", "")
        for subject, scores in story["references"].items()
    ]
    best = story["best"]
    rows += [
        (
            f"config {plan['config_id']}" + (" (best)" if best and plan["config_id"] == best["config_id"] else ""),
            *(_cell(plan["scores"].get(o)) for o in story["objectives"]),
            f"{plan['retention']:.1%}" if plan["retention"] is not None else "",
            plan["plan"],
        )
        for plan in [*([best] if best and not best["on_front"] else []), *story["front"]]
    ]
    lines += [
        "",
        "Full-budget scores (± standard error) of the references, the best plan and the front:",
        as_table([header, *rows]),
    ]
    if best is None:
        lines.append("No trial has succeeded at the full budget yet, so there is no front.")
    else:
        lines.append(f"Export one: python -m gptailor export {story['run_id']} {best['config_id']} OUT")
    lines += _sizes_text(story)
    lines += ["", story["selection"]["text"]] if story["selection"] else []
    lines += [f"On the selection split, {one['text']}" for one in story["repairs"]]
    lines += _held_out_text(story["held_out"])
    lines += [f"trial {failure['trial']} failed: {failure['error']}" for failure in story["failures"]]
    return "\n".join(lines)


def _fewest(run: dict[str, Any]) -> int:
    return run["removed"] if run["removed_from"] is None else run["removed_from"]


def _sizes_text(story: dict[str, Any]) -> list[str]:
    """The best plan of each size; nothing without a range of sizes."""
    if not story["sizes"]:
        return []
    rows = [
        (
            f"{plan['kept']} layers",
            f"config {plan['config_id']}",
            *("" if plan[key] is None else f"{plan[key]:.1%}" for key in ("retention", "selection")),
            plan["plan"],
        )
        for plan in story["sizes"]
    ]
    header = ("", "", "retention", "selection", "plan")
    return ["", "The best plan of each size:", as_table([header, *rows])]


def _held_out_text(story: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["subject"],
            ("–" if row["average"] is None else f"{row['average']:.4f}")
            + (f" ±{row['stderr']:.4f}" if row["stderr"] is not None else ""),
            *(
                "" if row[key] is None else f"{row[key]:{form}}"
                for key, form in (
                    ("without_calibration", ".4f"),
                    ("retention", ".1%"),
                    ("above_chance", ".1%"),
                    ("gap", "+.1%"),
                )
            ),
        )
        for row in story["averages"]
    ]
    if not rows:
        return []
    header = ("", "average", "average*", "retention", "above chance", "gap")
    lines = ["", "Held out (average*: without the calibration's benchmarks; gap: what calibration promises too much):"]
    lines.append(as_table([header, *rows]))
    tests = [
        f"{story['best']} less {story['control']} on {test['benchmark']}: {test['difference']:+.4f} "
        f"[{test['low']:+.4f}, {test['high']:+.4f}], p {test['p']:.3g} ({test['test']}, {test['n']} examples)"
        for test in story["tests"]
    ]
    return [*lines, *tests, *story["changes"]]


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    error = f" ±{score['stderr']:.4f}" if score["stderr"] is not None else ""
    return f"{score['score']:.4f}{error}"
