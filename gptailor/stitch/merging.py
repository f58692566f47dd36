"""Several candidates' layers become one: mergekit's arithmetic, with a direct path for task arithmetic.

mergekit registers its methods with contracts and typed parameters, so any of them can be named in a run file and is
checked before a run starts. Task arithmetic is on the path of every trial: mergekit takes about 0.26 s for it on a
layer of 3.5M parameters. Here it is computed block by block in float32, in about 0.010 s of one core. Keeping sums of
differences would save a third of that, and cost twice the bytes of every merge ever tried, so they are not kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from gptailor.plan import BASE, LayerChoice

if TYPE_CHECKING:
    from mergekit.merge_methods.base import MergeMethod

State = Mapping[str, torch.Tensor]

TASK_ARITHMETIC = "task_arithmetic"
SET_BY_FACTOR = ("weight", "t", "lambda")
NOT_MERGES = ("passthrough",)
CPU_BLOCK, DEVICE_BLOCK = 1 << 17, 1 << 25
"""Elements at a time. 131072 floats stay in a core's cache; layers are merged side by side, each by one thread: on a
machine that others use too, thousands of small parallel sections took a hundred times longer than the arithmetic."""


def merge_methods() -> tuple[str, ...]:
    """Names that may stand in a run file's merge.method."""
    from mergekit.merge_methods import registered_methods

    return tuple(sorted(m.spec.name for m in registered_methods() if m.spec.name not in NOT_MERGES))


def merge_source_counts(method: str) -> tuple[int, int | None]:
    """Least and greatest number of candidates that a method merges in one layer; None is no limit."""
    if method == TASK_ARITHMETIC:
        return 2, None  # known without mergekit, whose import would be paid by every start
    contract = _method(method).spec.contract
    if contract.max_inputs == 2:
        return 2, 2
    most = contract.max_non_base if contract.max_inputs is None else contract.max_inputs - 1
    return max(2, contract.min_non_base or 0, contract.min_inputs - 1), most


def merge_method_problem(method: str, parameters: Mapping[str, Any], n_candidates: int) -> str | None:
    """What is wrong with a merge method, its further parameters or the number of candidates; None if nothing is."""
    if method == TASK_ARITHMETIC and not parameters and n_candidates >= 2:
        return None
    if method not in merge_methods():
        return f"merge.method: {method!r} is not known; mergekit has {', '.join(merge_methods())}"
    least, _most = merge_source_counts(method)
    if n_candidates < least:
        return f"merge.method: {method} merges at least {least} candidates, this run has {n_candidates}"
    known = {p.name: p for p in _method(method).spec.parameters if p.name not in SET_BY_FACTOR}
    for name, value in parameters.items():
        if name in SET_BY_FACTOR:
            return f"merge.parameters.{name}: is what merge.factor sets; leave it out"
        if name not in known:
            return f"merge.parameters.{name}: {method} has no such parameter; it has {', '.join(known) or 'none'}"
        try:
            known[name].validate(value)
        except ValidationError as error:
            return f"merge.parameters.{name}: {error.errors()[0]['msg'].lower()}, got {value!r}"
    return None


def is_plain(choice: LayerChoice) -> bool:
    """Task arithmetic without further parameters: ours, not mergekit's."""
    return choice.method == TASK_ARITHMETIC and not choice.parameters


def choice_problem(choice: LayerChoice) -> str | None:
    """What is wrong with one merged layer of a plan, wherever the plan comes from; None if nothing is."""
    problem = merge_method_problem(choice.method, dict(choice.parameters), len(choice.sources))
    if problem is None:
        most = merge_source_counts(choice.method)[1]
        if most is not None and len(choice.sources) > most:
            problem = f"{choice.method} merges {most} candidates, not {list(choice.sources)}"
    return problem


@torch.no_grad()
def merge(choice: LayerChoice, base: State, candidates: Mapping[str, State]) -> dict[str, torch.Tensor]:
    """The merged layer's tensors, where they differ from the base's; float32 arithmetic, the base's type.

    candidates: states by name, in the choice's order. Equal choices give equal tensors, random methods included.
    """
    changed = {
        name: tensor
        for name, tensor in base.items()
        if any(state[name].data_ptr() != tensor.data_ptr() for state in candidates.values())
        and tensor.is_floating_point()
    }
    assert choice.factor is not None
    if is_plain(choice):
        return {
            name: _task_arithmetic(tensor, [state[name] for state in candidates.values()], choice.factor)
            for name, tensor in changed.items()
        }
    return _by_mergekit(choice, {BASE: base, **candidates}, tuple(changed))


@torch.no_grad()
def fold(home: State, donors: Sequence[tuple[State, float]]) -> dict[str, torch.Tensor]:
    """The weight matrices of a layer with other layers folded in: W + sum of factor * (W_other - W), in float32.

    LaCo's merge (Yang et al., arXiv 2402.11187, equation 1) with a factor for each layer; norms and biases stay, as in
    its published notebooks. donors: states of equal shapes, with their factors.
    """
    folded = {}
    for name, tensor in home.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        origin = tensor.float()
        total = origin.clone()
        for state, factor in donors:
            total.add_(state[name].float() - origin, alpha=factor)
        folded[name] = total.to(tensor.dtype)
    return folded


def _task_arithmetic(base: torch.Tensor, candidates: list[torch.Tensor], factor: float) -> torch.Tensor:
    """base + factor * sum(candidate - base), the paper's layer merge (arXiv 2506.20480, section 3)."""
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    size = min(base.numel(), CPU_BLOCK if base.device.type == "cpu" else DEVICE_BLOCK)
    scratch = [torch.empty(size, device=base.device) for _ in range(3)]
    pieces = [tensor.reshape(-1).split(size) for tensor in (base, *candidates)]
    for out, block, *others in zip(merged.view(-1).split(size), *pieces, strict=True):
        origin, total, difference = (buffer[: block.numel()] for buffer in scratch)
        origin.copy_(block)
        total.copy_(others[0]).sub_(origin)
        for other in others[1:]:
            total.add_(difference.copy_(other).sub_(origin))
        out.copy_(origin.add_(total.mul_(factor)))
    return merged


def _by_mergekit(choice: LayerChoice, states: Mapping[str, State], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Any registered method.

    What `factor` means: `lambda` or `t` where the method has it, the candidates' weight for linear (the base has the
    rest), the second candidate's share for nuslerp; a method without a strength of its own is scaled as task vectors
    are: start + factor * (merged - start). `start` is the base, or the first candidate where a method takes exactly two
    models.
    """
    from mergekit.merge_methods import merge_state_dicts

    method, factor, sources = _method(choice.method), float(choice.factor or 0.0), choice.sources
    spec = method.spec
    known = {parameter.name for parameter in spec.parameters}
    start = sources[0] if spec.contract.max_inputs == 2 else BASE
    models = sources if spec.contract.max_inputs == 2 else (BASE, *sources)
    parameters: dict[str, Any] = dict(choice.parameters)
    scale = None
    if choice.method == "linear":
        parameters |= {"weight": {BASE: 1 - factor * len(sources)} | dict.fromkeys(sources, factor)}
        parameters.setdefault("normalize", False)
    elif choice.method == "nuslerp":
        parameters["weight"] = dict(zip(sources, (1 - factor, factor), strict=True))
    else:
        strength = next((name for name in ("lambda", "t") if name in known), None)
        parameters |= {strength: factor} if strength else {}
        parameters |= {"weight": 1.0} if "weight" in known else {}
        scale = None if strength else factor
        if spec.contract.base.value == "ignored":
            models = sources
    with torch.random.fork_rng([d for d in {states[start][n].device for n in names} if d.type == "cuda"]):
        torch.manual_seed(_seed(choice))
        merged = merge_state_dicts(
            {model: {name: states[model][name] for name in names} for model in models},
            method,
            parameters=parameters,
            base=start if start in models else None,
            dtype=torch.float32,
            out_dtype=torch.float32,
        )
    for name, tensor in merged.items():
        if scale is not None:
            origin = states[start][name].float()
            tensor = origin + scale * (tensor - origin)
        merged[name] = tensor.to(states[BASE][name].dtype)
    return merged


def _seed(choice: LayerChoice) -> int:
    return int.from_bytes(hashlib.sha256(repr(choice.weights_key).encode()).digest()[:7], "little")


def _method(name: str) -> MergeMethod:
    from mergekit.merge_methods import get

    return get(name)
