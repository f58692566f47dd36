"""What transformers makes of a checkpoint, found on the meta device: every module and shape, no weight and no memory.

Files are written under many names: with and without the model's prefix, with buffers of old versions, experts one by
one or stacked, a further layer that predicts the token after next. transformers knows what to rename, stack and
ignore, so tensors that have shapes alone go through its own loading, and what it finds missing, left over or of
another size is what is wrong. A model of 7 billion parameters takes a fifth of a second.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from gptailor.family.checkpoint import TensorInfo, Unreadable, is_built_in

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loading:
    """What transformers says of a checkpoint's tensors, by the model's names.

    Those that it lacks, those that nothing in the model takes, and those of another shape (name, the file's, the
    model's).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    errors: tuple[str, ...] = ()


def configuration_of(config: Mapping[str, Any], folder: Path | None, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration as transformers reads it, less a wish for an implementation of attention.

    This machine may lack that one. Raises Unreadable with transformers' reason.
    """
    try:
        if is_built_in(config):
            stored = config if folder is None else PreTrainedConfig.get_config_dict(str(folder))[0]  # infinities too
            data = without_wishes(stored)
            read: PreTrainedConfig = CONFIG_MAPPING[data["model_type"]].from_dict(data)
        else:
            read = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # validators raise errors of many classes, of huggingface_hub's and of Python's own
        raise Unreadable(f"config.json: transformers cannot read it: {reason_of(error)}") from error
    if getattr(read, "rescale_every", 0):  # RWKV halves weights by their layer's number, for half precision alone
        read.rescale_every = 0
    return read


def without_wishes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without code of the folder's and without a wish for one implementation of attention."""
    data = copy.deepcopy(dict(config))
    for part in (data, *(value for value in data.values() if isinstance(value, dict))):
        for key in (*ATTENTION_KEYS, "auto_map"):
            part.pop(key, None)
    return data


def skeleton_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device. The configuration is copied. Raises Unreadable."""
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a model's constructor objects to
        raise Unreadable(f"config.json: transformers cannot make a model of it: {reason_of(error)}") from error
    return model.eval()


def load_headers(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> Loading:
    """What becomes of a checkpoint's tensors in this model (see Loading). Raises Unreadable."""
    state = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta")
        for name, info in tensors.items()
    }
    try:
        with quiet():
            opened: Any = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # tensors that cannot be stacked, say
        raise Unreadable(f"transformers cannot load its tensors: {reason_of(error)}") from error
    _, info = opened
    return Loading(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple(sorted((name, tuple(its), tuple(mine)) for name, its, mine in info["mismatched_keys"])),
        tuple(str(error) for error in info["error_msgs"]),
    )


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line: the last one of several, where validators put the cause.

    Of a package that is missing the first: what follows tells how to install it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = 0 if isinstance(error, ImportError) else -1
    return (lines[place] if lines else type(error).__name__)[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, warnings or reports on a model that is only looked at."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
