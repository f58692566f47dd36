"""Progress: is it going well?"""

import streamlit as st

from gptailor import wording
from gptailor.dashboard import pickers, readers, steering, widgets
from gptailor.dashboard.polling import poll
from gptailor.measures import MAX_HYPERVOLUME
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import progress as charts
from gptailor.results.charts.common import draw
from gptailor.results.frames import layers as layer_frames
from gptailor.results.frames import progress as frames
from gptailor.results.frames.seconds import seconds
from gptailor.results.frames.view import View
from gptailor.wording import plural

POLL_SECONDS = 3

widgets.open_page("Progress")
run = pickers.pick_run()
live = steering.show(run)


@poll(POLL_SECONDS if live else None)
def moving() -> None:
    """All that changes while the run is active; the page around it stays."""
    if readers.status(run.folder) != run.status:
        st.rerun()
    view = pickers.read(run)
    facts, trials = view.facts, view.trials
    if facts.error:
        st.error(wording.safe(facts.error, 2000), icon=":material/error:")
    until = view.tables.as_of if run.is_active else facts.ended_at or facts.last_activity or view.tables.as_of
    now = view.once(("numbers", run.status), lambda: frames.numbers(trials, facts, until))
    show_numbers(now, view)
    if trials.empty:
        widgets.empty(
            "The engine is getting ready: it loads the family and scores the dense model first.",
            ":material/hourglass_top:",
        )
        return
    if run.is_active and now.config_id is not None:
        one = layer_frames.strip(view.layers, now.config_id)
        if len(one):
            widgets.show_chart(
                view.once(("strip", now.config_id), lambda: draw(layer_charts.strip(one, facts))),
                one,
                title=f"Now: trial {now.trial_id}, plan {now.config_id} on {now.budget} examples",
                note="× is removed, · is the base's own layer, letters are candidates.",
                alt=f"Source of each layer of plan {now.config_id}",
                key="strip",
            )
    show_curves(view, now)
    hours = now.elapsed / 3600 if now.elapsed and run.is_active else None
    bars = view.once("timeline", lambda: frames.timeline(trials, hours))
    widgets.show_chart(
        view.once("timeline drawn", lambda: draw(charts.timeline(bars, facts.rungs))),
        bars,
        title="What was tried when",
        note=f"{plural(len(bars), 'trial')}"
        + (f", the latest of {len(trials)}" if len(bars) < len(trials) else "")
        + ", a bar each, on the rung of its budget (examples per benchmark). A cross is a crash. Before the first one "
        "the models are loaded and the dense model is scored.",
        alt="Timeline of trials by rung and status",
        key="timeline",
    )
    show_workers(view)
    show_seconds(view)
    show_failures(view)
    with st.expander("Engine log", icon=":material/terminal:", key="log", on_change="rerun") as box:
        if box.open:
            st.code(readers.log_tail(run) or "The log is empty.", language=None, height=320)


def show_numbers(now: frames.Numbers, view: View) -> None:
    facts = view.facts
    st.progress(min(now.done / max(now.asked, 1), 1.0))
    done, rung, speed, left, failed, best = st.columns([5, 4, 4, 5, 3, 4])
    done.metric("Trials", f"{wording.count(now.done)} of {wording.count(now.asked)}", border=True)
    if run.is_active:
        rung.metric(
            "Rung",
            "–" if now.budget is None else f"{now.budget} ex.",
            help="Examples per benchmark of the current trial.",
            border=True,
        )
    else:
        rung.metric("Plans judged", wording.count(len(view.plans)), help=pickers.judged_note(view), border=True)
    speed.metric(
        "Speed",
        "–" if now.rate is None else f"{wording.count(now.rate) if now.rate >= 10 else format(now.rate, '.2g')} / h",
        help="Trials an hour, over the last trials.",
        border=True,
    )
    if run.is_active:
        left.metric(
            "Time left",
            f"≈ {wording.duration(now.seconds_left)}",
            help="At the speed of the last trials; a time limit counts.",
            border=True,
        )
    else:
        left.metric("Took", wording.duration(now.elapsed), border=True)
    failed.metric(
        "Failed",
        wording.count(now.failed),
        help="Trials that crashed. They have no score; see below for why.",
        border=True,
    )
    top = view.best_row
    best.metric(
        "Best",
        "–" if top is None else wording.value(top["average"], percent=facts.average_is_share),
        help=f"{facts.average_label} of the best plan. {pickers.judged_note(view)}",
        border=True,
    )


def show_curves(view: View, now: frames.Numbers) -> None:
    facts = view.facts
    best = view.once("best", lambda: frames.best_so_far(view.trials, facts))
    if best.empty:
        if now.failed:
            widgets.empty(
                "No trial has succeeded so far, so there is no best plan; see the failures below.", ":material/error:"
            )
        else:
            widgets.empty("No trial has ended yet; the curves start with the first score.", ":material/hourglass_top:")
        return
    by = pickers.by_trials_or_hours()
    left, right = st.columns(2, gap="large")
    with left:
        widgets.show_chart(
            view.once(
                ("best drawn", by),
                lambda: draw(charts.best_so_far(best, by, facts.average_label, facts.average_is_share)),
            ),
            best,
            title="Best so far",
            note=f"{facts.average_label} of {pickers.judged_note(view)} Points are plans, diamonds are new bests.",
            alt="Best average so far",
            key="best",
            percent=facts.average_is_share,
        )
    with right:
        if best["hypervolume"].notna().any():
            widgets.show_chart(
                view.once(("hypervolume drawn", by), lambda: draw(charts.hypervolume_so_far(best, by))),
                best[["trials", "hours", "config_id", "hypervolume"]],
                title="Hypervolume so far",
                note=f"Share of the space of scores that the front of {plural(len(view.plans), 'plan')} at "
                f"{view.top_budget} examples covers; 1 is a perfect score everywhere.",
                alt="Hypervolume of the front so far",
                key="hypervolume",
            )
        else:
            widgets.empty(f"The hypervolume is told for up to {MAX_HYPERVOLUME} objectives.")


def show_workers(view: View) -> None:
    glance, at = readers.workers(run) if run.is_active else ([], 0.0)
    if glance:
        st.markdown(f"**{plural(len(glance), 'worker')}**")
        widgets.show_table(frames.workers(glance, at), alt="Workers, what they do, their use and memory", height=240)
    lanes = view.once("worker lanes", lambda: frames.worker_lanes(view.trials))
    if len(lanes):
        widgets.show_chart(
            view.once("worker lanes drawn", lambda: draw(charts.worker_lanes(lanes))),
            lanes,
            title="Who scored what when",
            note="A bar a trial, on the row of its worker; a trial that several shared has a bar on each.",
            alt="Timeline of trials by worker",
            key="workers",
        )


def show_seconds(view: View) -> None:
    spent = view.once("seconds", lambda: seconds(view.tables.seconds))
    if len(spent):
        widgets.show_chart(
            view.once("seconds drawn", lambda: draw(charts.seconds(spent))),
            spent,
            title="Where the time went",
            note=f"{wording.duration(spent['seconds'].sum())} of all processes that worked on this run. Start: imports "
            "and checks. References: what the trials are measured against. Waiting: for the device, or paused.",
            alt="Share of the run's time by part of the work",
            key="seconds",
            percent=True,
        )


def show_failures(view: View) -> None:
    failed = view.once("failures", lambda: frames.failures(view.trials))
    if failed.empty:
        return
    st.markdown(f"**{plural(len(failed), 'trial')} failed**")
    causes = view.once("causes", lambda: frames.causes(failed))
    widgets.show_table(causes, alt="Causes of failures by how often they happened", height=180)
    with st.expander("Every failure", icon=":material/bug_report:", key="failures", on_change="rerun") as box:
        if box.open:
            widgets.show_table(failed.drop(columns="error"), alt="Failed trials", height=280)
            st.caption("Traceback of the last one:")
            st.code(failed["error"].iloc[0][-4000:], language=None, height=240)


moving()
