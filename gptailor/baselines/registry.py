"""Published ways to leave layers out, one file each. Each turns a `Case` into a plan that is scored like any other.

The modules bring torch, so that the table of names does not import them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING

from gptailor.plan import BASE, evenly
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Baseline
from gptailor.trial import LESS, REPAIRED_BY, Subject

if TYPE_CHECKING:
    from gptailor.baselines.case import Case
    from gptailor.plan import StitchPlan


@dataclass(frozen=True)
class Method:
    """A published method, and where its function is.

    title: for people. function: module.function in this package. seeds: how often it is done, with another seed.
    scores: whether it scores plans on its way. removes: whether layers go; else they get narrower or sparser, and there
    is no gap to repair. is_repaired: whether a repair is part of it.
    """

    title: str
    function: str
    seeds: int = 1
    scores: bool = False
    removes: bool = True
    is_repaired: bool = False

    def load(self) -> Callable[[Case], StitchPlan]:
        module, name = self.function.split(".")
        return getattr(import_module(f"gptailor.baselines.{module}"), name)


METHODS: dict[Baseline, Method] = {
    Baseline.RANDOM: Method("Random layers", "random_layers.cut", seeds=5),
    Baseline.LAST: Method("Last layers", "last_layers.cut"),
    Baseline.BLOCK_INFLUENCE: Method("Block Influence (ShortGPT)", "block_influence.cut"),
    Baseline.MAGNITUDE: Method("Relative magnitude", "relative_magnitude.cut"),
    Baseline.ANGULAR: Method("Angular distance of blocks (UIDL)", "angular_distance.cut"),
    Baseline.LLM_STREAMLINE: Method("LLM-Streamline's block", "llm_streamline.cut"),
    Baseline.LORP: Method("LoRP", "lorp.cut"),
    Baseline.SLEB: Method("SLEB", "sleb.cut"),
    Baseline.SHORTENED_PERPLEXITY: Method("Shortened LLaMA, perplexity", "shortened_llama.perplexity_cut"),
    Baseline.SHORTENED_TAYLOR: Method("Shortened LLaMA, Taylor+", "shortened_llama.taylor_cut"),
    Baseline.BLOCK_INFLUENCE_PRUNE_COMP: Method(
        "Prune&Comp on Block Influence", "mended.block_influence_prune_comp", is_repaired=True
    ),
    Baseline.ANGULAR_PRUNE_COMP: Method("Prune&Comp on UIDL's block", "mended.angular_prune_comp", is_repaired=True),
    Baseline.BLOCK_INFLUENCE_REPLACEME: Method(
        "ReplaceMe on Block Influence", "mended.block_influence_replaceme", is_repaired=True
    ),
    Baseline.ANGULAR_REPLACEME: Method("ReplaceMe on UIDL's block", "mended.angular_replaceme", is_repaired=True),
    Baseline.LLM_PRUNER: Method("LLM-Pruner, first order", "narrower.llm_pruner", removes=False),
    Baseline.LLM_PRUNER_MIXED: Method("LLM-Pruner, mixed", "narrower.llm_pruner_mixed", removes=False),
    Baseline.SLIMGPT: Method("SlimGPT", "narrower.slimgpt", removes=False),
    Baseline.BESA: Method("BESA (zeros: not smaller)", "narrower.besa", removes=False),
    Baseline.LACO: Method("LaCo, the paper's formula", "laco.paper_cut"),
    Baseline.LACO_NOTEBOOK: Method("LaCo, as published in code", "laco.notebook_cut"),
    Baseline.GREEDY: Method("Greedy on the objectives (TALE)", "greedy.cut", scores=True),
    Baseline.EVOLUTION: Method("Evolution over removed layers (EvoPress)", "evolution.cut", scores=True),
}
"""Cheap ones first."""


BASELINE_SIZES = 3
"""Numbers of layers that baselines cut at, where a run asks for a range: its ends and its middle."""


@dataclass(frozen=True)
class Cut:
    """One method on one source (the base or a candidate).

    n_removed: layers that go, or as many parameters as they have. subject: its name among the evaluations. is_repaired:
    whether the run's repair is done to its plan.
    """

    baseline: Baseline
    source: str
    seed: int
    n_removed: int
    subject: Subject
    is_repaired: bool = False


def sized(name: str, n_removed: int, removals: range) -> str:
    """A baseline's name among the subjects: with the number of layers that go, where the run has several."""
    return f"{name}{LESS}{n_removed}" if len(removals) > 1 else str(name)


def cuts(spec: RunSpec, names: Iterable[Baseline], n_layers: int) -> list[Cut]:
    """What methods make of a run's family, whose base has so many layers.

    On the base and on each candidate (those asked for), as often as they have seeds, and of a range at its ends and its
    middle; where the run repairs, each plan that removes layers, and has no repair of its own, as it is and then
    repaired.
    """
    found = []
    removals = spec.removals(n_layers)
    for name, source, gone in product(
        names, spec.baselines_on or (BASE, *spec.candidates), evenly(removals, BASELINE_SIZES)
    ):
        for number in range(METHODS[name].seeds):
            label = sized(f"{name}-{number + 1}" if METHODS[name].seeds > 1 else name, gone, removals)
            place, seed = None if source == BASE else source, spec.seed + number
            found.append(Cut(name, source, seed, gone, Subject.baseline(label, place)))
            if spec.repairs is not None and METHODS[name].removes and not METHODS[name].is_repaired:
                subject = Subject.baseline(f"{label}{REPAIRED_BY}{spec.repairs.method}", place)
                found.append(Cut(name, source, seed, gone, subject, is_repaired=True))
    return found
