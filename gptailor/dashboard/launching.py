"""The Launch page's form: three fields that matter, everything else folded away, and what is wrong right below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gptailor import wording
from gptailor.dashboard import form, url, widgets
from gptailor.dashboard.form import Draft, Preset
from gptailor.launch.devices import free_devices
from gptailor.spec.files import describe
from gptailor.spec.sections import Baseline, SpaceOperation
from gptailor.wording import gigabytes

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

LAYERS = ("operations", "merge", "output_scale", "baselines")
BENCHMARKS = ("objectives", "held_out", "selection", "aim", "include_path")
BUDGET = ("budget", "trials", "walltime", "seed")
DEVICE = ("device", "dtype", "batch_size", "workers", "chat_template")


def pick_preset() -> Preset:
    """The run file to begin with; stops the page where there is none."""
    found = {preset.path.stem: preset for preset in form.presets()}
    if not found:
        widgets.empty("There is no preset: data/presets/ holds no run file that can be read.")
        st.stop()
    preset = found[
        url.select(
            "preset",
            "Begin with",
            list(found),
            lambda stem: wording.plain(found[stem].title, 110),
            next(iter(found)),
            help="A run file of data/presets/. Everything in it can be changed below.",
        )
    ]
    if preset.about:
        st.caption(wording.safe(preset.about, 600))
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
    f.text("base_model", "Base model")
    f.area(
        "candidates",
        "Candidates",
        "One a line, as `name: folder or hub id`. For none, leave it empty and set the operations to remove alone.",
    )
    measure, amount = st.columns([1, 2])
    with measure:
        f.choice("remove_by", "How much goes, in", list(form.MEASURES))
    with amount:
        f.text("remove", "How much goes", f"Write {form.MEASURES[values['remove_by']]}.")
    f.whole_run_errors()
    with f.folded("What may happen to layers", ":material/content_cut:", LAYERS):
        f.show(
            "operations",
            st.pills,
            "Operations",
            [str(operation) for operation in SpaceOperation],
            default=values["operations"],
            selection_mode="multi",
        )
        f.text("merge_method", "Merge method")
        low, high = st.columns(2)
        with low:
            f.number("factor_low", "Least factor", -2.0, 4.0)
        with high:
            f.number("factor_high", "Greatest factor", -2.0, 4.0)
        f.errors("merge")
        f.show("scaled", st.toggle, "Scale the output of layers", values["scaled"])
        if values["scaled"]:
            low, high = st.columns(2)
            with low:
                f.number("scale_low", "Least scale", 0.0, 4.0)
            with high:
                f.number("scale_high", "Greatest scale", 0.0, 4.0)
        f.errors("output_scale")
        f.show(
            "baselines",
            st.pills,
            "Score baselines instead of searching",
            [str(name) for name in Baseline],
            default=values["baselines"],
            selection_mode="multi",
            how="For a search, choose none.",
        )
    with f.folded("Benchmarks", ":material/quiz:", BENCHMARKS):
        f.area("objectives", "Objectives", "One a line, as `task metric split`.")
        f.area("held_out", "Held out", "In the same form.")
        f.area(
            "selection",
            "Selection",
            "In the same form, or part of a split: validation[1000:] leaves out the 1,000 examples that a search up to "
            "that budget reads. May be empty.",
        )
        f.choice("aim", "Aim", ["front", "mean"])
        f.area("include_path", "Folders of further tasks", "One a line.")
    with f.folded("Budget and time", ":material/hourglass:", BUDGET):
        low, high, eta = st.columns(3)
        with low:
            f.number("budget_min", "Fewest examples", 1, None)
        with high:
            f.number("budget_max", "Most examples", 1, None)
        with eta:
            f.number("eta", "Ratio of rungs", 2, 10)
        f.errors("budget")
        trials, time, seed = st.columns(3)
        with trials:
            f.number("trials", "Trials", 1, 100_000)
        with time:
            f.text("walltime", "Time limit", placeholder="none")
        with seed:
            f.number("seed", "Seed", 0, 2**31 - 1)
    with f.folded("Device and precision", ":material/memory:", DEVICE):
        devices = free_devices()
        labels = {"auto": "auto: the first GPU (more, if the base needs them), else the CPU"}
        labels |= {found.name: f"{found.name}: {found.label}" for found in devices}
        f.choice("device", "Device", list(labels), labels.get)
        free = ", ".join(f"{d.name} {gigabytes(d.free)} of {gigabytes(d.total)}" for d in devices)
        st.caption(f"Memory free now: {wording.safe(free, 400)}.")
        f.choice("dtype", "Number type", ["auto", "float32", "bfloat16", "float16"])
        f.text("batch_size", "Batch size")
        f.text("workers", "Workers", "Empty: one trial after another.", placeholder="one")
        f.show("chat_template", st.toggle, "Use the tokenizer's chat template", values["chat_template"])


class _Fields:
    """Widgets of one preset's form, each with what is wrong with it right below."""

    def __init__(self, preset: Preset, values: Mapping[str, Any], draft: Draft) -> None:
        self._preset, self._values, self._problems = preset, values, draft.errors

    def show(
        self, name: str, widget: Callable[..., Any], label: str, *args: Any, how: str = "", **options: Any
    ) -> None:
        """how: how to write here what the key's own description says."""
        help = f"{describe(form.KEYS.get(name, name))} {how}".strip()
        widget(label, *args, key=_key(self._preset, name), persist_state="session", help=help, **options)
        self.errors(name)

    def text(self, name: str, label: str, how: str = "", **options: Any) -> None:
        self.show(name, st.text_input, label, self._values[name], how=how, **{"max_chars": 1000} | options)

    def area(self, name: str, label: str, how: str) -> None:
        height = 68 + 24 * max(min(self._values[name].count("\n"), 8), 1)
        self.show(name, st.text_area, label, self._values[name], height=height, max_chars=20_000, how=how)

    def number(self, name: str, label: str, low: float, high: float | None) -> None:
        step = 0.05 if isinstance(low, float) else 1
        self.show(name, st.number_input, label, low, high, self._values[name], step)

    def choice(
        self,
        name: str,
        label: str,
        options: Sequence[str],
        shown: Callable[[str], Any] | None = None,
    ) -> None:
        # Labels must not change while the page is open: Streamlit tells options apart by what they show.
        offered = list(dict.fromkeys([*options, self._values[name]]))
        at = offered.index(self._values[name])
        self.show(
            name,
            st.selectbox,
            label,
            offered,
            at,
            format_func=lambda option: (shown and shown(option)) or option,
        )

    def folded(self, label: str, icon: str, names: Iterable[str]) -> DeltaGenerator:
        return st.expander(label, icon=icon, expanded=any(name in self._problems for name in names))

    def errors(self, name: str) -> None:
        for line in self._problems.get(name, ()):
            st.caption(f":red[:material/error: {wording.safe(line, 600)}]")

    def whole_run_errors(self) -> None:
        self.errors("")


def _key(preset: Preset, name: str) -> str:
    return f"launch.{preset.path.stem}.{name}"
