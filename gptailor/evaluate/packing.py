"""Packs: many examples in one flat row, every distinct token once, no padding.

The texts of one example (its options behind one context) share beginnings, and so may neighbouring examples (few-shot
prefixes). Laid out as a forest in depth-first order, token q may see token k exactly if `k <= q < end[k]`, where
end[k] is where k's subtree ends: two integers a token say what a mask of n x n would.

The last token of a text is never read, only predicted, so it takes no place in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from gptailor.evaluate.examples import Example, Window

MIN_SHARED = 32  # tokens two examples must share at their beginning to be worth a common prefix
BUCKET_WASTE = 1.25  # padding allowed within one attention call


@dataclass(frozen=True, eq=False)
class Block:
    """One example's own tokens in the row, [start, stop), and the shared prefix they also see, as row indices."""

    start: int
    stop: int
    prefix: torch.Tensor | None
    is_path: bool  # one text without branches: plain causal attention

    @property
    def n_keys(self) -> int:
        return (0 if self.prefix is None else len(self.prefix)) + self.stop - self.start


@dataclass(frozen=True)
class Bucket:
    """Blocks whose attention is one call: row indices of queries [B, Lq] and keys [B, Lk].

    Padding queries repeat their row's first token (their answers are dropped), padding keys are -1.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    is_causal: bool  # a single path: plain causal attention, no mask needed
    n_queries: tuple[int, ...]  # real queries of each row


@dataclass(frozen=True, eq=False)
class Pack:
    """Examples scored in one forward pass.

    tokens, positions, ends: [T]. scored: [S] row indices at which the head runs. For every predicted token of every
    window, in order: `rows` (which of the S), `targets` (token id) and `owners` (which window, counted in the pack).
    """

    members: tuple[int, ...]  # places of the examples in the benchmark's nested order
    tokens: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    blocks: tuple[Block, ...]
    scored: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    n_windows: int
    needs_greedy: bool  # whether anybody asks if greedy decoding would have written a window

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(_bucket(group) for group in _similar(self.blocks))

    @cached_property
    def places(self) -> torch.Tensor:
        """[T]: where each row token's answer stands in the concatenated, padded outputs of the buckets."""
        places = torch.empty(len(self.tokens), dtype=torch.long)
        offset = 0
        for bucket in self.buckets:
            n_rows, width = bucket.queries.shape
            for row, n_real in enumerate(bucket.n_queries):
                places[bucket.queries[row, :n_real]] = torch.arange(n_real) + offset + row * width
            offset += n_rows * width
        return places

    @property
    def n_bytes(self) -> int:
        """Of the tensors that an accelerator is given."""
        own = (self.tokens, self.positions, self.ends, self.scored, self.rows, self.targets, self.owners, self.places)
        return sum(t.nbytes for t in (*own, *(t for b in self.buckets for t in (b.queries, b.keys))))

    def to(self, device: torch.device) -> Pack:
        """This pack with its tensors on `device`, moved without waiting."""
        if device.type == "cpu":
            return self
        move = _mover(device)
        names = ("tokens", "positions", "ends", "scored", "rows", "targets", "owners")
        tensors: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        moved = replace(self, **tensors)
        buckets = tuple(replace(b, queries=move(b.queries), keys=move(b.keys)) for b in self.buckets)
        moved.__dict__.update(buckets=buckets, places=move(self.places))
        return moved


def pack_examples(
    examples: Sequence[Example],
    first: int,
    last: int,
    *,
    max_tokens: int,
    max_scored: int,
    needs_greedy: bool = True,
) -> list[Pack]:
    """The windows of examples [first, last) as packs of at most max_tokens tokens and max_scored predicted ones.

    An example larger than that is a pack of its own. The result depends on nothing else, so an example is always
    computed in the same company and its score is always the same.
    """
    packs: list[Pack] = []
    members: list[int] = []
    n_tokens = n_scored = 0
    for cluster in _clusters(examples, range(first, last)):
        for place, shared in cluster:
            size, scored = _n_nodes(examples[place].windows), sum(w.n_scored for w in examples[place].windows)
            shared = shared if members else 0
            if members and (n_tokens + size - shared > max_tokens or n_scored + scored > max_scored):
                packs.append(build_pack(examples, members, needs_greedy))
                members, n_tokens, n_scored, shared = [], 0, 0, 0
            members.append(place)
            n_tokens += size - shared
            n_scored += scored
    if members:
        packs.append(build_pack(examples, members, needs_greedy))
    return packs


def build_pack(examples: Sequence[Example], members: Sequence[int], needs_greedy: bool = True) -> Pack:
    """Lay out the windows of the given examples as a forest, in this order."""
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    spans: list[tuple[int, int, tuple[int, ...]]] = []
    scored: dict[int, int] = {}
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    path: list[int] = []  # row indices from the root to the token placed last
    n_windows = 0
    for member in members:
        windows = examples[member].windows
        start = len(tokens)
        paths: dict[int, list[int]] = {}
        prefix: tuple[int, ...] = ()
        for number, index in enumerate(sorted(range(len(windows)), key=lambda i: windows[i].inputs)):
            inputs = windows[index].inputs
            shared = _common([tokens[i] for i in path], inputs)
            if number == 0:
                shared = shared if shared >= MIN_SHARED else 0
                prefix = tuple(path[:shared])
            for gone in path[shared:]:
                ends[gone] = len(tokens)
            path = path[:shared]
            for depth in range(shared, len(inputs)):
                path.append(len(tokens))
                tokens.append(inputs[depth])
                positions.append(depth)
                ends.append(-1)
            paths[index] = path
        for index, window in enumerate(windows):
            places = paths[index][-window.n_scored :]
            rows += [scored.setdefault(place, len(scored)) for place in places]
            targets += window.tokens[-window.n_scored :]
            owners += [n_windows] * window.n_scored
            n_windows += 1
        if len(tokens) > start:
            spans.append((start, len(tokens), prefix))
    for gone in path:
        ends[gone] = len(tokens)
    as_tensor = torch.tensor
    blocks = [
        Block(start, stop, as_tensor(prefix) if prefix else None, not prefix and min(ends[start:stop]) == stop)
        for start, stop, prefix in spans
    ]
    return Pack(
        tuple(members), as_tensor(tokens), as_tensor(positions), as_tensor(ends), tuple(blocks),
        as_tensor(list(scored)), as_tensor(rows), as_tensor(targets), as_tensor(owners), n_windows, needs_greedy,
    )  # fmt: skip


def _clusters(examples: Sequence[Example], places: Iterable[int]) -> list[list[tuple[int, int]]]:
    """Examples with a long common beginning together, as (place, tokens shared with the one before); long ones last."""
    readable = [place for place in places if examples[place].windows]
    ordered = sorted(readable, key=lambda place: (min(w.inputs for w in examples[place].windows), place))
    clusters: list[list[tuple[int, int]]] = []
    previous: tuple[int, ...] = ()
    for place in ordered:
        inputs = sorted(w.inputs for w in examples[place].windows)
        shared = _common(previous, inputs[0])
        if shared >= MIN_SHARED:
            clusters[-1].append((place, shared))
        else:
            clusters.append([(place, 0)])
        previous = inputs[-1]
    return sorted(clusters, key=lambda cluster: (sum(_n_nodes(examples[p].windows) for p, _ in cluster), cluster))


def _n_nodes(windows: Sequence[Window]) -> int:
    """Distinct tokens of the windows' common tree."""
    count = 0
    previous: tuple[int, ...] = ()
    for inputs in sorted(window.inputs for window in windows):
        count += len(inputs) - _common(previous, inputs)
        previous = inputs
    return count


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(a), len(b))
    for i in range(limit):
        if a[i] != b[i]:
            return i
    return limit


def _similar(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of similar size together, so that padding them to the largest wastes little."""
    groups: list[list[Block]] = []
    for block in sorted(blocks, key=lambda b: (-b.n_keys, -(b.stop - b.start), b.start)):
        first = groups[-1][0] if groups else None
        alike = (
            first is not None
            and first.n_keys <= block.n_keys * BUCKET_WASTE
            and first.stop - first.start <= (block.stop - block.start) * BUCKET_WASTE
            and block.stop - block.start <= first.stop - first.start
        )
        if alike:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def _mover(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        is_pinned = device.type == "cuda" and tensor.device.type == "cpu"  # a GPU's is copied to another without
        return (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True)

    return move


def _bucket(blocks: Sequence[Block]) -> Bucket:
    width = max(block.stop - block.start for block in blocks)
    n_keys = max(block.n_keys for block in blocks)
    queries = torch.empty(len(blocks), width, dtype=torch.long)
    keys = torch.empty(len(blocks), n_keys, dtype=torch.long)
    for row, block in enumerate(blocks):
        own = torch.arange(block.start, block.stop)
        queries[row, : len(own)] = own
        queries[row, len(own) :] = block.start
        keys[row, : block.n_keys] = own if block.prefix is None else torch.cat([block.prefix, own])
        keys[row, block.n_keys :] = -1
    n_queries = tuple(block.stop - block.start for block in blocks)
    return Bucket(queries, keys, all(block.is_path for block in blocks), n_queries)
