"""What an edit takes, before it is started: bytes at once and arithmetic, from sizes alone.

From above: how many layers stand before a gap is not known before there is a plan, so every removed layer may make one.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptailor.spec.sections import Repair, RepairMethod

BATCH_TOKENS, SLICE = 8192, 2048
"""Tokens of a batch (case.py), and rows that are in float64 at a time (solve.py)."""
WIDE = 8
"""Bytes of a float64."""
GRAMS = 6
"""Matrices of [inner, inner] at once: of the fit, of what is kept out of it, their sum, damped, its factor, and one of
an error."""
CROSSES = 5
"""Matrices of [hidden, inner] at once, in float64."""
RIDGES_TRIED = 6
UPPER = 0.625
"""Share of a Gram matrix that is multiplied (solve.py, BLOCKS)."""
WIDE_SLOWER = 2.0
"""How many times longer a product takes in float64: so on a CPU; on a GPU that is not made for it, up to 64 times."""


SQUARES = 5
"""Matrices of [inner, inner] at once in float64 of the optimal brain surgeon: its sum, that by n, a copy, its factor,
the inverse."""
BLOCK = 1024
"""Channels that leave at once, at most (slimgpt.py)."""
LARGEST_SHARE = 1.5
"""Share of the widest cut layer's columns that go, as so many times the mean (the share rises with log(i + 1))."""
SHORT_TEXTS = 640
"""Tokens that LLM-Pruner reads (llm_pruner.py)."""
OF_HIDDEN, OF_INNER = 20, 6
"""Numbers that a layer keeps of a token until its gradient is known: so many times the stream's and the MLP's width."""
OF_VOCABULARY = 5
"""Rows as long as the vocabulary, in float32, of a loss and its gradient."""
STEPS = 128
"""Of BESA in a layer."""
TEXT = 128
"""Tokens of a text, of which a step of BESA reads one or more."""
OF_WEIGHT = 112
"""Bytes of a weight that BESA learns about: its rank and places in it, its probability, mask and gradients."""
PER_WEIGHT = 400
"""What a step of BESA does to a weight, as products in the time that it takes: it is bound by memory."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: layers, kept ones, the stream's width, the MLP's, parameters of a layer, bytes of a number.

    vocabulary: rows of the output head.
    """

    n_layers: int
    n_kept: int
    hidden: int
    inner: int
    layer_parameters: int
    itemsize: int
    vocabulary: int = 0


@dataclass(frozen=True)
class Cost:
    """n_bytes: beside the models, at once. operations: floating-point, those in float64 as so many more."""

    n_bytes: int
    operations: float


def repair_cost(repair: Repair, of: Sizes) -> Cost:
    """What repairing one plan takes."""
    n, hidden = repair.tokens_for(of.inner), of.hidden
    is_refit = repair.method is RepairMethod.REFIT
    at_gaps = not is_refit or repair.layers == "gaps"
    n_fitted = min(of.n_layers - of.n_kept, of.n_kept) if at_gaps else of.n_kept
    streams = 3 * n * hidden * of.itemsize  # student, teacher, and what is behind the layer
    streams += min(n, BATCH_TOKENS) * (2 * of.inner + 4 * hidden) * of.itemsize  # while a layer is called
    reading = 2 * n * of.layer_parameters * (of.n_layers + of.n_kept + n_fitted)
    if repair.method is RepairMethod.PRUNE_COMP:
        edited = 2 * of.n_kept * hidden * max(of.inner, hidden) * of.itemsize
        return Cost(streams + edited + 3 * n * hidden * WIDE, reading)
    site = n * (2 * of.inner + 6 * hidden) * of.itemsize  # what a projection reads, batch by batch and together
    width = of.inner if is_refit else hidden
    matrices = WIDE * (GRAMS * width**2 + CROSSES * hidden * width + min(n, SLICE) * (width + hidden) + n * hidden)
    edited = n_fitted * hidden * of.inner * of.itemsize
    fit = 2 * n * width * (UPPER * width + hidden) + RIDGES_TRIED * (width**3 / 3 + 4 * width**2 * hidden)
    if is_refit and repair.projections == "both":
        edited += n_fitted * hidden**2 * of.itemsize
        fit += 2 * n * hidden * (UPPER * hidden + hidden) + RIDGES_TRIED * (hidden**3 / 3 + 4 * hidden**3)
        reading += 4 * n * of.layer_parameters * n_fitted
    return Cost(streams + site + matrices + edited, reading + WIDE_SLOWER * n_fitted * fit)


def slimgpt_cost(n: int, of: Sizes) -> Cost:
    """What SlimGPT takes of one model. n: tokens of its texts."""
    widths, share = (of.inner, of.hidden), 1 - of.n_kept / of.n_layers
    most = max(widths)
    streams = (2 * n * of.hidden + min(n, BATCH_TOKENS) * (3 * of.inner + 5 * of.hidden)) * of.itemsize
    block = min(BLOCK, LARGEST_SHARE * share * most)
    matrices = WIDE * (SQUARES * most**2 + 3 * of.hidden * most + int(3 * block * most))
    slices = min(n, BATCH_TOKENS) * most * of.itemsize + min(n, SLICE) * most * WIDE
    edited = of.n_layers * of.layer_parameters * of.itemsize
    reading = 3 * 2 * n * of.layer_parameters
    fit = sum(2 * n * w**2 + w**3 + 2 * LARGEST_SHARE * share * w**2 * (w + of.hidden) for w in widths)
    return Cost(streams + matrices + slices + edited, of.n_layers * (reading + WIDE_SLOWER * fit))


def llm_pruner_cost(of: Sizes, is_mixed: bool) -> Cost:
    """What LLM-Pruner takes of one model: the gradients of all its layers, and for `mixed` their squares."""
    weights = of.n_layers * of.layer_parameters
    gradients = weights * (of.itemsize + (4 + of.itemsize if is_mixed else 0))
    kept = SHORT_TEXTS * of.n_layers * (OF_HIDDEN * of.hidden + OF_INNER * of.inner) * of.itemsize
    head = SHORT_TEXTS * of.vocabulary * OF_VOCABULARY * 4
    importance = 4 * 4 * of.layer_parameters
    passes = 2 if is_mixed else 1
    operations = passes * 3 * 2 * SHORT_TEXTS * (weights + of.hidden * of.vocabulary)
    return Cost(gradients + kept + head + importance + weights * of.itemsize, operations)


def besa_cost(n: int, of: Sizes) -> Cost:
    """What BESA takes of one model. n: tokens of its texts, of which each step reads a part."""
    streams = n * of.hidden * (3 * of.itemsize + 4)
    step = max(n // STEPS, 4 * TEXT) * (OF_HIDDEN * of.hidden + OF_INNER * of.inner) * 4
    edited = of.n_layers * of.layer_parameters * of.itemsize
    read = 3 * n + 3 * (n + STEPS * TEXT)  # ranked, wanted and left; there and back in every step
    return Cost(
        streams + step + OF_WEIGHT * of.layer_parameters + edited,
        of.n_layers * of.layer_parameters * (2.0 * read + STEPS * PER_WEIGHT),
    )
