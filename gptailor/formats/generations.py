"""Configurations and tokenizers that transformers 4 and 5, and the tools built on either, read alike.

transformers 5 renamed what it writes: `rope_theta` and `rope_scaling` became `rope_parameters`, `torch_dtype` became
`dtype`, experts are counted under another name, a tokenizer's class is called TokenizersBackend and its additional
tokens are a list under the name that was a dictionary. Version 4 passes over keys that it does not know and computes
with its defaults, without a word. So both spellings are written, and each says the same.

Nothing of the machine that wrote a file goes along: no path, no name of a folder, no setting of the reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

NEWER_KEYS = frozenset({"rope_parameters", "dtype"})
"""Keys of a configuration that transformers 4 does not know."""
OF_THE_MACHINE = frozenset(
    [
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "local_files_only",
        "is_local",
        "cache_dir",
        "use_auth_token",
        "token",
        "proxies",
        "special_tokens_map_file",
        "tokenizer_file",
        "resume_download",
        "force_download",
        "_from_auto",
        "files_loaded",
    ]
)
"""What transformers has written into configurations over the years that tells of the reader, not of the model."""
_PATH = re.compile(r"(?:file://|~[/\\]|[A-Za-z]:[/\\]|\\\\|/)[^\n]*[/\\][^\n]*")
_TOKENIZER_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "PythonBackend": "PreTrainedTokenizer",
    "SentencePieceBackend": "PreTrainedTokenizer",
}
_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_PARTIAL = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_GLOBAL_THETA = {"modernbert-decoder": "global_rope_theta"}
_LOCAL_THETA = {"modernbert-decoder": "local_rope_theta"}


# --- configurations ---------------------------------------------------------------------------------------------------


def for_both(written: Mapping[str, Any], config: PreTrainedConfig, original: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's JSON with the keys of transformers 4 beside those of 5, and nothing of the machine.

    written: what transformers 5 saves of `config`. original: the base's own config.json; a key of it that is gone from
    `written` is kept as it stands there, but for lists of one entry a layer, which the stitched model has its own of.
    """
    both = _kept(original, written, config) | _aliases(written, config) | dict(written)
    positions = _positions(written, config, original)
    if _reads_alike(both | positions, written, config):
        both |= positions
    if "dtype" in written:
        both["torch_dtype"] = written["dtype"]
    for key, value in written.items():
        if isinstance(value, Mapping) and isinstance(part := getattr(config, key, None), PreTrainedConfig):
            both[key] = for_both(value, part, _mapping(original.get(key)))
    return dict(sorted(without_machine(both).items()))


def _reads_alike(both: Mapping[str, Any], written: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Does transformers 5 take both spellings together for what it wrote?

    Not for every class that is new in it: some let `rope_scaling` replace all that `rope_parameters` says.
    """
    try:
        again = type(config).from_dict(deepcopy(dict(both)))
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError):
        return False
    return named_once(again.to_dict().get("rope_parameters")) == named_once(written.get("rope_parameters"))


def named_once(parameters: Any) -> Any:
    """Positions without `type`, which is `rope_type`'s first name."""
    if not isinstance(parameters, Mapping):
        return parameters
    return {key: named_once(value) for key, value in parameters.items() if key != "type"}


def _kept(original: Mapping[str, Any], written: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    n_layers = original.get("num_hidden_layers")
    return {
        key: value
        for key, value in original.items()
        if key not in written
        and key not in config.attribute_map
        and key not in ("auto_map", "quantization_config")
        and not (isinstance(value, list) and len(value) == n_layers)
    }


def _aliases(written: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Other names under which the configuration's class knows a key: what was a key's name in the other generation."""
    known = {alias: key for alias, key in config.attribute_map.items() if key in written and alias not in written}
    return {alias: written[key] for alias, key in known.items()}


def _positions(written: Mapping[str, Any], config: PreTrainedConfig, original: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 4's keys for what `rope_parameters` says: one setting, or one for each type of layer."""
    kind, found = config.model_type, _mapping(written.get("rope_parameters"))
    if not found:
        return {}
    local = _mapping(found.get("sliding_attention"))
    whole = _mapping(found.get("full_attention")) or (found if "rope_theta" in found else {})
    keys = {_GLOBAL_THETA.get(kind) or _THETA.get(kind, "rope_theta"): whole.get("rope_theta")}
    if "partial_rotary_factor" in whole:
        keys[_PARTIAL.get(kind, "partial_rotary_factor")] = whole["partial_rotary_factor"]
    if local:
        keys[_LOCAL_THETA.get(kind, "rope_local_base_freq")] = local.get("rope_theta")
    return keys | {"rope_scaling": original.get("rope_scaling") or _scaling(whole)}


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` in the older spelling; None where positions are not scaled."""
    scaled = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    kind = scaled.pop("rope_type", "default")
    if kind == "longrope":  # Phi-3 of transformers 4 takes these three and no others
        return {"type": kind} | {key: scaled[key] for key in ("short_factor", "long_factor") if key in scaled}
    return {"rope_type": kind} | scaled if kind != "default" or scaled else None


def older(both: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as transformers 4 sees it: without the keys that it does not know."""
    return {k: older(v) if isinstance(v, Mapping) else v for k, v in both.items() if k not in NEWER_KEYS}


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_for_both(original: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that both generations read, with nothing of the machine.

    Classes and lists of tokens that transformers 5 alone knows get the names that 4 had and 5 still reads.
    """
    both = without_machine(original)
    kind = both.get("tokenizer_class")
    if kind in _TOKENIZER_CLASSES:
        both["tokenizer_class"] = _TOKENIZER_CLASSES[kind]
    if isinstance(both.get("extra_special_tokens"), list):
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both


# --- what belongs to the machine --------------------------------------------------------------------------------------


def without_machine(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same without keys that tell of the reader and values that are absolute paths, at any depth."""
    return {
        key: without_machine(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if key not in OF_THE_MACHINE and not (isinstance(value, str) and _PATH.fullmatch(value))
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
