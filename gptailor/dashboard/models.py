"""The Models page's parts: a plan's facts and results, its export, and its answers beside the dense base's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import streamlit as st

from gptailor import shipped, wording
from gptailor.dashboard import access, jobs, judging, pickers, widgets
from gptailor.dashboard.readers import Run
from gptailor.launch.devices import free_devices
from gptailor.launch.events import Event
from gptailor.launch.jobs import JobState, JobStatus
from gptailor.measures import retention
from gptailor.results.frames import layers as layer_frames
from gptailor.results.frames import tradeoffs
from gptailor.results.frames.view import View
from gptailor.trial import DENSE, Subject

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MAX_PROMPT = 2000

# --- facts ------------------------------------------------------------------------------------------------------------


def facts(view: View, run: Run, config_id: int) -> None:
    """Parameters, size, layers and the average of the plan as a row of numbers."""
    whole = view.facts
    n_parameters = int(view.tables.plans.set_index("config_id")["n_parameters"][config_id])
    out = jobs.export_folder(run, config_id)
    layers, parameters, size, kept = st.columns(4)
    layers.metric("Layers", f"{view.tables.kept_layers[config_id]} of {whole.n_layers}", border=True)
    zeros = layer_frames.zeros(view.tables.layers, config_id)
    parameters.metric(
        "Parameters",
        wording.size(n_parameters),
        f"{zeros:.0%} of the layers' are zeros" if zeros else None,
        delta_color="off",
        delta_arrow="off",
        border=True,
        help="Zeros make a model neither smaller nor faster." if zeros else None,
    )
    dtype = _dtype(view)
    width = WIDTHS.get(dtype)
    if out.is_dir():
        on_disk, how = wording.gigabytes(_folder_size(out)), "Of the exported folder."
    elif width is not None:
        on_disk, how = wording.gigabytes(n_parameters * width), f"Weights of {width} bytes each ({dtype})."
    else:
        on_disk, how = "–", "The run does not say in which type its base is stored; an export tells."
    size.metric("Size on disk", on_disk, border=True, help=how)
    average = _average_of_kept if config_id in view.kept else _average_of_judged
    label, value, note = average(view, config_id)
    kept.metric(label, value, help=note, border=True)


def _average_of_judged(view: View, config_id: int) -> tuple[str, str, str]:
    """Label, value and help of what the search knows of a plan."""
    whole, row = view.facts, view.plans[view.plans["config_id"] == config_id].iloc[0]
    place = tradeoffs.place_of(view.trials, view.plans, config_id)
    value = wording.value(row["average"], row["average ±"], percent=whole.average_is_share)
    return whole.average_label, value, f"Rank {place.rank} of {place.of}. {pickers.judged_note(view)}"


def _average_of_kept(view: View, config_id: int) -> tuple[str, str, str]:
    """The same of a plan that no trial was about: what it scores on what is held out."""
    own = view.held_out[view.held_out["subject"] == str(view.subjects[config_id])]
    note = "The search did not try this plan. Mean over the held-out benchmarks, ± one standard error."
    if own.empty:
        return "Held-out average", "–", f"{note} It was not scored on all of them yet."
    return "Held-out average", wording.value(own["average"].iloc[0], own["stderr"].iloc[0]), note


def results(view: View, config_id: int) -> pd.DataFrame:
    """A row a benchmark and split: what the plan and the dense base scored on the same examples. Held-out ones last.

    Columns: Benchmark, Split, Used in the search, Examples, This plan, ± , Dense, Dense ±, retention; the last three
    only where the dense base was scored on any of these.
    """
    keys = ["benchmark", "metric", "split", "n_samples"]
    judged = _judged(view, view.subjects[config_id]).sort_values("n_samples", kind="stable")
    judged = judged.drop_duplicates(keys[:3], keep="last")  # each at the most examples, as everywhere
    mine = pd.concat([_searched(view, config_id), judged]).drop_duplicates(keys)
    dense = _judged(view, DENSE)
    both = mine.merge(dense[[*keys, "score", "stderr"]], on=keys, how="left", suffixes=("", "_dense"))
    spec = view.tables.spec
    objectives, choosers = ({one.key for one in asked} for asked in (spec.objectives, spec.selection))
    kept = [retention(*row) for row in zip(both["score"], both["score_dense"], both["higher"], strict=True)]
    frame = pd.DataFrame(
        {
            "Benchmark": [wording.plain(f"{b} / {m}") for b, m in zip(both["benchmark"], both["metric"], strict=True)],
            "Split": both["split"].map(wording.plain),
            "Used in the search": [
                "yes" if searched or key in objectives else "to choose" if key in choosers else "no"
                for searched, key in zip(
                    both["objective"], both[keys[:3]].itertuples(index=False, name=None), strict=True
                )
            ],
            "Examples": both["n_samples"].astype(int),
            "This plan": both["score"].astype(float),
            "±": both["stderr"].astype(float),
            "Dense": both["score_dense"].astype(float),
            "Dense ±": both["stderr_dense"].astype(float),
            "retention": pd.Series(kept, index=both.index, dtype=float),
        }
    )
    if frame["Dense"].isna().all():
        frame = frame.drop(columns=["Dense", "Dense ±", "retention"])
    uses = frame["Used in the search"].map(["yes", "to choose", "no"].index)
    return frame.iloc[uses.argsort(kind="stable")].reset_index(drop=True)


def _searched(view: View, config_id: int) -> pd.DataFrame:
    """The objectives' scores at the highest rung that the plan reached."""
    trials = view.tables.trials
    done = trials[(trials["config_id"] == config_id) & (trials["status"] == "success")].sort_values("budget")
    last = done["trial_id"].iloc[-1] if len(done) else -1
    scores = view.tables.scores[view.tables.scores["trial_id"] == last]
    splits = {(one.benchmark, one.metric): one.split for one in view.tables.spec.objectives}
    split = [splits.get(key, "") for key in zip(scores["benchmark"], scores["metric"], strict=True)]
    return _columns(scores.assign(split=split), objective=True)


def _judged(view: View, subject: Subject) -> pd.DataFrame:
    found = view.tables.evaluations
    return _columns(found[found["subject"] == str(subject)], objective=False)


def _columns(rows: pd.DataFrame, objective: bool) -> pd.DataFrame:
    kept = rows[["benchmark", "metric", "split", "n_samples", "score", "stderr"]]
    return kept.assign(higher=rows["higher_is_better"].astype(bool), objective=objective)


def show_results(view: View, run: Run, config_id: int) -> None:
    """The plan's scores beside the dense base's, and what of the held-out benchmarks is known."""
    frame = results(view, config_id)
    held_out = {one.key for one in view.tables.spec.held_out}
    judged = _judged(view, view.subjects[config_id])[["benchmark", "metric", "split"]]
    asked, known = len(held_out), len(held_out.intersection(judged.itertuples(index=False, name=None)))
    st.markdown("**What it scores**")
    st.caption(
        _held_out_words(known, asked) + " ± is one standard error; retention is the share of the dense base's score."
    )
    widgets.show_table(frame, alt=f"Scores of {view.name(config_id)} and of the dense base", height=560)
    judge(run, config_id, view.subjects[config_id], max(asked - known, 0))
    judging.show_of_plan(view, run, config_id)
    judging.report_button(view, run)


def judge(run: Run, config_id: int, subject: Subject, missing: int) -> None:
    """Score the plan, what it was before, and the dense base on the held-out benchmarks, if that was not done yet."""
    who = [str(one) for one in (DENSE, subject.before, subject) if one is not None]
    jobs.offer(
        run,
        f"judge-{config_id}",
        ["evaluate", "--subjects", ",".join(who)],
        doing="Scoring on the held-out benchmarks",
        label="Score it on the held-out benchmarks",
        icon=":material/quiz:",
        help="All of their examples, for this plan and the dense base: this may take a while.",
        wanted=missing > 0,
    )


def _held_out_words(known: int, asked: int) -> str:
    if not asked:
        return "The run names no held-out benchmark: these are the scores that the search looked at."
    if not known:
        return (
            f"None of the {wording.plural(asked, 'held-out benchmark')} is stored for this plan: these are the scores "
            "that the search looked at, so they flatter."
        )
    return f"{known} of {wording.plural(asked, 'held-out result')} stored; those the search never saw."


# --- export -----------------------------------------------------------------------------------------------------------


def export(run: Run, config_id: int) -> None:
    """Export the plan as a Hugging Face folder, and say where it is."""
    st.markdown("#### Export")
    out, work = jobs.export_folder(run, config_id), jobs.job(run, f"export-{config_id}")
    state = jobs.state(work)
    shown = str(out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out)
    if out.is_dir():
        _exported(out, shown)
    elif jobs.is_running(state):
        jobs.follow(work, _export_steps)
    else:
        if state is not None and state.status is not JobStatus.DONE:  # one that is done was moved away since
            jobs.say_failure(state, "The export")
        st.caption(
            "A plain Hugging Face folder that needs nothing of gptailor: weights, tokenizer and a model card. It is "
            f"reloaded and its logits are compared before it counts as done. It goes to {wording.safe(shown, 300)}."
        )
        not_you = access.why_not()
        st.button(
            "Export as a Hugging Face folder",
            disabled=not_you is not None,
            help=not_you,
            icon=":material/download:",
            type="primary",
            on_click=jobs.begin,
            args=(run, work, ["export", run.run_id, str(config_id), str(out), "--json"]),
        )
    jobs.show_problem()


def _exported(out: Path, shown: str) -> None:
    files = sorted(path for path in out.iterdir() if path.is_file())
    st.success(
        f"Exported, reloaded and compared: {len(files)} files, {wording.gigabytes(_folder_size(out))}.",
        icon=":material/check_circle:",
    )
    st.code(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({wording.plain(shown, 300)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({wording.plain(shown, 300)!r})",
        language="python",
        wrap_lines=True,
    )


def _export_steps(state: JobState) -> None:
    step, share = jobs.last_words(state, "starting")
    st.progress(share, text=f"Exporting: {step} …")


# --- try it -----------------------------------------------------------------------------------------------------------


def try_it(run: Run, view: View, config_id: int) -> None:
    """A prompt, and what the plan's model and the dense base make of it, side by side."""
    st.markdown("#### Try it")
    st.caption("Both models continue your text, greedily, in a process of their own. A short base model is no chatbot.")
    mine = st.session_state.setdefault("models.try", secrets.token_hex(6))
    work = jobs.job(run, f"generate-{config_id}-{mine}")
    state = jobs.state(work)
    with st.form("models.prompt", border=False):
        prompt = st.text_area(
            "Your text", key="models.text", height=100, max_chars=MAX_PROMPT, placeholder="Once upon a time"
        )
        tokens, device, chat = st.columns([2, 3, 3], vertical_alignment="bottom")
        count = tokens.number_input("New tokens", 1, 512, 64, key="models.tokens")
        devices = {found.name: f"{found.name}: {found.label}" for found in free_devices()}
        asked = view.tables.spec.device
        names = list(devices)
        where = device.selectbox(
            "Device",
            names,
            names.index(asked) if asked in names else 0,
            format_func=devices.__getitem__,
            key="models.device",
        )
        templated = chat.toggle("Chat template", value=True, key="models.chat", help="Where the tokenizer has one.")
        not_you = access.why_not()
        busy = jobs.is_running(state) or not_you is not None
        sent = st.form_submit_button("Generate", icon=":material/play_arrow:", disabled=busy, help=not_you)
    if sent and prompt.strip():
        wanted = "".join(c for c in prompt[:MAX_PROMPT] if c in "\n\t" or c.isprintable())
        arguments = ["generate", run.run_id, str(config_id), "--json", f"--prompt={wanted}", f"--tokens={count}"]
        arguments += [f"--device={where}"] + ([] if templated else ["--plain"])
        jobs.begin(run, work, arguments)
        state = jobs.state(work)
    elif sent:
        st.warning("Type something to continue.")
    jobs.show_problem()
    if jobs.is_running(state):
        jobs.follow(work, _answer_steps)
    elif state is not None and state.status is not JobStatus.DONE:
        jobs.say_failure(state, "Generating")
    elif state is not None:
        _answers(state.events)


def _answer_steps(state: JobState) -> None:
    steps = [event for event in state.events if event.result is None]
    text = wording.safe(steps[-1].text, 200) if steps else "starting a process"
    st.info(f"{text.capitalize()} …", icon=":material/hourglass_empty:")
    _answers(state.events)


def _answers(events: Sequence[Event]) -> None:
    answers = {Subject.parse(event.result["subject"]): event.result for event in events if event.result}
    for column, subject in zip(st.columns(2), [DENSE, *(name for name in answers if name != DENSE)], strict=False):
        answer = answers.get(subject)
        if answer is None:
            continue
        with column:
            st.markdown(
                f"**{wording.safe(subject.label)}**: {answer['n_layers']} layers, "
                f"{wording.size(answer['n_parameters'])} parameters"
            )
            st.code(answer["text"] or "(nothing)", language=None, wrap_lines=True)
            st.caption(
                f"{answer['tokens_per_second']:.1f} tokens/s, {wording.plural(answer['n_tokens'], 'token')} in "
                f"{wording.duration(answer['seconds'])}  ·  "
                f"{wording.gigabytes(answer['memory'])} of memory for weights and cache"
            )


# --- sizes ------------------------------------------------------------------------------------------------------------


def _dtype(view: View) -> str:
    """The number type of the run's models: as the run noted it, or, in those of older versions, as the base says it."""
    spec = view.tables.spec
    if (known := view.tables.versions.get("dtype", spec.dtype)) != "auto":
        return known
    try:
        config = json.loads((shipped.find(spec.base_model) / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):  # a base that is elsewhere, or none
        return known


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
