"""Charts of a family's redundancy on pages: layer by layer, candidate by candidate, state by state."""

from __future__ import annotations

import streamlit as st

from gptailor import wording
from gptailor.dashboard import widgets
from gptailor.results.charts import redundancy as charts
from gptailor.results.frames import redundancy as frames
from gptailor.results.outlook import ALIKE, CHEAP
from gptailor.results.redundancy import Redundancy

LAYERS, CANDIDATES, STATES = "Layers", "Candidates", "States"


def show_charts(found: Redundancy, n_removed: int) -> None:
    """Layer by layer. n_removed: the length of blocks whose angular distance is shown."""
    parts = [LAYERS, *([CANDIDATES] if found.candidates else []), STATES]
    part = st.segmented_control("Show", parts, default=LAYERS, required=True, key="redundancy.part")
    if part == CANDIDATES:
        _candidates(found)
    elif part == STATES:
        _states(found)
    else:
        _layers(found, max(1, n_removed))


def _layers(found: Redundancy, n: int) -> None:
    table, blocks = frames.by_layer(found), frames.blocks(found, n)
    if table["kept"].notna().any():
        widgets.show_chart(
            charts.costs(table),
            table,
            title="What does leaving out one layer cost?",
            note=f"Percent of what the objectives give above guessing, on {found.examples} examples of each. Look for "
            f"framed cells: they look cheap (at most {1 - CHEAP:.0%}, or the layer does nothing or is a copy).",
            alt="Heatmap of models by layers: the cost of leaving out each layer alone",
            key="redundancy.costs",
        )
    widgets.show_chart(
        charts.influence(table),
        table[["model", "layer", "influence"]],
        title="How much does each layer change what it gets?",
        note="Block Influence: 1 less the cosine between what enters and what leaves. Look for low values; they need "
        "no examples, and foretell the costs above only roughly.",
        alt="Heatmap of models by layers: Block Influence",
        key="redundancy.influence",
    )
    widgets.show_chart(
        charts.blocks(blocks),
        blocks,
        title=f"How far does each block of {wording.plural(n, 'layer')} turn the stream?",
        note="Angular distance between what enters and what leaves the block, at the texts' last tokens. The lowest is "
        "the block that UIDL cuts.",
        alt="Heatmap of models by the first layer of a block: the angular distance",
        key="redundancy.blocks",
    )


def _candidates(found: Redundancy) -> None:
    table, pairs = frames.by_layer(found).dropna(subset=["distance"]), frames.agreement(found)
    widgets.show_chart(
        charts.distances(table),
        table[["model", "layer", "distance"]],
        title="Where do the candidates differ from the base?",
        note="Norm of the difference, in percent of the base's layer. Where it is near 0 there is nothing to select.",
        alt="Heatmap of candidates by layers: the distance from the base's layer",
        key="redundancy.distances",
    )
    if len(pairs):
        widgets.show_chart(
            charts.agreement(pairs),
            pairs,
            title="Do the candidates agree?",
            note=f"Cosine between what two candidates changed, times 100. From {100 * ALIKE:.0f} on they agree; from "
            f"-{100 * ALIKE:.0f} down they conflict, and a merge cancels what both learned; around 0 it keeps both."
            + (f" The {frames.MOST_PAIRS} pairs that do so most." if len(found.agreement) > frames.MOST_PAIRS else ""),
            alt="Heatmap of pairs of candidates by layers: the cosine between their differences from the base",
            key="redundancy.agreement",
        )


def _states(found: Redundancy) -> None:
    narrow, _ = st.columns([2, 3])
    with narrow:
        model = str(st.selectbox("Model", list(found.models), format_func=wording.plain, key="redundancy.model"))
    left, right = st.columns(2)
    note = (
        f"Between what enters every two layers, on {wording.count(found.n_sampled)} tokens. Look for bright squares "
        "along the diagonal: layers that change little."
    )
    with left:
        _square(found, model, "cosine", "How alike are the states? Cosine", note)
    with right:
        _square(found, model, "cka", "The same by linear CKA", f"{note} Turns and scales count as alike here.")


def _square(found: Redundancy, model: str, measure: frames.Measure, title: str, note: str) -> None:
    table = frames.similarity(found, model, measure)
    alt = f"Heatmap of the similarity ({measure}) of every two states of {model}"
    drawn = charts.similarity(table, measure)
    widgets.show_chart(drawn, table, title=title, note=note, alt=alt, key=f"redundancy.{measure}")
