"""Does this family fit together? Answered from configurations and safetensors headers, before anything is loaded.

A wrong folder found after twenty minutes of loading is the commonest complaint about merging tools; here every problem
of every model is named at once (model, file, tensor, sizes), in well under two seconds for 7 billion parameters.
What fits is what transformers loads (skeleton.py); what can be shortened is what a configuration can say
(renumbering.py). A base that is small enough is tried as well (proof.py), so that what the search would refuse is
refused here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.adapters import adapter_notes, adapter_problems, adapter_targets
from gptailor.family.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, Unreadable, has_tokenizer, is_built_in
from gptailor.family.hub import open_checkpoint
from gptailor.family.removal import Sizes, counted
from gptailor.family.renumbering import Renumbering, find_renumbering
from gptailor.family.settings import differing_settings
from gptailor.family.skeleton import (
    Loading,
    Shape,
    configuration_of,
    load_headers,
    skeleton_of,
)
from gptailor.family.structure import find_layers, layer_list
from gptailor.family.weights import distance, first_non_finite
from gptailor.plan import BASE
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_LINES_A_MODEL = 5
UNRELATED = 1.0
"""Distance of weights, in units of the base's own, from which a candidate is hardly a fine-tune of it: two models that
have nothing in common are 1.4 apart."""


@dataclass(frozen=True)
class Preflight:
    """A family that fits together.

    layer_parameters: of each layer of the base. other_parameters: embeddings, final norm and head (a tied head counts
    once). model_bytes: what each model adds in the run's type if nothing is shared, candidates by their layers alone;
    distinct_bytes: their sum, an upper bound of what the open family holds. licences: by model, where one is named.
    fixed: layers that every plan keeps, as no configuration can do without them.
    inner_size: of the MLP. n_removed: layers that a plan removes, of a range the most;
    None where that is yet to be measured.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    layer_parameters: tuple[int, ...]
    other_parameters: int
    model_bytes: Mapping[str, int]
    licences: Mapping[str, str]
    notes: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()
    inner_size: int = 0
    n_removed: int | None = None

    @property
    def n_parameters(self) -> int:
        """Of the dense base."""
        return sum(self.layer_parameters) + self.other_parameters

    @property
    def distinct_bytes(self) -> int:
        return sum(self.model_bytes.values())


@dataclass(frozen=True)
class Inspection:
    """What is known of a family that fits.

    `preflight` for everybody; for who opens it, the checkpoints by name (the base's is BASE), the base on the meta
    device, and how its layers can be renumbered.
    """

    preflight: Preflight
    checkpoints: Mapping[str, Checkpoint]
    skeleton: PreTrainedModel
    renumbering: Renumbering


def preflight(spec: RunSpec) -> Preflight:
    """Check the base model and all candidates of a run. Raises UserError with one line for each problem found."""
    return look_again(spec)[0]


def look_again(spec: RunSpec, *, download: bool = False) -> tuple[Preflight, Mapping[str, Checkpoint]]:
    """preflight and checkpoints; of headers and configurations that are the last family's, what was found of that.

    A run looks at its files several times, and most of a look is building models on the meta device. Raises UserError.
    """
    opened = _open_all(spec, download)
    if _last is None or opened[1] or (spec, opened[0]) != _last[:2]:
        _inspect(spec, *opened)
    assert _last is not None
    return _last[2], opened[0]


_last: tuple[RunSpec, Mapping[str, Checkpoint], Preflight] | None = None
"""The family that was inspected last."""


def inspect_family(spec: RunSpec, *, download: bool = False) -> Inspection:
    """preflight, and what was found on the way; `download` fetches hub models that are not here."""
    return _inspect(spec, *_open_all(spec, download))


def _open_all(spec: RunSpec, download: bool) -> tuple[dict[str, Checkpoint], list[str]]:
    """The models' headers and configurations by name, and what is wrong with them as files."""
    problems: list[str] = []
    checkpoints: dict[str, Checkpoint] = {}
    for name, location in {BASE: spec.base_model, **spec.candidates}.items():
        where = "base_model" if name == BASE else f"candidates.{name}"
        try:
            checkpoint = open_checkpoint(location, where, trust_remote_code=spec.trust_remote_code, download=download)
        except Unreadable as error:
            problems.append(f"{where}: {error}")
        else:
            checkpoints[name] = checkpoint
            problems += [f"{where}: {problem}" for problem in checkpoint.problems]
    return checkpoints, problems


def _inspect(spec: RunSpec, checkpoints: Mapping[str, Checkpoint], problems: list[str]) -> Inspection:
    global _last
    base = checkpoints.get(BASE)
    if base is None:
        raise _refusal(problems)
    judge = BaseJudge(base, spec)
    base_problems = _few(list(judge.problems()))
    if judge.skeleton is not None and not base_problems:
        for name, candidate in checkpoints.items():
            found = [] if name == BASE else _few(list(_candidate_problems(candidate, judge)))
            problems += [f"{candidate.where}: {problem}" for problem in found]
    problems += [f"base_model: {problem}" for problem in base_problems]
    if problems or judge.skeleton is None:
        raise _refusal(problems)
    try:
        known = counted(spec, _sizes(judge))
        is_counted = known.has_range or not isinstance(known.remove, Removal)
        n_removed = known.n_removed(base.n_layers or 0) if is_counted else None
        renumbering = find_renumbering(judge.skeleton, 1 if n_removed is None else n_removed)
    except UserError as error:
        raise _refusal([f"base_model: {error}"]) from error
    summary = _summary(judge, checkpoints, renumbering, n_removed)
    _last = spec, checkpoints, summary
    return Inspection(summary, checkpoints, judge.skeleton, renumbering)


def _refusal(problems: Sequence[str]) -> UserError:
    title = f"the models do not fit together: {len(problems)} problem{'s' * (len(problems) != 1)}"
    return UserError("\n".join([title, *problems]))


def _few(problems: list[str]) -> list[str]:
    if len(problems) > MAX_LINES_A_MODEL:
        problems[MAX_LINES_A_MODEL - 1 :] = [f"and {len(problems) - MAX_LINES_A_MODEL + 1} more tensors do not fit"]
    return problems


class BaseJudge:
    """The base, judged by what transformers makes of it.

    problems() first, then the skeleton is there if there are none. notes: what of it is not used, or read otherwise
    than it stands there.
    """

    def __init__(self, base: Checkpoint, spec: RunSpec) -> None:
        self.base = base
        self.spec = spec
        self.skeleton: PreTrainedModel | None = None
        self.loading = Loading()
        self.notes: list[str] = []

    def problems(self) -> Iterator[str]:
        base, trusted = self.base, self.spec.trust_remote_code
        if base.is_adapter:
            yield "is a LoRA adapter; the base must be a full model"
            return
        refused = list(architecture_problems(base.config, trusted))
        yield from refused
        if base.folder is not None and not has_tokenizer(base.folder):
            yield "has no tokenizer (tokenizer.json or tokenizer.model)"
        if base.n_layers is None:
            yield "config.json does not say how many layers there are (num_hidden_layers)"
        elif base.layer_prefix is None:
            yield f"its tensors are not numbered as the {base.n_layers} layers that config.json announces"
        elif not refused:
            yield from self._as_loaded()

    def _as_loaded(self) -> Iterator[str]:
        try:
            config = configuration_of(self.base.config, self.base.folder, self.spec.trust_remote_code)
            skeleton = skeleton_of(config, self.spec.trust_remote_code)
            self.loading = load_headers(skeleton, self.base.tensors)
            find_layers(skeleton)
        except (Unreadable, UserError) as error:
            yield str(error)
            return
        yield from _loading_problems(self.loading, self.base)
        if (name := first_non_finite(self.base)) is not None:
            yield f"{self.base.tensors[name].file}: tensor {name} holds NaN or infinite values"
        self.skeleton = skeleton
        self.notes += [f"base_model: {note}" for note in _base_notes(self.base, self.loading)]

    @cached_property
    def scattered(self) -> str | None:
        """A tensor of a layer that is not among the files' numbered ones, which is what a candidate lends."""
        assert self.skeleton is not None
        path = find_layers(self.skeleton)
        numbered = {f"{path}.{name}": info for name, info in self.base.inner_tensors.items()}
        missing = load_headers(self.skeleton, numbered).missing
        return next((name for name in missing if name.startswith(f"{path}.")), None)


def _loading_problems(loading: Loading, base: Checkpoint) -> Iterator[str]:
    for name in loading.missing:
        tied = "; tie_word_embeddings is false there" if name.endswith("lm_head.weight") else ""
        yield f"tensor {name} is missing: the model that config.json describes has it{tied}"
    for name, its, expected in loading.mismatched:
        file = next((f"{info.file}: " for key, info in base.tensors.items() if name.endswith(key)), "")
        yield f"{file}tensor {name} has shape {list(its)}, the model that config.json describes has {list(expected)}"
    yield from loading.errors


def _base_notes(base: Checkpoint, loading: Loading) -> Iterator[str]:
    if base.config.get("auto_map") and is_built_in(base.config):
        yield "its config.json names code of its own (auto_map); transformers has this architecture, and that is used"
    further = [name for name in base.tensors if base.is_beyond_layers(name)]
    if further:
        yield (
            f"{len(further)} tensors belong to layers beyond the {base.n_layers} of the model, which predict further "
            f"tokens ({further[0]}); they are not used"
        )
    unused = [name for name in loading.unexpected if name not in further]
    if unused:
        yield f"{len(unused)} of its tensors are not used by transformers, the first is {unused[0]}"


def architecture_problems(config: Mapping[str, Any], trust_remote_code: bool) -> Iterator[str]:
    """Why no model of this configuration can be stitched, as far as it says so itself."""
    from transformers import __version__

    name = architecture_name(config)
    if config.get("is_encoder_decoder"):
        yield f"{name} is an encoder-decoder; only decoder-only language models can be stitched"
    elif not is_built_in(config) and not trust_remote_code:
        yield f"{name} is not a decoder-only language model that transformers {__version__} has built in"
    if (quantised := _quantised(config)) is not None:
        yield f"its weights are quantised ({quantised}); give the unquantised model"


def _quantised(config: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantised, None if they are not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown method")) if isinstance(found, Mapping) else str(found)[:100]


def architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else f"model_type {config.get('model_type')!r}"


def _candidate_problems(candidate: Checkpoint, judge: BaseJudge) -> Iterator[str]:
    base, skeleton = judge.base, judge.skeleton
    assert skeleton is not None
    if candidate.is_adapter:
        yield from adapter_problems(candidate, _shapes(skeleton), find_layers(skeleton))
        return
    for what, keys in (("layers", ("num_hidden_layers", "n_layer")), ("hidden_size", ("hidden_size", "n_embd"))):
        mine, its = base.size(*keys), candidate.size(*keys)
        if mine != its:
            yield f"config.json has {its} {what}, the base has {mine}; it is no fine-tune of this base"
            return
    if _text_type(candidate.text_config) != _text_type(base.text_config):
        yield f"is a {architecture_name(candidate.config)}, the base is a {architecture_name(base.config)}"
        return
    if _quantised(candidate.config) is not None:
        yield "its weights are quantised; give the unquantised model"
    yield from _layer_problems(candidate, judge, skeleton)
    try:
        different = list(differing_settings(base, candidate))
    except Unreadable as error:
        yield str(error)
        return
    for key, its_value, mine_value, changes_all in different:
        if changes_all:
            yield f"its {key} is {its_value}, the base's is {mine_value}; its layers cannot work in the base"


def _text_type(config: Mapping[str, Any]) -> str:
    """model_type of the language model, whether it stands alone or in a composite configuration."""
    return str(config.get("model_type")).removesuffix("_text")


def _layer_problems(candidate: Checkpoint, judge: BaseJudge, skeleton: PreTrainedModel) -> Iterator[str]:
    """What of its layers' tensors would be missing, dropped or of another shape in the base's model."""
    base, path = judge.base, find_layers(skeleton)
    if candidate.layer_prefix is None:
        yield f"its tensors are not numbered as the {base.n_layers} layers of the base"
        return
    if judge.scattered is not None:
        name = architecture_name(base.config)
        yield f"its layers cannot be lent: {name} keeps a part of each elsewhere in its files ({judge.scattered})"
        return
    mine, its = base.inner_tensors, candidate.inner_tensors
    if {name: info.shape for name, info in mine.items()} == {name: info.shape for name, info in its.items()}:
        return  # what transformers made of the base's, it makes of these
    try:
        loading = load_headers(skeleton, {f"{path}.{name}": info for name, info in its.items()})
    except Unreadable as error:
        yield str(error)
        return
    for name in loading.missing:
        inner = name.removeprefix(f"{path}.")
        if name.startswith(f"{path}."):
            place = mine[inner].file if inner in mine else "its files"
            yield f"tensor {candidate.layer_prefix}{inner} is missing (the base has it, in {place})"
    for name, shape, expected in loading.mismatched:
        inner = name.removeprefix(f"{path}.")
        file = f"{its[inner].file}: " if inner in its else ""
        yield f"{file}tensor {name} has shape {list(shape)}, the base's has {list(expected)}"
    for name in loading.unexpected:
        inner = name.removeprefix(f"{path}.")
        if inner in its and inner not in mine:
            yield (
                f"{its[inner].file}: tensor {candidate.layer_prefix}{inner} has no place in the base's layers, and its "
                "layers are not what they are without it"
            )


def _shapes(skeleton: PreTrainedModel) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


def _sizes(judge: BaseJudge) -> Sizes:
    assert judge.skeleton is not None
    layers = tuple(sum(p.numel() for p in layer.parameters()) for layer in layer_list(judge.skeleton))
    total = sum(p.numel() for p in judge.skeleton.parameters())
    dtype = _dtype(judge.base.tensors, judge.spec)
    width = DTYPE_BYTES[next(short for short, long in FLOATS.items() if long == dtype)]
    return Sizes(layers, total - sum(layers), width)


def _summary(
    judge: BaseJudge, checkpoints: Mapping[str, Checkpoint], renumbering: Renumbering, n_removed: int | None
) -> Preflight:
    base, skeleton, sizes = judge.base, judge.skeleton, _sizes(judge)
    assert skeleton is not None
    layer_parameters, width = tuple(sizes.layers), sizes.width
    model_bytes = {BASE: sizes.n_parameters * width}
    shapes = _shapes(skeleton)
    notes: list[str] = [*judge.notes]
    for name, candidate in checkpoints.items():
        if name == BASE:
            continue
        model_bytes[name] = width * sum(layer_parameters)
        if candidate.is_adapter:
            changed = adapter_targets(candidate, shapes)
            path = find_layers(skeleton)
            model_bytes[name] = width * sum(_elements(shapes[one]) for one in changed if one.startswith(f"{path}."))
        notes += [f"{candidate.where}: {note}" for note in _notes(candidate, base, skeleton)]
    if renumbering.fixed:
        fixed = ", ".join(map(str, sorted(renumbering.fixed)))
        notes.append(f"base_model: layers that no {renumbering.name} can do without stay in every plan: {fixed}")
    return Preflight(
        architecture=architecture_name(base.config),
        n_layers=renumbering.n_layers,
        hidden_size=base.size("hidden_size", "n_embd", "d_model") or 0,
        # what transformers saves of a model inside another leaves out what is its default: Gemma 3
        vocab_size=int(getattr(skeleton.config.get_text_config(), "vocab_size", 0) or base.size("vocab_size") or 0),
        dtype=_dtype(base.tensors, judge.spec),
        layer_parameters=layer_parameters,
        other_parameters=sizes.others,
        model_bytes=model_bytes,
        licences={name: found.licence for name, found in checkpoints.items() if found.licence},
        notes=tuple(notes),
        fixed=tuple(sorted(renumbering.fixed)),
        inner_size=base.size("intermediate_size", "n_inner", "ffn_dim", "d_ff")
        or 4 * (base.size("hidden_size", "n_embd", "d_model") or 0),
        n_removed=n_removed,
    )


def _elements(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _dtype(tensors: Mapping[str, TensorInfo], spec: RunSpec) -> str:
    """The run's number type: as asked for, or the one that most of the base is stored in."""
    if spec.dtype != "auto":
        return spec.dtype
    by_dtype: dict[str, int] = defaultdict(int)
    for info in tensors.values():
        by_dtype[info.dtype] += info.n_elements
    return FLOATS.get(max(by_dtype, key=lambda dtype: by_dtype[dtype]), "float32")


def _notes(candidate: Checkpoint, base: Checkpoint, skeleton: PreTrainedModel) -> Iterator[str]:
    """Differences that do not hinder stitching but that its owner should know of."""
    if candidate.is_adapter:
        yield from adapter_notes(candidate, base, find_layers(skeleton))
        return
    if candidate.config.get("auto_map") and is_built_in(candidate.config):
        yield "its config.json names code of its own (auto_map); transformers has this architecture, and that is used"
    if candidate.size("vocab_size") != base.size("vocab_size"):
        yield (
            f"its vocabulary has {candidate.size('vocab_size')} entries, the base's has {base.size('vocab_size')}; "
            "embeddings, head and tokenizer stay the base's"
        )
    for key, its, mine, changes_all in differing_settings(base, candidate):
        if not changes_all:
            yield f"its {key} is {its}, the base's is {mine}; the base's is used"
    if (name := first_non_finite(candidate)) is not None:
        yield f"{candidate.tensors[name].file}: tensor {name} holds NaN or infinite values; plans with it will fail"
    elif (apart := distance(candidate, base)) is not None and apart >= UNRELATED:
        yield (
            f"its layers are {apart:.2f} times the base's own size away from the base's (unrelated models are 1.41, "
            "fine-tunes far below 1); it may be no fine-tune of this base"
        )
