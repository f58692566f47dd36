"""Prune&Comp (arXiv 2507.18212, magcomp.py): a gap leaves the stream smaller than what follows expects; scale it.

s is the mean over channels of E|teacher's stream behind the gap| / E|student's stream at the gap|. The paper scales the
embeddings and the output projections of all earlier layers by s. A stream that is normalised before it is read says the
same at any scale, so here the output projections of all *later* layers are divided by s: embeddings, and heads tied to
them, stay as they are. Tokens count by one over the norm of the teacher's stream.
"""

from __future__ import annotations

import torch
from torch import nn

from gptailor.family.structure import scaled
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.streams import Streams
from gptailor.stitch.edits.walk import wide


@torch.no_grad()
def scale(case: EditCase) -> list[nn.Module]:
    """The layers behind each gap with scaled outputs."""
    streams = Streams(case, case.teacher(str(case.parameter("teacher"))))
    total = _gap_scale(streams, case.plan.kept[0].layer, 1.0) if case.plan.kept[0].layer else 1.0
    edited = []
    for position, layer in enumerate(case.layers):
        case.between(f"{case.edit.method}: layer {position + 1} of {len(case.layers)}", position / len(case.layers))
        edited.append(layer if total == 1.0 else scaled(layer, streams.projections, 1 / total))
        streams.skip(position, edited[-1])
        if streams.is_before_a_gap(position) and position + 1 < len(case.layers):
            total *= _gap_scale(streams, streams.target_of(position), total)
    return edited


def _gap_scale(streams: Streams, behind: int, total: float) -> float:
    """s of one gap. total: what the student's stream would be multiplied by so far in the paper's way."""
    streams.teach(behind)
    wanted, found = (wide(streams.rows(states)) for states in (streams.teacher, streams.student))
    weights = 1.0 / wanted.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    after, before = ((rows.abs() * weights).sum(dim=0) for rows in (wanted, found * total))
    return float((after / before.clamp(min=1e-12)).mean())
