"""The Models page's parts: a plan's facts and results, its export, and its answers beside the dense base's.

Model work runs in processes of its own (`gptailor.launch.jobs`): they outlive the page, and whoever opens it again
finds them. What is written goes beside the runs folder; the browser never names a path.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gptailor import launch
from gptailor.dashboard import readers, text, widgets
from gptailor.dashboard.frames import tradeoffs
from gptailor.dashboard.frames.facts import Facts
from gptailor.dashboard.frames.view import View
from gptailor.dashboard.readers import Run
from gptailor.errors import UserError
from gptailor.launch import Job, JobState, JobStatus
from gptailor.launch.process import PROJECT

POLL_SECONDS = 1.0
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_PROMPT = 2000
KEPT_ANSWERS = 20
"""Prompts whose folders are kept; the oldest go first."""

# --- facts ------------------------------------------------------------------------------------------------------------


def exports_root() -> Path:
    """Where exported models are written: beside the runs folder."""
    return readers.runs_root().resolve().parent / "exports"


def facts(view: View, run: Run, config_id: int) -> None:
    """Parameters, size, layers and retention of the plan as a row of numbers."""
    whole = view.facts
    row = view.plans[view.plans["config_id"] == config_id].iloc[0]
    place = tradeoffs.place_of(view.trials, view.plans, config_id)
    out = _folder(run, config_id)
    layers, parameters, size, kept = st.columns(4)
    layers.metric("Layers", f"{row['kept_layers']:.0f} of {whole.n_layers}", border=True)
    parameters.metric("Parameters", text.size(row["parameters"]), border=True)
    dtype = str(whole.spec.get("dtype", "auto"))
    width = WIDTHS.get(dtype, 2)
    size.metric(
        "Size on disk",
        _bytes(_folder_size(out) if out.is_dir() else row["parameters"] * width),
        border=True,
        help="Of the exported folder." if out.is_dir() else f"Weights of {width} bytes each. Type: {text.safe(dtype)}.",
    )
    kept.metric(
        whole.average_label,
        text.value(row["average"], row["average ±"], percent=whole.average_is_share),
        help=f"Rank {place.rank} of {place.of}. {widgets.judged_note(view)}",
        border=True,
    )


def results(view: View, config_id: int) -> pd.DataFrame:
    """A row a benchmark and split: what the plan and the dense base scored on the same examples. Held-out ones last.

    Columns: Benchmark, Split, Used in the search, Examples, This plan, ± , Dense, Dense ±, retention.
    """
    mine = pd.concat([_searched(view, config_id), _judged(view, f"config:{config_id}")])
    dense = _judged(view, "dense")
    keys = ["benchmark", "metric", "split", "n_samples"]
    both = mine.merge(dense[[*keys, "score", "stderr"]], on=keys, how="left", suffixes=("", "_dense"))
    kept = (both["score"] / both["score_dense"]).where(both["higher"], both["score_dense"] / both["score"])
    return pd.DataFrame(
        {
            "Benchmark": [text.plain(f"{b} / {m}") for b, m in zip(both["benchmark"], both["metric"], strict=True)],
            "Split": both["split"].map(text.plain),
            "Used in the search": both["objective"].map({True: "yes", False: "no"}),
            "Examples": both["n_samples"].astype(int),
            "This plan": both["score"].astype(float),
            "±": both["stderr"].astype(float),
            "Dense": both["score_dense"].astype(float),
            "Dense ±": both["stderr_dense"].astype(float),
            "retention": kept.astype(float),
        }
    )


def _searched(view: View, config_id: int) -> pd.DataFrame:
    """The objectives' scores at the highest rung that the plan reached."""
    trials = view.tables.trials
    done = trials[(trials["config_id"] == config_id) & (trials["status"] == "success")].sort_values("budget")
    last = done["trial_id"].iloc[-1] if len(done) else -1
    scores = view.tables.scores[view.tables.scores["trial_id"] == last]
    splits = {(o["benchmark"], o["metric"]): o["split"] for o in view.facts.spec.get("objectives", ())}
    split = [splits.get(key, "") for key in zip(scores["benchmark"], scores["metric"], strict=True)]
    return _columns(scores.assign(split=split), objective=True)


def _judged(view: View, subject: str) -> pd.DataFrame:
    found = view.tables.evaluations
    return _columns(found[found["subject"] == subject], objective=False)


def _columns(rows: pd.DataFrame, objective: bool) -> pd.DataFrame:
    kept = rows[["benchmark", "metric", "split", "n_samples", "score", "stderr"]]
    return kept.assign(higher=rows["higher_is_better"].astype(bool), objective=objective)


def show_results(view: View, config_id: int) -> None:
    """The plan's scores beside the dense base's, and what of the held-out benchmarks is known."""
    frame = results(view, config_id)
    asked = len(view.facts.spec.get("held_out") or ())
    known = int((frame["Used in the search"] == "no").sum())
    st.markdown("**What it scores**")
    st.caption(
        _held_out_words(known, asked) + " ± is one standard error; retention is the share of the dense base's score."
    )
    widgets.show_table(frame, alt=f"Scores of plan {config_id} and of the dense base", height=560)


def _held_out_words(known: int, asked: int) -> str:
    if not asked:
        return "The run names no held-out benchmark: these are the scores that the search looked at."
    if not known:
        return (
            f"None of the {text.plural(asked, 'held-out benchmark')} is stored for this plan: these are the scores "
            "that the search looked at, so they flatter."
        )
    return f"{known} of {text.plural(asked, 'held-out result')} stored; those the search never saw."


# --- export -----------------------------------------------------------------------------------------------------------


def export(run: Run, facts: Facts, config_id: int) -> None:
    """Export the plan as a Hugging Face folder, and say where it is."""
    st.markdown("#### Export")
    out, place = _folder(run, config_id), _place(run)
    job = Job(place / "jobs" / f"export-{config_id}")
    state = _state(job)
    shown = str(out.relative_to(PROJECT) if out.is_relative_to(PROJECT) else out)
    if out.is_dir():
        _exported(out, shown)
    elif state is not None and state.status is JobStatus.RUNNING:
        _follow(job, _export_steps)
    else:
        if state is not None:
            _say_failure(state, "The export")
        st.caption(
            "A plain Hugging Face folder that needs nothing of gptailor: weights, tokenizer and a model card. It is "
            f"reloaded and its logits are compared before it counts as done. It goes to {text.safe(shown, 300)}."
        )
        st.button(
            "Export as a Hugging Face folder",
            icon=":material/download:",
            type="primary",
            on_click=_try,
            args=(
                lambda: launch.start_job(
                    place,
                    ["export", run.run_id, str(config_id), str(out), "--runs", str(run.folder.root.resolve())],
                    job.name,
                ),
            ),
        )
    _show_problem()


def _exported(out: Path, shown: str) -> None:
    files = sorted(path for path in out.iterdir() if path.is_file())
    st.success(
        f"Exported, reloaded and compared: {len(files)} files, {_bytes(_folder_size(out))}.",
        icon=":material/check_circle:",
    )
    st.code(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({text.plain(shown, 300)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({text.plain(shown, 300)!r})",
        language="python",
    )


def _export_steps(state: JobState) -> None:
    steps = re.findall(r"^ *(\d{1,3})% (.+)$", state.output, re.MULTILINE)
    share, step = steps[-1] if steps else ("0", "starting")
    st.progress(min(int(share), 100) / 100, text=f"Exporting: {text.safe(step)} …")


# --- try it -----------------------------------------------------------------------------------------------------------


def try_it(run: Run, facts: Facts, config_id: int) -> None:
    """A prompt, and what the plan's model and the dense base make of it, side by side."""
    st.markdown("#### Try it")
    st.caption("Both models continue your text, greedily, in a process of their own. A short base model is no chatbot.")
    place = _place(run)
    mine = st.session_state.setdefault("models.try", secrets.token_hex(6))
    job = Job(place / "jobs" / f"generate-{config_id}-{mine}")
    state = _state(job)
    running = state is not None and state.status is JobStatus.RUNNING
    with st.form("models.prompt", border=False):
        prompt = st.text_area(
            "Your text", key="models.text", height=100, max_chars=MAX_PROMPT, placeholder="Once upon a time"
        )
        tokens, device, chat = st.columns([2, 3, 3], vertical_alignment="bottom")
        count = tokens.number_input("New tokens", 1, 512, 64, key="models.tokens")
        devices = {found.name: f"{found.name}: {found.label}" for found in launch.free_devices()}
        asked = str(facts.spec.get("device", "auto"))
        names = list(devices)
        where = device.selectbox(
            "Device",
            names,
            names.index(asked) if asked in names else 0,
            format_func=devices.__getitem__,
            key="models.device",
        )
        templated = chat.toggle("Chat template", value=True, key="models.chat", help="Where the tokenizer has one.")
        sent = st.form_submit_button("Generate", icon=":material/play_arrow:", disabled=running)
    if sent and prompt.strip():
        wanted = "".join(c for c in prompt if c in "\n\t" or c.isprintable())
        arguments = ["generate", run.run_id, str(config_id), f"--prompt={wanted}", f"--tokens={count}"]
        arguments += [f"--device={where}", "--runs", str(run.folder.root.resolve())] + (
            [] if templated else ["--plain"]
        )
        _prune(place)
        _try(lambda: launch.start_job(place, arguments, job.name))
        state = _state(job)
        running = state is not None and state.status is JobStatus.RUNNING
    elif sent:
        st.warning("Type something to continue.")
    _show_problem()
    if running:
        _follow(job, _answer_steps)
    elif state is not None and state.status is not JobStatus.DONE:
        _say_failure(state, "Generating")
    elif state is not None:
        _answers(_events(state))


def _answer_steps(state: JobState) -> None:
    steps = [event["step"] for event in _events(state) if "step" in event]
    names = {"dense writes": "the dense base writes", "opening the family": "opening the models"}
    step = steps[-1] if steps else "starting a process"
    st.info(
        f"{names.get(step, 'the plan writes' if steps else step).capitalize()} …", icon=":material/hourglass_empty:"
    )
    _answers(_events(state))


def _answers(events: Sequence[dict[str, Any]]) -> None:
    answers = {str(event["subject"]): event for event in events if "subject" in event}
    for column, subject in zip(st.columns(2), ["dense", *(name for name in answers if name != "dense")], strict=False):
        answer = answers.get(subject)
        if answer is None:
            continue
        with column:
            title = "Dense base" if subject == "dense" else f"Plan {subject.removeprefix('config:')}"
            st.markdown(
                f"**{text.safe(title)}**: {answer['n_layers']} layers, {text.size(answer['n_parameters'])} parameters"
            )
            st.code(answer["text"] or "(nothing)", language=None, wrap_lines=True)
            st.caption(
                f"{answer['tokens_per_second']:.1f} tokens/s, {text.plural(answer['n_tokens'], 'token')} in "
                f"{text.duration(answer['seconds'])}  ·  {_bytes(answer['memory'])} of memory for weights and cache"
            )


def _events(state: JobState) -> list[dict[str, Any]]:
    events = []
    for line in state.output.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library's own words
        if isinstance(event, dict):
            events.append(event)
    return events


# --- jobs -------------------------------------------------------------------------------------------------------------


def _folder(run: Run, config_id: int) -> Path:
    return exports_root() / f"{run.run_id}-{config_id}"


def _place(run: Run) -> Path:
    """Where the run's jobs are kept: not in its own folder, which may be somebody else's or read-only."""
    return exports_root() / ".work" / run.run_id


def _state(job: Job) -> JobState | None:
    try:
        return launch.job_state(job)
    except UserError:  # there was no such job yet
        return None


def _follow(job: Job, show: Callable[[JobState], None]) -> None:
    """Show how a job goes on, until it has ended."""

    @st.fragment(run_every=POLL_SECONDS)
    def look() -> None:
        state = _state(job)
        if state is None or state.status is not JobStatus.RUNNING:
            st.rerun()
            return
        show(state)
        if st.button("Cancel", key=f"models.cancel.{job.name}"):
            launch.stop_job(job)
            st.rerun()

    look()


def _say_failure(state: JobState, what: str) -> None:
    """Why a job ended: the user's mistake in full, else the last line of the log."""
    if state.status is JobStatus.LOST:
        st.warning(f"{what} was cancelled or killed.", icon=":material/cancel:")
        return
    _, found, message = state.output.strip().rpartition("gptailor: ")
    lines = message.splitlines() if found else message.splitlines()[-1:]
    st.error("  \n".join([f"{what} failed.", *(text.safe(line, 600) for line in lines[:20])]), icon=":material/error:")


def _try(action: Callable[[], object]) -> None:
    try:
        action()
    except UserError as error:
        st.session_state["models.problem"] = str(error)


def _show_problem() -> None:
    if problem := st.session_state.pop("models.problem", None):
        st.error(text.safe(problem, 600), icon=":material/error:")


def _prune(place: Path) -> None:
    """Forget the oldest answers, so that a curious visitor does not fill the disk."""
    import shutil

    jobs = [job for job in launch.list_jobs(place) if job.name.startswith("generate-")]
    for job in sorted(jobs, key=lambda job: job.asked.stat().st_mtime)[:-KEPT_ANSWERS]:
        state = _state(job)
        if state is not None and state.status is not JobStatus.RUNNING:
            shutil.rmtree(job.path, ignore_errors=True)


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
