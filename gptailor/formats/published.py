"""Plans from files: this project's own, and the configurations that auto-merge-llm published with the paper.

The published files (search_config/prune and search_config/dis at c45aaac) are flat: one key a hyperparameter, no names
of models, no scores. Candidates are numbered; a family's candidates stand for them in the order that it lists them.
What the published code does with such a file, and what becomes of it here:

- prune: `layer_i_output_scale` is read but never applied (strategies/prune.py:116, 174), so it is ignored.
- prune: a merge's base tensor is taken at the layer's position in the shorter model, not at its index
  (strategies/merge_utils.py:379), which differs once a layer before it was removed. `base_at` chooses: "source" is what
  was meant, "output" what was done.
- dis: a layer's candidates are stacked in the order of a permutation; the residual stream is multiplied by `scale_i`
  after the last of them (custom_llama.py). Under the norms of a Llama that is the same as dividing every later layer's
  two output projections by the product of the scales before it, which is what the plan says.
- Embeddings, final norm and output head are the base's here; there they are those of the first and last layer's source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from gptailor.errors import UserError
from gptailor.plan import BASE, LayerChoice, StitchPlan
from gptailor.runfile import load_yaml, read_text
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.wording import gigabytes

MAX_BYTES = 4 * 1024 * 1024
BaseAt = Literal["source", "output"]
_KEYS = {
    "removed": re.compile(r"remove_idx_(\d+)"),
    "candidate": re.compile(r"layer_(\d+)_candidate_(\d+)"),
    "factor": re.compile(r"layer_(\d+)_merge_scale_factor"),
    "ignored": re.compile(r"layer_(\d+)_output_scale"),
    "block": re.compile(r"layer_(\d+)_block_(\d+)_selection"),
    "order": re.compile(r"layer_(\d+)_permutation_selection"),
    "scale": re.compile(r"scale_(\d+)"),
}


def read_plan(path: str | Path, candidates: Sequence[str] = (), base_at: BaseAt = "source") -> StitchPlan:
    """The plan in a file. candidates: what published files number; without any, they are called c0, c1, c2.

    Raises UserError: no such file, no plan, a published configuration of another kind, or too few candidates.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"plan {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"plan {path}: larger than {gigabytes(MAX_BYTES)}; is it a plan?")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"plan {path}: not JSON: {error}") from error
    try:
        return plan_of(data, candidates, base_at)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from error


def plan_of(data: Any, candidates: Sequence[str] = (), base_at: BaseAt = "source") -> StitchPlan:
    """Like read_plan, from parsed JSON."""
    if not isinstance(data, Mapping):
        raise UserError("expected an object of keys and values")
    if "kept" in data:
        return StitchPlan.from_json(data)
    found = _sorted_keys(data)
    if found["block"]:
        return _stacked(found, candidates)
    if found["candidate"]:
        return _pruned(found, candidates, base_at)
    raise UserError(
        "neither a plan of gptailor ('format', 'n_layers', 'kept') nor a published prune or dis configuration "
        "('layer_0_candidate_0', 'layer_0_block_0_selection')"
    )


def read_family(path: str | Path) -> RunSpec:
    """A family file: YAML with base_model and candidates (and dtype, device, trust_remote_code); a run file will do."""
    path = Path(path)
    data = load_yaml(read_text(path, "family file"), f"family file {path}")
    if not isinstance(data, Mapping):
        raise UserError(f"family file {path}: expected the keys base_model and candidates")
    keys = ("base_model", "candidates", "dtype", "device", "trust_remote_code")
    own = {key: data[key] for key in keys if key in data}
    rest = {"name": path.stem[:80], "operations": ["remove"], "remove": 1, "objectives": [{"benchmark": "none"}]}
    return build_spec(own | rest, f"family file {path}")


def strip_text(plan: StitchPlan) -> str:
    """The plan as text: a row of cells, one a layer of the base, with a key and its parameters below."""
    names = plan.candidates
    codes = {name: "abcdefghijklmnopqrstuvwxyz"[index % 26].upper() for index, name in enumerate(names)}
    stacked: dict[int, list[str]] = {}
    for choice in plan.kept:
        cell = "+" if choice.is_merged else codes[choice.sources[0]] if choice.sources else "·"
        stacked.setdefault(choice.layer, []).append(cell)
    cells = [stacked.get(layer, ["v" if layer in plan.folded else "×"]) for layer in range(plan.n_layers)]
    row = "".join(one[0] if len(one) == 1 else str(len(one)) for one in cells)
    tens = "".join(str(i // 10 % 10) if i % 10 == 0 else " " for i in range(plan.n_layers))
    ones = "".join(str(i % 10) for i in range(plan.n_layers))
    key = ["· base", *(f"{code} {name}" for name, code in codes.items())]
    key += ["+ merged"] if "+" in row else []
    key += ["× removed"] if "×" in row else []
    key += ["v folded into another layer"] if "v" in row else []
    key += ["2, 3 ... layers stacked"] if any(len(one) > 1 for one in cells) else []
    kept = f"{len(plan.kept)} layers from a base of {plan.n_layers}, {len(plan.removed)} removed"
    return "\n".join([kept, "", f"  {tens}", f"  {ones}", f"  {row}", "", "  " + "   ".join(key), "", plan.describe()])


Found = dict[str, dict[tuple[int, ...], Any]]


def _sorted_keys(data: Mapping[Any, Any]) -> Found:
    """Every key of a flat file under its kind, by its numbers. Raises UserError for a key of no known kind."""
    found: Found = {kind: {} for kind in _KEYS}
    unknown = []
    for key, value in data.items():
        for kind, pattern in _KEYS.items():
            if match := pattern.fullmatch(str(key)):
                found[kind][tuple(int(number) for number in match.groups())] = value
                break
        else:
            unknown.append(str(key))
    if unknown and not (found["block"] or found["candidate"]):
        return found
    if unknown:
        raise UserError(f"the key {unknown[0]!r} belongs to no published prune or dis configuration")
    return found


def _pruned(found: Found, candidates: Sequence[str], base_at: BaseAt) -> StitchPlan:
    removed = {_whole(value, f"remove_idx_{i}") for (i,), value in found["removed"].items()}
    layers = sorted({layer for layer, _ in found["candidate"]} - removed)
    n_layers = len(removed) + len(layers)
    if len(removed) != len(found["removed"]) or removed | set(layers) != set(range(n_layers)):
        raise UserError(f"removed layers {sorted(removed)} and kept layers {layers} do not make one model")
    names = _names(1 + max(candidate for _, candidate in found["candidate"]), candidates)
    kept = []
    for position, layer in enumerate(layers):
        bits = [_bit(found["candidate"].get((layer, c), 0), f"layer_{layer}_candidate_{c}") for c in range(len(names))]
        sources = tuple(name for name, bit in zip(names, bits, strict=True) if bit)
        if len(sources) < 2:
            kept.append(LayerChoice(layer, sources))
            continue
        factor = _number(found["factor"].get((layer,), 1.0), f"layer_{layer}_merge_scale_factor")
        base_layer = position if base_at == "output" and position != layer else None
        kept.append(LayerChoice(layer, sources, "task_arithmetic", factor, base_layer=base_layer))
    return StitchPlan(n_layers, tuple(kept))


def _stacked(found: Found, candidates: Sequence[str]) -> StitchPlan:
    n_layers = 1 + max(layer for layer, _ in found["block"])
    n_blocks = 1 + max(block for _, block in found["block"])
    names = _names(n_blocks, candidates)
    orders = list(permutations(range(n_blocks)))
    kept: list[LayerChoice] = []
    grown = 1.0  # the product of the scales so far
    for layer in range(n_layers):
        index = _whole(found["order"].get((layer,), 1), f"layer_{layer}_permutation_selection")
        if not 0 <= index < len(orders):
            raise UserError(f"layer_{layer}_permutation_selection: {index} is not one of {len(orders)} permutations")
        blocks = (found["block"].get((layer, block), 0) for block in orders[index])
        chosen = [
            names[block]
            for block, value in zip(orders[index], blocks, strict=True)
            if _bit(value, f"layer_{layer}_block_{block}_selection")
        ]
        sources = [() if source == BASE else (source,) for source in chosen or [BASE]]
        kept += [LayerChoice(layer, source, output_scale=1.0 / grown) for source in sources]
        scale = _number(found["scale"].get((layer,), 1.0), f"scale_{layer}")
        if scale <= 0:
            raise UserError(f"scale_{layer}: {scale} cannot be undone in later layers; it must be above 0")
        grown *= scale
    return StitchPlan(n_layers, tuple(kept))


def _names(n: int, candidates: Sequence[str]) -> list[str]:
    if not candidates:
        return [f"c{index}" for index in range(n)]
    if len(candidates) != n:
        raise UserError(f"it numbers {n} candidates, the family has {len(candidates)}: {', '.join(candidates)}")
    return list(candidates)


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: expected a number, got {value!r}") from error
    if number != number or abs(number) == float("inf"):
        raise UserError(f"{key}: expected a finite number, got {value!r}")
    return number


def _whole(value: Any, key: str) -> int:
    number = _number(value, key)
    if number != int(number):
        raise UserError(f"{key}: expected a whole number, got {value!r}")
    return int(number)


def _bit(value: Any, key: str) -> bool:
    if str(value) not in ("0", "1", "True", "False"):
        raise UserError(f"{key}: expected 0 or 1, got {value!r}")
    return str(value) in ("1", "True")
