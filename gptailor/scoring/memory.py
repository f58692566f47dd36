"""What fits where, before a run is started: predicted from headers, against what is free now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptailor.launch.devices import device_of, devices_of, free_devices, places
from gptailor.plan import BASE
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import SpaceOperation
from gptailor.stitch.edits.cost import Cost, Sizes, repair_cost
from gptailor.wording import gigabytes

if TYPE_CHECKING:
    from gptailor.family.preflight import Preflight

PROCESS_BYTES = 1_200_000_000
"""What an engine process holds before any model: Python, torch, transformers, lm-eval, SMAC."""
ELSEWHERE = "each worker's device"


@dataclass(frozen=True)
class Memory:
    """Bytes on the run's device (host memory on a CPU), predicted, by part, against what is free (None: unknown).

    split: where the base needs more than that device, what is free on each that it is split over; free is their sum.
    is_refused: no split of its layers over them fits.
    """

    device: str
    parts: Mapping[str, int]
    free: int | None
    split: tuple[int, ...] = ()
    is_refused: bool = False

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def verdict(self) -> str:
        """One sentence: does it fit?"""
        if self.free is None:
            return f"{gigabytes(self.needed)} needed on {self.device}; what is free there cannot be read"
        amount = f"{gigabytes(self.needed)} needed on {self.device}, {gigabytes(self.free)} free"
        fits = "fits"
        if self.split:
            each = [gigabytes(free) for free in self.split]
            listed = f"{len(each)} x {each[0]}" if len(set(each)) == 1 else " + ".join(each)
            amount = f"{gigabytes(self.needed)} needed, {listed} free"
            fits = f"fits, split over {len(each)} GPUs"
        if self.needed <= self.free and not self.is_refused:
            return f"{fits}: {amount}"
        without_candidates = self.needed - self.parts.get("candidates", 0)
        if self.device.startswith("cuda") and without_candidates <= self.free and not self.is_refused:
            return f"{fits}, with candidates kept in host memory, which is slower: {amount}"
        return f"does not fit: {amount}; choose another device, a smaller model or fewer candidates"


def local_workers(spec: RunSpec) -> list[str]:
    """The places of the run's workers on this machine; none where it has none, or where they are elsewhere."""
    workers = None if spec.baselines else spec.workers
    return places(workers.local, spec.device) if workers is not None and workers.local is not None else []


def predict_memory(spec: RunSpec, family: Preflight) -> Memory:
    """Predicted, from above: what models share is not known before they are read. Raises UserError for a device.

    Workers that share a device have models of their own there; on a CPU all map the same files.
    """
    from gptailor.evaluate.evaluator import BYTES_PER_TOKEN, CPU_TOKENS, LOGIT_BYTES, LOGITS
    from gptailor.family.residence import pick_devices
    from gptailor.stitch.stitcher import CACHE_SHARE

    names = local_workers(spec)
    if names:
        devices = devices_of(names[0])
    elif spec.workers is not None and not spec.baselines:
        devices = [ELSEWHERE]
    else:
        devices = list(map(str, pick_devices(spec.device)))
    device = devices[0]
    there = max(1, sum(device_of(name) == device for name in names))
    copies = 1 if device == "cpu" else there
    base = family.model_bytes[BASE]
    makes_layers = SpaceOperation.MERGE in spec.operations or spec.output_scale is not None
    tokens = CPU_TOKENS if spec.batch_tokens == "auto" else int(spec.batch_tokens)
    logits = min(LOGITS, tokens * family.vocab_size) * LOGIT_BYTES
    parts = {
        "base": copies * base,
        "candidates": copies * (sum(family.model_bytes.values()) - base),
        "merged layers": there * int(CACHE_SHARE * family.distinct_bytes) if makes_layers else 0,
        "working memory": there * (tokens * min(BYTES_PER_TOKEN, 64 * family.hidden_size) + logits),
    }
    repairs, cuts = costs_of_edits(spec, family)
    for part, costs in (("repair", repairs), ("baselines", cuts)):  # one plan at a time
        parts[part] = there * max((cost.n_bytes for cost in costs.values()), default=0)
    if device in ("cpu", "mps"):
        parts["libraries"] = (1 + len(names)) * PROCESS_BYTES
    return _placed({part: size for part, size in parts.items() if size}, family, devices)


def costs_of_edits(spec: RunSpec, family: Preflight) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """What the run's repair takes of a plan, where it has one; and what the edits of its baselines take."""
    repairs, cuts = {}, {}
    if (repair := spec.repairs) is not None:
        what = f"repair: {repair.method} on {repair.tokens_for(family.inner_size):,} tokens of {repair.texts} takes"
        repairs[what] = repair_cost(repair, _sizes(family))
    if spec.baselines:
        from gptailor.baselines.cost import edit_cost

        costs = ((name, edit_cost(name, _sizes(family))) for name in spec.baselines)
        cuts = {f"{name}:": cost for name, cost in costs if cost is not None}
    return repairs, cuts


def _sizes(family: Preflight) -> Sizes:
    itemsize = 4 if family.dtype == "float32" else 2
    n, removed = family.n_layers, family.n_removed or 1
    each = sum(family.layer_parameters) // n
    return Sizes(n, n - removed, family.hidden_size, family.inner_size, each, itemsize, family.vocab_size)


def _placed(parts: Mapping[str, int], family: Preflight, devices: Sequence[str]) -> Memory:
    """The base goes where the engine will put it: on the first device, or over all where it does not fit there."""
    from gptailor.family.residence import RESERVE
    from gptailor.family.spread import Room, place_layers

    there = {found.name: found for found in free_devices()}
    known = [there[name] for name in devices if name in there]
    if len(known) < len(devices):  # the driver does not say
        return Memory(devices[0], parts, None)
    if len(known) > 1:
        rooms = {found.name: Room(found.free, int(RESERVE * found.total)) for found in known}
        base = family.model_bytes[BASE]
        layers = [n * base // family.n_parameters for n in family.layer_parameters]
        homes = place_layers(layers, base - sum(layers), rooms)
        if homes is None or set(homes) != {devices[0]}:
            split = tuple(found.free for found in known)
            return Memory(devices[0], parts, sum(split), split, is_refused=homes is None)
    return Memory(devices[0], parts, known[0].free)
