"""What a heal takes, before it is started: bytes at once, beside the family that is open already. From above."""

from __future__ import annotations

from dataclasses import dataclass

from gptailor.heal.batches import BATCH_TOKENS

MASTER, GRADIENT_AND_ADAM, CAST = 4, 12, 2
"""Bytes of a parameter in float32, of a trained one's gradient and two moments, and of its copy in bfloat16."""
OF_HIDDEN, OF_INNER = 20, 6
"""Numbers that a layer keeps of a token until its gradient is known: so many times the stream's and the MLP's width."""
OF_VOCABULARY = 4
"""Rows as long as the vocabulary, in float32: logits of both models, the student's gradient, one more in halves."""


@dataclass(frozen=True)
class Sizes:
    """Of the plan's model: layers, the stream's width, the MLP's, vocabulary, parameters, and the trained ones."""

    n_layers: int
    hidden: int
    inner: int
    vocabulary: int
    parameters: int
    trained: int


def heal_bytes(of: Sizes, in_bfloat16: bool) -> int:
    """Bytes of the student, its optimiser and one step."""
    itemsize = 2 if in_bfloat16 else 4
    student = of.parameters * (MASTER + (CAST if in_bfloat16 else 0)) + of.trained * GRADIENT_AND_ADAM
    kept = BATCH_TOKENS * of.n_layers * (OF_HIDDEN * of.hidden + OF_INNER * of.inner) * itemsize
    return student + kept + BATCH_TOKENS * of.vocabulary * OF_VOCABULARY * 4
