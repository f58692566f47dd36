"""The Models page's heal: what is asked, how it goes on, what came of it. It trains in a process of its own."""

from __future__ import annotations

import streamlit as st

from gptailor import wording
from gptailor.dashboard import access, jobs
from gptailor.dashboard.readers import Run
from gptailor.launch.jobs import JobState, JobStatus
from gptailor.trial import DENSE, Subject

TOKENS = ("100k", "500k", "1M", "2M", "5M")
TEXTS = {
    "objectives+base": "Both: the objectives' calibration texts and texts that the base writes",
    "objectives": "The objectives' calibration texts",
    "base": "Texts that the base writes",
}


def heal(run: Run, config_id: int) -> None:
    """Heal the plan, say how that goes on, and offer to judge what came of it."""
    st.markdown("#### Heal")
    work = jobs.job(run, f"heal-{config_id}")
    state = jobs.state(work)
    if jobs.is_running(state):
        jobs.follow(work, _steps)
    elif state is not None and state.status is JobStatus.DONE:
        _healed(run, config_id, state)
    else:
        if state is not None:
            jobs.say_failure(state, "Healing")
        _ask(run, config_id)
    jobs.show_problem()


def _ask(run: Run, config_id: int) -> None:
    st.caption(
        "A short training of the plan's layers on what the dense model says of some texts. It is judged as every other "
        "plan is; rows that judge are never among the texts. After a cancel, the same choice goes on where it was."
    )
    tokens, texts, minutes = st.columns([2, 5, 2], vertical_alignment="bottom")
    tokens.selectbox("Tokens", TOKENS, 1, key="models.heal.tokens", help="More take longer and heal more.")
    texts.selectbox(
        "Texts", list(TEXTS), format_func=TEXTS.__getitem__, key="models.heal.texts", help="They decide what heals."
    )
    minutes.number_input("Minutes at most", 1, 10_000, 60, key="models.heal.minutes")
    not_you = access.why_not()
    st.button(
        "Heal by a short training",
        icon=":material/healing:",
        on_click=_begin,
        args=(run, config_id),
        disabled=not_you is not None or run.is_active or run.is_demo,
        help=not_you or "It takes a GPU, or minutes to hours on a CPU, and the run must be at rest.",
    )


def _begin(run: Run, config_id: int) -> None:
    """By what the fields hold at the click."""
    count, source, limit = (st.session_state[f"models.heal.{name}"] for name in ("tokens", "texts", "minutes"))
    out = jobs.exports_root() / f"{run.run_id}-{config_id}-healed-{count.lower()}"
    asked = ["--json", "--tokens", count, "--texts", source, "--minutes", str(limit)]
    jobs.begin(run, jobs.job(run, f"heal-{config_id}"), ["heal", run.run_id, str(config_id), str(out), *asked])


def _steps(state: JobState) -> None:
    text, share = jobs.last_words(state, "opening the models")
    st.progress(share, text=f"Healing: {text} …")


def _healed(run: Run, config_id: int, state: JobState) -> None:
    found = next((event.result for event in reversed(state.events) if event.result), None)
    if found is None:
        return
    subject = Subject.parse(found["subject"])
    losses = found["losses"]  # none of a heal of a few steps
    fell = (
        f" The divergence from the dense model went from {losses[0]:.3f} to {losses[-1]:.3f} nats a token."
        if losses
        else ""
    )
    st.success(
        f"{subject.label}: healed on {wording.count(found['tokens'])} tokens in {wording.duration(found['seconds'])}."
        f"{fell} It is in {wording.safe(found['folder'], 300)}.",
        icon=":material/check_circle:",
    )
    jobs.offer(
        run,
        f"judge-healed-{config_id}",
        ["evaluate", "--subjects", f"{DENSE},{subject.before},{subject}"],
        doing="Scoring on the held-out benchmarks",
        label="Score it on the held-out benchmarks, beside what it was",
        icon=":material/quiz:",
        help="What it scores stands in the tables of held-out averages then.",
    )
