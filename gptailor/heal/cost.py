"""What a heal takes, before it is started: bytes at once, beside the family that is open already. From above."""

from __future__ import annotations

from dataclasses import dataclass

from gptailor.heal.batches import BATCH_TOKENS

MASTER, GRADIENT_AND_ADAM, CAST = 4, 12, 2
"""Bytes of a number in float32, of a trained one's gradient and two moments, and of one in bfloat16."""
OF_HIDDEN, OF_INNER = 20, 6
"""Numbers that a layer keeps of a token until its gradient is known: so many times the stream's and the MLP's width."""
HEAD_ROWS = 256
"""Tokens whose logits are there at a time (loss.py)."""
SHORT = 128
"""Tokens of a text up to which a CPU writes attention out in bfloat16 (student.py): the backward pass of torch's fused
one takes it four times as long at 64 tokens, and less at 512."""
OF_SCORES = 6
"""Bytes of a score of that attention, in float32 and rounded."""
OF_VOCABULARY = 4
"""Rows as long as the vocabulary: logits of both models, the student's gradient, one more while they are compared."""
OF_LAST = 4
"""Last hidden states of all tokens, in float32: of both models, the student's gradient, one more."""


@dataclass(frozen=True)
class Sizes:
    """Of the plan's model: layers, the stream's width, the MLP's, vocabulary; parameters that are not trained, and are.

    heads: whose attention is written out for short texts. kept: bytes of the teacher's states that are kept on the same
    device (teaching.py).
    """

    n_layers: int
    hidden: int
    inner: int
    vocabulary: int
    frozen: int
    trained: int
    heads: int = 0
    kept: int = 0


def heal_bytes(of: Sizes, in_bfloat16: bool) -> int:
    """Bytes of the student, its optimiser and one step."""
    itemsize = CAST if in_bfloat16 else MASTER
    student = of.frozen * itemsize + of.trained * (MASTER + (CAST if in_bfloat16 else 0) + GRADIENT_AND_ADAM)
    layers = (
        BATCH_TOKENS
        * of.n_layers
        * ((OF_HIDDEN * of.hidden + OF_INNER * of.inner) * itemsize + of.heads * SHORT * OF_SCORES)
    )
    head = HEAD_ROWS * of.vocabulary * OF_VOCABULARY * MASTER + BATCH_TOKENS * of.hidden * OF_LAST * MASTER
    return student + layers + head + of.kept


def lora_parameters(rank: int, hidden: int, inner: int) -> int:
    """Of the adapters of one layer, from above: four maps of attention, as wide as the stream, and three of the MLP."""
    return rank * (4 * 2 * hidden + 3 * (hidden + inner))


def heal_operations(of: Sizes, tokens: int, distinct: int, each: int, n_layers: int, is_lora: bool) -> float:
    """Floating-point operations of a heal on so many tokens.

    distinct: tokens of its texts, each of which the teacher reads once. each: parameters of a layer. n_layers: of the
    teacher. A gradient of what is not trained is that of what it reads alone. Texts are as long as SHORT.
    """
    student = (4 if is_lora else 6) * each * of.n_layers + 6 * of.trained
    teacher = 2 * each * n_layers * min(1.0, distinct / tokens)
    head = 3 * 2 * of.hidden * of.vocabulary
    attention = 4 * 4 * SHORT * of.hidden * of.n_layers
    return tokens * float(student + teacher + head + attention)
