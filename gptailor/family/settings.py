"""What two configurations say of the arithmetic of their layers, whichever way they spell it or leave it to defaults.

transformers reads both: a `rope_theta` at the top or among the rope parameters, a missing epsilon and the default one
are then the same. What belongs to the whole model, to training or to the file is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from gptailor.family.checkpoint import Checkpoint, Unreadable, is_built_in
from gptailor.family.skeleton import configuration_of

ELSEWHERE = re.compile(
    r"vocab|token_id|token_index|dtype|transformers_version|architectures|name_or_path|use_cache|initializer|dropout|"
    r"output_|return_dict|tie_word|max_position|model_max|label|problem_type|pretraining_tp|^model_type|chunk_size_feed|"
    r"aux_|task_specific|summary_|^pad_|is_encoder|is_decoder|classifier|auto_map|quantization|attn_implementation|"
    r"logit|cross_attention|image|vision|audio|tokenizer|n_positions|n_ctx|num_nextn|unsloth|^_|torchscript|base_model|"
    r"pdrop|layerdrop|finetuning|prefix"
)
SHAPING = re.compile(
    r"^(num_attention_heads|n_head|num_heads|num_key_value_heads|head_dim|hidden_act(ivation)?|activation_function)$"
)
"""Settings without which a layer computes nothing that its weights were made for."""


def differing_settings(base: Checkpoint, candidate: Checkpoint) -> Iterator[tuple[str, Any, Any, bool]]:
    """(setting, the candidate's value, the base's, whether the layers cannot work with the base's).

    Raises Unreadable where transformers cannot read one of the two.
    """
    mine, its = _read(_Key(base)), _read(_Key(candidate))
    for key in sorted({*mine, *its}):
        a, b = mine.get(key), its.get(key)
        if not ELSEWHERE.search(key.rpartition(".")[2]) and not _same(a, b):
            yield key.rpartition(".")[2], b, a, bool(SHAPING.search(key))


class _Key:
    """A checkpoint, known by its place in the run file and its configuration."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __hash__(self) -> int:
        return id(self.checkpoint.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.checkpoint.config is self.checkpoint.config


@lru_cache(maxsize=32)
def _read(key: _Key) -> dict[str, Any]:
    """Settings of the language model, flat: 'rope_parameters.rope_theta'. Raises Unreadable.

    Empty where only the folder's own code could read them.
    """
    checkpoint = key.checkpoint
    if not is_built_in(checkpoint.config):
        return {}
    part = checkpoint.config.get("text_config")
    if part and not isinstance(part, Mapping):
        raise Unreadable(f"config.json: text_config is {part!r}, where a record is expected")
    config = configuration_of(checkpoint.config, checkpoint.folder, trust_remote_code=False)
    return dict(_flat(config.get_text_config().to_dict()))


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(a: Any, b: Any) -> bool:
    return (
        a == b
        or (not a and not b)
        or (isinstance(a, list | tuple) and isinstance(b, list | tuple) and list(a) == list(b))
    )
