"""Does this family fit together? Answered from configurations and safetensors headers, before anything is loaded.

A wrong folder found after twenty minutes of loading is the commonest complaint about merging tools; here every problem
of every model is named at once (model, file, tensor, sizes), in well under two seconds for 7 billion parameters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptailor.errors import UserError
from gptailor.family.adapters import adapter_problems, adapter_targets
from gptailor.family.checkpoint import DTYPE_BYTES, Checkpoint, Unreadable, has_tokenizer
from gptailor.family.hub import open_checkpoint
from gptailor.plan import BASE
from gptailor.spec import RunSpec

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_LINES_A_MODEL = 5
TOKEN_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# What a layer's arithmetic takes from the configuration: always the base's, so a difference is worth a note. Versions
# of transformers name the same thing differently, so that only what both state is compared.
SILENT = (
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "sliding_window",
)


@dataclass(frozen=True)
class Preflight:
    """A family that fits together.

    layer_parameters: of each layer of the base. other_parameters: embeddings, final norm and head (a tied head counts
    once). model_bytes: what each model adds in the run's type if nothing is shared, candidates by their layers alone;
    distinct_bytes: their sum, an upper bound of what the open family holds. licences: by model, where one is named.
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

    @property
    def n_parameters(self) -> int:
        """Of the dense base."""
        return sum(self.layer_parameters) + self.other_parameters

    @property
    def distinct_bytes(self) -> int:
        return sum(self.model_bytes.values())


def preflight(spec: RunSpec) -> Preflight:
    """Check the base model and all candidates of a run. Raises UserError with one line for each problem found."""
    return inspect_family(spec)[0]


def inspect_family(spec: RunSpec, *, download: bool = False) -> tuple[Preflight, dict[str, Checkpoint]]:
    """preflight, and the checkpoints by name (the base's is BASE); `download` fetches hub models that are not here."""
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
    base = checkpoints.get(BASE)
    base_problems = [] if base is None else list(_base_problems(base, spec.trust_remote_code))
    if base is not None and not base_problems:
        for name, candidate in checkpoints.items():
            found = [] if name == BASE else list(_candidate_problems(candidate, base))
            if len(found) > MAX_LINES_A_MODEL:
                found[MAX_LINES_A_MODEL - 1 :] = [f"and {len(found) - MAX_LINES_A_MODEL + 1} more tensors do not fit"]
            problems += [f"{candidate.where}: {problem}" for problem in found]
    problems += [f"base_model: {problem}" for problem in base_problems]
    if problems or base is None:
        title = f"the models do not fit together: {len(problems)} problem{'s' * (len(problems) != 1)}"
        raise UserError("\n".join([title, *problems]))
    return _summary(base, checkpoints, spec), checkpoints


def _base_problems(base: Checkpoint, trust_remote_code: bool) -> Iterator[str]:
    if base.is_adapter:
        yield "is a LoRA adapter; the base must be a full model"
        return
    yield from _architecture_problems(base.config, trust_remote_code)
    if base.folder is not None and not has_tokenizer(base.folder):
        yield "has no tokenizer (tokenizer.json or tokenizer.model)"
    if base.n_layers is None:
        yield "config.json does not say how many layers there are (num_hidden_layers)"
    elif base.layer_prefix is None:
        yield f"its tensors are not numbered as the {base.n_layers} layers that config.json announces"
    else:
        yield from _uneven_layers(base)
    expected = [base.size("vocab_size"), base.size("hidden_size", "n_embd", "d_model")]
    for name, info in base.tensors.items():
        if name.endswith(TOKEN_EMBEDDINGS) and None not in expected and list(info.shape) != expected:
            yield (
                f"{info.file}: tensor {name} has shape {list(info.shape)}, "
                f"config.json has vocab_size {expected[0]} and hidden_size {expected[1]}"
            )


def _architecture_problems(config: Mapping[str, Any], trust_remote_code: bool) -> Iterator[str]:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = architecture_name(config)
    if config.get("is_encoder_decoder"):
        yield f"{name} is an encoder-decoder; only decoder-only language models can be stitched"
    elif config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        yield f"{name} is not a decoder-only language model that transformers {__version__} has built in"
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        yield f"its weights are quantised ({method}); give the unquantised model"


def architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    return str(names[0]) if names else f"model_type {config.get('model_type')!r}"


def _uneven_layers(base: Checkpoint) -> Iterator[str]:
    """Tensors that a layer lacks, or has in a shape of its own, where its neighbours agree.

    Architectures with several kinds of layers are legitimate: a layer with tensors of its own is another kind.
    """
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in range(base.n_layers or 0)]
    for name, info in base.tensors.items():
        index = base.layer_of(name)
        if index is not None:
            layers[index][name[len(f"{base.layer_prefix}{index}.") :]] = info.shape
    usual = Counter(frozenset(layer) for layer in layers).most_common(1)[0][0]
    for index, layer in enumerate(layers):
        prefix = f"{base.layer_prefix}{index}."
        if layer.keys() < usual:
            missing = ", ".join(prefix + suffix for suffix in sorted(usual - layer.keys())[:MAX_LINES_A_MODEL])
            yield f"tensor {missing} is missing (other layers have it)"
        for suffix, shape in layer.items():
            shapes = Counter(other[suffix] for other in layers if suffix in other)
            expected, count = shapes.most_common(1)[0]
            if shapes[shape] == 1 and count > 1 and len(shapes) == 2:
                file = base.tensors[prefix + suffix].file
                yield f"{file}: tensor {prefix}{suffix} has shape {list(shape)}, other layers have {list(expected)}"


def _candidate_problems(candidate: Checkpoint, base: Checkpoint) -> Iterator[str]:
    if candidate.is_adapter:
        yield from adapter_problems(candidate, base)
        return
    for what, keys in (("layers", ("num_hidden_layers", "n_layer")), ("hidden_size", ("hidden_size", "n_embd"))):
        mine, its = base.size(*keys), candidate.size(*keys)
        if mine != its:
            yield f"config.json has {its} {what}, the base has {mine}; it is no fine-tune of this base"
            return
    if candidate.config.get("model_type") != base.config.get("model_type"):
        yield f"is a {architecture_name(candidate.config)}, the base is a {architecture_name(base.config)}"
        return
    if candidate.config.get("quantization_config"):
        yield "its weights are quantised; give the unquantised model"
    for name, expected in base.tensors.items():
        if base.layer_of(name) is None:
            continue
        info = candidate.tensors.get(name)
        if info is None:
            yield f"tensor {name} is missing (the base has it, in {expected.file})"
        elif info.shape != expected.shape:
            yield (f"{info.file}: tensor {name} has shape {list(info.shape)}, the base's has {list(expected.shape)}")


def _summary(base: Checkpoint, checkpoints: Mapping[str, Checkpoint], spec: RunSpec) -> Preflight:
    n_layers = base.n_layers or 0
    layer_parameters = [0] * n_layers
    other = 0
    tied = bool(base.text_config.get("tie_word_embeddings"))
    by_dtype: dict[str, int] = defaultdict(int)
    for name, info in base.tensors.items():
        index = base.layer_of(name)
        by_dtype[info.dtype] += info.n_elements
        if index is None and tied and name.endswith("lm_head.weight"):
            continue
        if index is None:
            other += info.n_elements
        else:
            layer_parameters[index] += info.n_elements
    stored = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    dtype = FLOATS.get(stored, "float32") if spec.dtype == "auto" else spec.dtype
    width = DTYPE_BYTES[next(short for short, long in FLOATS.items() if long == dtype)]
    model_bytes = {BASE: (sum(layer_parameters) + other) * width}
    notes: list[str] = []
    for name, candidate in checkpoints.items():
        if name == BASE:
            continue
        changed = adapter_targets(candidate, base) if candidate.is_adapter else candidate.tensors
        model_bytes[name] = width * sum(
            base.tensors[tensor].n_elements
            for tensor in changed
            if tensor in base.tensors and base.layer_of(tensor) is not None
        )
        notes += _notes(candidate, base)
    return Preflight(
        architecture=architecture_name(base.config),
        n_layers=n_layers,
        hidden_size=base.size("hidden_size", "n_embd", "d_model") or 0,
        vocab_size=base.size("vocab_size") or 0,
        dtype=dtype,
        layer_parameters=tuple(layer_parameters),
        other_parameters=other,
        model_bytes=model_bytes,
        licences={name: found.licence for name, found in checkpoints.items() if found.licence},
        notes=tuple(notes),
    )


def _notes(candidate: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """Differences that do not hinder stitching but that its owner should know of."""
    if candidate.is_adapter:
        outside = [name for name in adapter_targets(candidate, base) if base.layer_of(name) is None]
        if outside:
            yield f"{candidate.where}: it also adapts {', '.join(outside[:3])}; embeddings and head stay the base's"
        return
    if candidate.size("vocab_size") != base.size("vocab_size"):
        yield (
            f"{candidate.where}: its vocabulary has {candidate.size('vocab_size')} entries, the base's has "
            f"{base.size('vocab_size')}; embeddings, head and tokenizer stay the base's"
        )
    for key in SILENT:
        mine, its = base.text_config.get(key), candidate.text_config.get(key)
        if key in base.text_config and key in candidate.text_config and mine != its:
            yield f"{candidate.where}: its {key} is {its}, the base's is {mine}; the base's is used"
