"""What is cut from a layer that gets narrower: whole groups of heads, and channels of its gated MLP.

A group is one key-value head with all the query heads that read it: its rows of q, k and v and its columns of o. With
fewer query heads than that, transformers would let the others read wrong keys. A channel is a row of gate and up and a
column of down. The residual stream, norms, embeddings and head stay as they are, and each layer has its own widths.

How much goes is said as a share of the parameters of all layers, so that a width cut and a depth cut take as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.family.structure import with_tensors
from gptailor.stitch.edits.case import EditCase

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
WIDE_MLP, STEP = 512, 8
"""An MLP with so many channels loses them by eights: other widths are slower than what they save."""


@dataclass(frozen=True)
class Widths:
    """What one layer may lose.

    groups: of heads, each of `heads` query heads of `head_dim`. channels: of the MLP. paths: a projection's name ->
    where it is in the layer. group_parameters, channel_parameters: of one of them, biases included.
    """

    groups: int
    heads: int
    head_dim: int
    channels: int
    paths: Mapping[str, str]
    group_parameters: int
    channel_parameters: int

    @classmethod
    def of(cls, layer: nn.Module, method: str, model: str) -> Widths:
        """method, model: for messages. Raises UserError for a layer that is not built of these parts."""
        linear = [(name.rpartition(".")[2], name) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        paths = {name: path for name, path in linear if name in ATTENTION + MLP}
        if missing := _missing(linear):
            raise UserError(f"{method}: the layers of {model} have no {missing}; leave {method} out")
        attention = layer.get_submodule(paths["q_proj"].rpartition(".")[0])
        sizes = {name: layer.get_submodule(path).get_parameter("weight").shape for name, path in paths.items()}
        head_dim = int(getattr(attention, "head_dim", 0) or 0)
        groups, rest = divmod(sizes["k_proj"][0], head_dim) if head_dim else (0, 1)
        query = sizes["q_proj"][0]
        key = sizes["k_proj"][0]
        other = _of_heads(layer, paths, head_dim)
        if rest or other or query % key or sizes["v_proj"][0] != key or sizes["o_proj"][1] != query:
            what = f" ({other})" if other else ""
            raise UserError(
                f"{method}: the heads of {model} cannot be told apart in its tensors{what}; leave {method} out"
            )
        return cls(
            groups,
            query // key,
            head_dim,
            sizes["gate_proj"][0],
            paths,
            sum(_numbers(layer, paths[name]) for name in ATTENTION) // groups,
            sum(_numbers(layer, paths[name]) for name in MLP) // sizes["gate_proj"][0],
        )

    @property
    def parameters(self) -> int:
        """Of all that may go."""
        return self.groups * self.group_parameters + self.channels * self.channel_parameters

    def heads_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Columns of o, and rows of q, of these groups."""
        return _spans(groups, self.heads * self.head_dim)

    def narrowed(
        self,
        layer: nn.Module,
        groups: torch.Tensor | None = None,
        channels: torch.Tensor | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> nn.Module:
        """A twin of the layer with these groups and channels alone, ascending; None: with all of them.

        weights: what o_proj or down_proj is to hold instead, [hidden, what is kept].
        """
        rows: dict[str, torch.Tensor] = {}
        columns: dict[str, torch.Tensor] = {}
        if groups is not None:
            columns["o_proj"] = rows["q_proj"] = self.heads_of(groups)
            rows["k_proj"] = rows["v_proj"] = _spans(groups, self.head_dim)
        if channels is not None:
            columns["down_proj"] = rows["gate_proj"] = rows["up_proj"] = channels
        tensors = {}
        for name, index in rows.items():
            for key, value in layer.get_submodule(self.paths[name]).named_parameters(recurse=False):
                tensors[f"{self.paths[name]}.{key}"] = value.detach().index_select(0, index.to(value.device))
        for name, index in columns.items():
            old = layer.get_submodule(self.paths[name]).get_parameter("weight").detach()
            new = (weights or {}).get(name)
            new = old.index_select(1, index.to(old.device)) if new is None else new.to(old.device, old.dtype)
            tensors[f"{self.paths[name]}.weight"] = new.contiguous()
        twin = with_tensors(layer, tensors)
        for path in {self.paths[name] for name in (*rows, *columns)}:
            projection = twin.get_submodule(path)
            projection.out_features, projection.in_features = projection.get_parameter("weight").shape  # type: ignore[assignment]
        return twin


def _missing(linear: Sequence[tuple[str, str]]) -> str:
    """Which of the parts a layer lacks, or has more than once, as mixtures of experts do; empty where it has them."""
    names = [name for name, _ in linear]
    if any(names.count(name) != 1 for name in MLP):
        return f"gated MLP (one {', one '.join(MLP)})"
    return "" if all(names.count(name) == 1 for name in ATTENTION) else f"attention of {', '.join(ATTENTION)}"


def _of_heads(layer: nn.Module, paths: Mapping[str, str], head_dim: int) -> str:
    """A further tensor that may belong to single heads: one that is neither as long as the stream nor as a head."""
    hidden = layer.get_submodule(paths["o_proj"]).get_parameter("weight").shape[0]
    mine = tuple(f"{path}." for path in paths.values())
    others = ((name, p) for name, p in layer.named_parameters() if not name.startswith(mine))
    return next((name for name, p in others if tuple(p.shape) not in ((hidden,), (head_dim,), (1,), ())), "")


def _numbers(layer: nn.Module, path: str) -> int:
    """Parameters of a projection that go with its heads or channels: not the biases of what writes into the stream."""
    weight = layer.get_submodule(path).get_parameter("weight")
    bias = getattr(layer.get_submodule(path), "bias", None)
    if bias is None or path.rpartition(".")[2] in ("o_proj", "down_proj"):
        return weight.numel()
    return weight.numel() + int(bias.numel())


def _spans(which: torch.Tensor, length: int) -> torch.Tensor:
    """Indices of spans of this length, by their numbers."""
    return (which[:, None] * length + torch.arange(length, device=which.device)).flatten()


# --- how much goes where ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """So many groups of heads and channels of a layer."""

    groups: int
    channels: int


def widths_of(case: EditCase, positions: Sequence[int]) -> dict[int, Widths]:
    """What kept layers may lose, by position. Raises UserError for an architecture, or heads, that allow none."""
    model, method = type(case.family.model).__name__, case.edit.method
    found = {position: Widths.of(case.layers[position], method, model) for position in positions}
    for position, widths in found.items():
        if widths.groups < 2:
            raise UserError(
                f"{method}: layer {case.plan.kept[position].layer} of {model} has one key-value head, and whole groups "
                f"of heads go; leave {method} out"
            )
    return found


def parameters_to_go(case: EditCase) -> float:
    """What the edit's ratio takes of all layers' parameters. Raises UserError for a ratio that is none."""
    ratio = float(case.parameter("ratio"))
    if not 0 < ratio < 1:
        raise UserError(f"edits: {case.edit.method}'s ratio must be between 0 and 1, got {ratio:g}")
    return ratio * sum(p.numel() for layer in case.layers for p in layer.parameters())


def cuts(case: EditCase, widths: Mapping[int, Widths], shares: Mapping[int, float]) -> dict[int, Cut]:
    """How many groups and channels each layer loses, so that it loses this share of what it may.

    Groups are rounded, channels make up for that, and what is left over goes to the next layer. Raises UserError where
    a layer would have none left.
    """
    found: dict[int, Cut] = {}
    owed = 0.0
    for position, share in shares.items():
        its = widths[position]
        step = STEP if its.channels >= WIDE_MLP else 1
        wanted = share * its.parameters + owed
        groups = min(round(share * its.groups), its.groups - 1)
        channels = max(0, round((wanted - groups * its.group_parameters) / its.channel_parameters / step) * step)
        if share >= 1 or channels > its.channels - step:
            raise UserError(
                f"{case.edit.method}: a ratio of {float(case.parameter('ratio')):g} leaves layer "
                f"{case.plan.kept[position].layer} empty: {share:.0%} of its heads and channels would go; ask for less"
            )
        owed = wanted - groups * its.group_parameters - channels * its.channel_parameters
        found[position] = Cut(groups, channels)
    return found


def kept_after(scores: torch.Tensor, n_off: int) -> torch.Tensor:
    """Indices, ascending, without the n_off lowest scores."""
    return scores.argsort(stable=True)[n_off:].sort().values


def told(case: EditCase, positions: Sequence[int]) -> Iterator[int]:
    """The positions, one after another, and how far that is."""
    for done, position in enumerate(positions):
        case.between(f"{case.edit.method}: layer {done + 1} of {len(positions)}", done / len(positions))
        yield position
