"""What the teacher says, as its last hidden states: of texts that are read again, it is asked once.

A text's states are those of the first batch that holds it, in every pass and after a kill: in another batch the padding
is another, and so is the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gptailor.family.structure import decoder_of
from gptailor.heal.batches import Batch, inputs

KEPT_BYTES = 2 << 30
"""Of states on the host, at most: beyond that the teacher reads every batch anew."""


def kept_bytes(teacher: PreTrainedModel, batches: Sequence[Batch], in_bfloat16: bool, n_devices: int = 1) -> int:
    """Bytes of the states that are kept on the host; 0 where they are not.

    Not where they are too many, or where texts are read no oftener than there are devices, each of which asks anew.
    """
    distinct = sum(map(len, {tuple(text) for batch in batches for text in batch}))
    read = sum(len(text) for batch in batches for text in batch)
    itemsize = 2 if in_bfloat16 else teacher.dtype.itemsize
    size: int = distinct * teacher.config.get_text_config().hidden_size * itemsize
    return size if read > n_devices * distinct and size <= KEPT_BYTES else 0


class Teaching:
    """A teacher and the batches that it is asked about, by their numbers."""

    def __init__(self, teacher: PreTrainedModel, batches: Sequence[Batch], keeps: bool, in_bfloat16: bool) -> None:
        """keeps: whether states are kept. in_bfloat16: whether it computes so, whatever it is held in."""
        self._teacher, self._batches, self._keeps, self._in_bfloat16 = teacher, batches, keeps, in_bfloat16
        self._decoder = decoder_of(teacher)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._homes: dict[tuple[int, ...], int] = {}
        for number, batch in enumerate(batches if keeps else ()):
            for text in batch:
                self._homes.setdefault(tuple(text), number)

    def states(self, number: int) -> torch.Tensor:
        """Of one batch's tokens, text after text, without padding, [tokens, hidden]."""
        if not self._keeps:
            return self._read(number)
        texts = [tuple(text) for text in self._batches[number]]
        for home in sorted({self._homes[text] for text in texts if text not in self._known}):
            self._keep(home)
        return torch.cat([self._known[text] for text in texts]).to(self._teacher.device)

    def _keep(self, number: int) -> None:
        batch = self._batches[number]
        parts = self._read(number).cpu().split([len(text) for text in batch])
        for text, part in zip(map(tuple, batch), parts, strict=True):
            if self._homes[text] == number:
                self._known[text] = part.clone()  # of the text alone, whatever becomes of the batch

    @torch.no_grad()
    def _read(self, number: int) -> torch.Tensor:
        device = self._teacher.device
        read = inputs(self._batches[number], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._in_bfloat16):
            states: torch.Tensor = self._decoder(**read, use_cache=False)[0]
        states = states[read["attention_mask"].bool()]
        return states.bfloat16() if self._in_bfloat16 else states
