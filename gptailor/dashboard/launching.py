"""The Launch page's parts: the form, what the search will take, and one start however often it is asked for."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pandas as pd
import streamlit as st

from gptailor import launch
from gptailor.dashboard import checking, form, readers, text, widgets
from gptailor.dashboard.checking import Answer
from gptailor.dashboard.form import Draft, Preset
from gptailor.errors import UserError
from gptailor.schedule import n_examples, schedule
from gptailor.spec import RunSpec, SpaceOperation
from gptailor.store import RunFolder

POLL_SECONDS = 1.0
TRIES = 1000
LAYERS = ("operations", "merge", "output_scale")
BENCHMARKS = ("objectives", "held_out", "include_path")
BUDGET = ("budget", "trials", "walltime", "seed")
DEVICE = ("device", "dtype", "batch_size", "chat_template")

# --- the form ---------------------------------------------------------------------------------------------------------


def pick_preset() -> Preset:
    """The run file to begin with; stops the page where there is none."""
    found = {preset.path.stem: preset for preset in form.presets()}
    if not found:
        widgets.empty("There is no preset: data/presets/ holds no run file that can be read.")
        st.stop()
    preset = found[
        widgets.select(
            "preset",
            "Begin with",
            list(found),
            lambda stem: text.plain(found[stem].title, 110),
            next(iter(found)),
            help="A run file of data/presets/. Everything in it can be changed below.",
        )
    ]
    if preset.about:
        st.caption(text.safe(preset.about, 600))
    return preset


def read(preset: Preset) -> tuple[dict[str, Any], Draft]:
    """What the form holds now (the preset's values where nothing was changed), and the run file it makes."""
    values = {
        name: st.session_state.get(_key(preset, name), value) for name, value in form.values_of(preset.spec).items()
    }
    return values, form.draft(values, preset.spec)


def fields(preset: Preset, values: Mapping[str, Any], draft: Draft) -> None:
    """The form: three fields that matter, everything else folded away with its help beside it."""
    f = _Fields(preset, values, draft)
    f.text("name", "Name of the run", max_chars=80)
    f.text(
        "base_model", "Base model", "Folder of a Hugging Face model on this machine, or a hub id such as owner/name."
    )
    f.area(
        "candidates",
        "Candidates",
        "Fine-tunes of the base that may lend layers, one a line as `name: folder or hub id`. LoRA adapters (PEFT "
        "folders) are fine. For none, leave it empty and set the operations to remove alone.",
    )
    f.text("remove", "Layers to remove", "A number of layers such as 8, or a share of them such as 25 %.")
    f.whole_run_errors()
    with f.folded("What may happen to layers", ":material/content_cut:", LAYERS):
        f.show(
            "operations",
            st.pills,
            "Operations",
            [str(operation) for operation in SpaceOperation],
            default=values["operations"],
            selection_mode="multi",
            help="remove: leave layers out. select: take a layer from one candidate. merge: make one of several. "
            "The paper's ablations are remove alone, and remove with select.",
        )
        f.text(
            "merge_method",
            "Merge method",
            "A method of mergekit: task_arithmetic (the paper's), linear, ties, dare_ties, …",
        )
        low, high = st.columns(2)
        with low:
            f.number(
                "factor_low", "Least factor", -2.0, 4.0, "How much of the candidates' differences a merge adds: from …"
            )
        with high:
            f.number("factor_high", "Greatest factor", -2.0, 4.0, "… to. 1 adds them whole.")
        f.errors("merge")
        f.show(
            "scaled",
            st.toggle,
            "Scale the output of layers",
            values["scaled"],
            help="Also search a factor on each kept layer's output projections; an export folds it into the weights.",
        )
        if values["scaled"]:
            low, high = st.columns(2)
            with low:
                f.number("scale_low", "Least scale", 0.0, 4.0)
            with high:
                f.number("scale_high", "Greatest scale", 0.0, 4.0)
        f.errors("output_scale")
    with f.folded("Benchmarks", ":material/quiz:", BENCHMARKS):
        f.area("objectives", "Objectives", "What the search optimises: an lm-eval task a line, as `task metric split`.")
        f.area(
            "held_out",
            "Held out",
            "What the result is judged by and the search never sees, in the same form, on other splits.",
        )
        f.area(
            "include_path",
            "Folders of further tasks",
            "Folders on this machine that hold lm-eval task files, one a line.",
        )
    with f.folded("Budget and time", ":material/hourglass:", BUDGET):
        low, high, eta = st.columns(3)
        with low:
            f.number("budget_min", "Fewest examples", 1, None, "Examples per benchmark on the lowest rung.")
        with high:
            f.number(
                "budget_max", "Most examples", 1, None, "Examples per benchmark on the highest rung: the full budget."
            )
        with eta:
            f.number("eta", "Ratio of rungs", 2, 10, "The best one in so many plans climbs to the next rung.")
        f.errors("budget")
        trials, time, seed = st.columns(3)
        with trials:
            f.number("trials", "Trials", 1, 100_000, "Plans tried, each on one rung. The paper takes 500.")
        with time:
            f.text("walltime", "Time limit", "Such as 90m or 2h30m. Empty: none.", placeholder="none")
        with seed:
            f.number("seed", "Seed", 0, 2**31 - 1, "The same seed gives the same trials.")
    with f.folded("Device and precision", ":material/memory:", DEVICE):
        labels = {"auto": "auto: the first GPU, else the CPU", **_device_labels()}
        f.choice("device", "Device", list(labels), labels.get)
        f.choice(
            "dtype", "Number type", ["auto", "float32", "bfloat16", "float16"], help="auto: as the base is stored."
        )
        f.text("batch_size", "Batch size", "auto, or a number: smaller takes less memory.")
        f.show(
            "chat_template",
            st.toggle,
            "Use the tokenizer's chat template",
            values["chat_template"],
            help="For models that were tuned to converse.",
        )


class _Fields:
    """Widgets of one preset's form, each with what is wrong with it right below."""

    def __init__(self, preset: Preset, values: Mapping[str, Any], draft: Draft) -> None:
        self._preset, self._values, self._problems = preset, values, draft.errors

    def show(self, name: str, widget: Callable[..., Any], label: str, *args: Any, **options: Any) -> None:
        widget(label, *args, key=_key(self._preset, name), persist_state="session", **options)
        self.errors(name)

    def text(self, name: str, label: str, help: str | None = None, **options: Any) -> None:
        self.show(name, st.text_input, label, self._values[name], help=help, **{"max_chars": 1000} | options)

    def area(self, name: str, label: str, help: str) -> None:
        height = 68 + 24 * max(min(self._values[name].count("\n"), 8), 1)
        self.show(name, st.text_area, label, self._values[name], height=height, max_chars=20_000, help=help)

    def number(self, name: str, label: str, low: float, high: float | None, help: str | None = None) -> None:
        step = 0.05 if isinstance(low, float) else 1
        self.show(name, st.number_input, label, low, high, self._values[name], step, help=help)

    def choice(
        self,
        name: str,
        label: str,
        options: Sequence[str],
        shown: Callable[[str], Any] | None = None,
        help: str | None = None,
    ) -> None:
        offered = list(dict.fromkeys([*options, self._values[name]]))
        at = offered.index(self._values[name])
        self.show(
            name,
            st.selectbox,
            label,
            offered,
            at,
            format_func=lambda option: (shown and shown(option)) or option,
            help=help,
        )

    def folded(self, label: str, icon: str, names: Iterable[str]) -> Any:
        return st.expander(label, icon=icon, expanded=any(name in self._problems for name in names))

    def errors(self, name: str) -> None:
        for line in self._problems.get(name, ()):
            st.caption(f":red[:material/error: {text.safe(line, 600)}]")

    def whole_run_errors(self) -> None:
        self.errors("")


def _key(preset: Preset, name: str) -> str:
    return f"launch.{preset.path.stem}.{name}"


def _device_labels() -> dict[str, str]:
    return {
        device.name: f"{device.name}: {device.label}, {device.free / 1e9:.1f} of {device.total / 1e9:.1f} GB free"
        for device in launch.free_devices()
    }


# --- what it will take ------------------------------------------------------------------------------------------------


def outlook(spec: RunSpec) -> bool:
    """What the search takes and whether it can run, as far as that is known yet. Returns whether it may be started."""
    desk = checking.desk()
    pending = desk.ask(spec, readers.runs_root())
    answer = pending.result() if pending.done() else None
    facts = answer.facts if answer else {}
    memory, estimate = facts.get("memory"), facts.get("estimate")
    unknown = "–" if answer else "…"
    trials, examples = st.columns(2)
    trials.metric("Trials", text.count(spec.trials), border=True)
    examples.metric(
        "Examples",
        text.count(n_examples(spec)),
        border=True,
        help="Scored in all, over all benchmarks, at most: one with fewer examples ends at its size.",
    )
    room, time = st.columns(2)
    room.metric(
        "Memory",
        f"{memory['needed'] / 1e9:.1f} GB" if memory else unknown,
        border=True,
        help=_memory_help(memory) if memory else "Predicted, on the run's device.",
    )
    time.metric(
        "Time",
        text.duration(estimate["seconds"]) if estimate else unknown,
        border=True,
        help=f"An estimate: {text.safe(estimate['how'], 400)}." if estimate else "An estimate for the whole search.",
    )
    widgets.show_table(rungs(spec), alt="Trials and examples on each rung")
    st.caption(
        "Computed: examples of each benchmark that are scored anew. A plan that climbs keeps what it scored below."
    )
    if answer is None:
        _await(pending)
        return False
    return _verdict(spec, answer)


def rungs(spec: RunSpec) -> pd.DataFrame:
    """A row a rung: examples per benchmark, trials, their share, and the examples computed for each benchmark."""
    rows = schedule(spec.budget, spec.trials)
    return pd.DataFrame(
        {
            "Rung": [f"{rung.budget} examples" for rung in rows],
            "Trials": [rung.trials for rung in rows],
            "share": [rung.trials / spec.trials for rung in rows],
            "Computed": [rung.examples for rung in rows],
        }
    )


def _memory_help(memory: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory["parts"].items())
    return f"Predicted from above, on {text.safe(memory['device'])}: {parts}."


def _await(pending: Future[Answer]) -> None:
    @st.fragment(run_every=POLL_SECONDS)
    def look() -> None:
        st.info("Checking whether the models fit together …", icon=":material/hourglass_empty:")
        if pending.done():
            st.rerun()

    look()


def _verdict(spec: RunSpec, answer: Answer) -> bool:
    facts = answer.facts
    problems = [answer.problem] if answer.problem else facts["problems"]
    if problems:
        lines = "\n".join(f"- {text.safe(line, 600)}" for line in problems)
        st.error(f"This search cannot run yet.\n\n{lines}", icon=":material/error:")
    else:
        family, memory = facts["family"], facts["memory"]
        st.success(
            text.safe(
                f"The models fit together: {family['architecture']}, {text.size(family['n_parameters'])} parameters in "
                f"{family['dtype']}. {family['n_removed']} of {family['n_layers']} layers go, {family['kept']:.0%} of "
                "the parameters stay.",
                400,
            ),
            icon=":material/check_circle:",
        )
        too_large = memory["free"] is not None and memory["needed"] > memory["free"]
        say = st.warning if too_large else st.caption
        say(text.safe(f"Memory: {memory['verdict']}.", 400))
        for note in facts["notes"]:
            st.caption(text.safe(f"Note: {note}", 400))
    if st.button("Check again", icon=":material/refresh:", type="tertiary"):
        checking.desk().ask(spec, readers.runs_root(), again=True)
        st.rerun()
    return not problems


# --- the start --------------------------------------------------------------------------------------------------------


def start_button(spec: RunSpec | None, ready: bool) -> None:
    """Start, once: a second click, a second tab or a second person is led to the run that is there."""
    runs = readers.runs()
    twin = next((run for run in runs if spec and run.is_active and _asks_for(run.folder, spec)), None)
    if problem := st.session_state.pop("launch.problem", None):
        st.error(text.safe(problem, 600), icon=":material/error:")
    if twin is not None:
        _is_there(twin, runs)
        return
    form_token = st.session_state.setdefault("launch.form", secrets.token_hex(8))
    ahead = [run for run in runs if spec and run.is_active and _same_device(run.summary.device, spec.device)]
    if ahead:
        names = ", ".join(text.safe(run.name, 40) for run in reversed(ahead))
        st.info(f"The device is taken: this run will queue behind {names}.", icon=":material/hourglass_empty:")
    st.button(
        "Start the search",
        type="primary",
        icon=":material/rocket_launch:",
        width="stretch",
        disabled=spec is None or not ready,
        on_click=_start,
        args=(spec, form_token),
        help=None if ready else "Possible once the fields are right and the models are checked.",
    )


def _start(spec: RunSpec, form_token: str) -> None:
    if st.session_state.get("launch.form") != form_token:
        return  # a second click on a form that was sent
    try:
        launch_once(spec)
    except UserError as error:
        st.session_state["launch.problem"] = str(error)
    else:
        st.session_state["launch.form"] = secrets.token_hex(8)


def launch_once(spec: RunSpec) -> RunFolder:
    """The active run that asks for exactly this, started now if there is none: whoever asks gets the same one.

    Raises UserError where no run can be made or started.
    """
    text_of = spec.to_yaml()
    for attempt in range(TRIES):  # an attempt that has ended makes room for the next
        token = hashlib.sha256(f"{attempt}\n{text_of}".encode()).hexdigest()
        folder, is_new = launch.launch(readers.runs_root(), spec, token)
        if is_new or any(run.run_id == folder.run_id and run.is_active for run in readers.runs()):
            return folder
    raise UserError(f"this very search was run {TRIES} times; change its name or seed")


def _asks_for(folder: RunFolder, spec: RunSpec) -> bool:
    try:
        return folder.spec.read_text(encoding="utf-8") == spec.to_yaml()
    except OSError:
        return False


def _is_there(run: readers.Run, runs: Sequence[readers.Run]) -> None:
    """The run that asks for what the form asks for: its state, behind whom it waits, and the way to it."""
    names = {other.run_id: other.name for other in runs}
    behind = [names.get(run_id, run_id) for run_id in launch.waiting_behind(readers.runs_root(), run.run_id)]
    said = f"**{text.safe(run.name)}** is {run.status}."
    if behind:
        said += f" It waits for its device behind {', '.join(text.safe(name, 40) for name in behind)}."
    st.success(said, icon=":material/rocket_launch:")
    st.page_link("pages/2_Progress.py", label="Watch it", icon=":material/timeline:", query_params={"run": run.run_id})
    st.caption("Change anything, such as the seed, to launch another one.")


def _same_device(one: str, other: str) -> bool:
    return "auto" in (one, other) or one == other or {one, other} == {"cuda", "cuda:0"}


# --- the same elsewhere -----------------------------------------------------------------------------------------------


def in_other_words(spec: RunSpec, preset: Preset) -> None:
    """The same search as a run file and as a command, to copy."""
    command, run_file = st.tabs(["As a command", "As a run file"])
    command.code(form.command_line(spec, preset, readers.runs_root()), language="bash", wrap_lines=True)
    run_file.code(form.run_file(spec), language="yaml")
