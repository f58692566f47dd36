"""How many layers have to go: a run file's `remove`, where it names another measure than layers, as their number.

Worked out once, from the sizes in the headers, and kept with the run. Layers may be of different sizes, and which ones
go is what the search finds out: so many as reach the measure whichever go, that is to say the smallest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gptailor.errors import UserError
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal
from gptailor.spec.values import parse_bytes
from gptailor.wording import gigabytes


@dataclass(frozen=True)
class Sizes:
    """Of the base: parameters of each layer, of all that is no layer, and the bytes of one in the run's type."""

    layers: Sequence[int]
    others: int
    width: int

    @property
    def n_parameters(self) -> int:
        return sum(self.layers) + self.others


def counted(spec: RunSpec, sizes: Sizes) -> RunSpec:
    """The run file with a number of layers for `remove`, or a range of them. Raises UserError.

    But for a speed, which has to be measured: see scoring/removal_speed.py.
    """
    asked = spec.remove
    if spec.has_range:
        return spec
    if not isinstance(asked, Removal):
        return spec.removing(spec.n_removed(len(sizes.layers)))
    if asked.parameters is not None:
        return spec.removing(_for_parameters(asked.parameters, sizes))
    return spec if asked.memory is None else spec.removing(_for_memory(asked.memory, sizes))


def _for_parameters(share: float, sizes: Sizes) -> int:
    found = _fewest(share * sizes.n_parameters, sizes)
    if found is None:
        most = sum(sorted(sizes.layers)[:-1]) / sizes.n_parameters
        raise UserError(
            f"remove.parameters: {share:.1%} of the parameters cannot go: without all layers but one, "
            f"{most:.1%} are gone"
        )
    return found


def _for_memory(text: str, sizes: Sizes) -> int:
    allowed, whole = parse_bytes(text), sizes.n_parameters * sizes.width
    if whole <= allowed:
        raise UserError(f"remove.memory: the dense base takes {gigabytes(whole)}, which is within {text} already")
    found = _fewest(sizes.n_parameters - allowed / sizes.width, sizes)
    if found is None:
        least = (sizes.others + max(sizes.layers)) * sizes.width
        raise UserError(f"remove.memory: {text} cannot be reached: one layer and the rest take {gigabytes(least)}")
    return found


def _fewest(parameters: float, sizes: Sizes) -> int | None:
    """The fewest layers, at least one, that hold so many parameters whichever they are; None where one must stay."""
    gone = accumulate(sorted(sizes.layers)[:-1])
    return next((n for n, held in enumerate(gone, 1) if held >= parameters * (1 - 1e-9)), None)
