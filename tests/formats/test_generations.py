"""Keys for both generations: every class of transformers reads its own configuration back, whatever stands beside."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gptailor.formats.generations import for_both, named_once, older, tokenizer_for_both

ONLY_NEW = {
    *("beam", "deepseek_v4", "dory", "dots3_note_text", "gemma4_text", "gemma4_unified_text", "laguna", "lfm3"),
    *("mellum", "mimo_v2_flash", "ministral3", "zaya"),
}
"""Classes that transformers 4 does not have, and whose older keys transformers 5 does not read as its own."""
READ_WRONGLY_BY_5 = ["olmo3"]
"""transformers 5 takes the older `rope_theta` for one of two kinds of layers; transformers 4 has one for both."""


def moved(value: Any) -> Any:
    """The same positions with no number at its default."""
    if not isinstance(value, dict):
        return value
    numbers = {"rope_theta": lambda n: n + 1234.0, "partial_rotary_factor": lambda n: n / 2}
    return {k: numbers[k](v) if k in numbers and v else moved(v) for k, v in value.items()}


def as_written(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=True))


def test_every_class_reads_its_positions_from_both_spellings() -> None:
    unlike, n_tried = [], 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = CONFIG_MAPPING[model_type]
        try:
            plain = as_written(kind())
            config = kind.from_dict(plain | {"rope_parameters": moved(plain.get("rope_parameters"))})
        except (StrictDataclassError, ValueError):
            continue  # has no defaults that it accepts itself
        written = as_written(config)
        if not isinstance(written.get("rope_parameters"), dict):
            continue
        n_tried += 1
        both = for_both(written, config, {})
        again = as_written(kind.from_dict(deepcopy(both)))
        wanted = named_once(written["rope_parameters"])
        assert named_once(again["rope_parameters"]) == wanted, model_type
        if named_once(kind.from_dict(older(both)).to_dict().get("rope_parameters")) != wanted:
            unlike.append(model_type)
    assert n_tried > 100
    assert sorted(set(unlike) - ONLY_NEW) == READ_WRONGLY_BY_5


def test_nothing_of_the_machine_is_left() -> None:
    told = {
        "local_files_only": True,
        "name_or_path": "ada/base",
        "vocab_file": "/home/ada/vocab.json",
        "inner": {"_name_or_path": "x", "merges_file": "C:\\Users\\ada\\merges.txt", "kept": "a/b"},
        "eos_token": "</s>",
        "unk_token": "/",
    }
    assert tokenizer_for_both(told) == {"inner": {"kept": "a/b"}, "eos_token": "</s>", "unk_token": "/"}
