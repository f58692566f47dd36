"""Stitched models for everybody else: a plain Hugging Face folder that needs nothing of this project.

A stitched model is a live transformers model whose configuration was kept in step, so transformers itself saves it;
merges and output scales are already in its tensors. What stands beside the weights is the base's own, and configuration
keys are written for both generations of transformers. What is written is proven before it is handed over: the folder
is loaded as a stranger would load it, and must tokenise as the base does and give the engine's logits; read a second
time with the keys of transformers 4 alone, it must give them again.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.checkpoint import read_json
from gptailor.family.models import Family, without_progress_bars
from gptailor.formats.companions import copy_companions, tokenizer_difference, write_json
from gptailor.formats.generations import for_both, older
from gptailor.formats.widths import in_one_width
from gptailor.plan import BASE, StitchPlan
from gptailor.stitch.stitcher import Stitcher
from gptailor.trial import Score
from gptailor.wording import gigabytes

CONFIG, PLAN_FILE = "config.json", "gptailor_plan.json"
OLDER_NOTE = "transformers 4, and tools built on it, may read its configuration as another model's: it has no keys for"
MAX_SHARD = "5GB"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits that a reloaded model may show, relative to the largest logit."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its model's size, and how far its logits are from the engine's (0 is equal).

    notes: what other tools cannot read of it, a sentence each.
    """

    folder: Path
    n_layers: int
    n_parameters: int
    n_bytes: int
    max_difference: float
    notes: tuple[str, ...] = ()


def export_hf(
    family: Family,
    plan: StitchPlan,
    out_dir: str | Path,
    *,
    stitcher: Stitcher | None = None,
    title: str = "Stitched model",
    scores: Sequence[Score] = (),
    facts: Mapping[str, str] | None = None,
    progress: Progress = lambda _step, _share: None,
) -> Export:
    """Write the plan's model as a plain Hugging Face folder, reload it and compare logits.

    The family's model is the plan's afterwards.

    scores and facts go into the model card. The folder appears when it is complete and proven, never before; one with
    something in it is left alone. progress: called with what is done now and the share of the work that is done.
    Raises UserError.
    """
    out = Path(out_dir).expanduser()
    stitcher = stitcher or Stitcher(family)
    refuse_folder(out)
    if any(type(part).__module__.startswith("transformers_modules") for part in (family.model, family.tokenizer)):
        raise UserError("export: the base runs code of its own (trust_remote_code), which is not written anywhere")
    partial = None
    progress("stitching", 0.0)
    expected = _logits(stitcher.stitch(plan), family)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with in_one_width(stitcher, plan) as (model, widths):
            size = sum(p.numel() for p in model.parameters())
            n_bytes = size * family.dtype.itemsize
            _refuse_small_disk(out.parent, n_bytes)
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
            progress("writing weights", 0.1)
            _save(model, partial, family)
        write_json(partial / PLAN_FILE, plan.to_json())
        progress("loading it again", 0.6)
        difference, notes = _prove(partial, family, expected)
        notes += (*widths, *_pattern_notes(family))
        card = model_card(family, plan, size, title=title, scores=scores, facts=facts or {}, notes=notes)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp keeps others out; a finished folder is an ordinary one
        partial.rename(out)  # an empty folder gives way
    except (OSError, SafetensorError) as error:  # a disk that is full is either
        raise UserError(f"export: {out} could not be written: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    progress("done", 1.0)
    return Export(out, len(plan.kept), size, n_bytes, difference, notes)


def refuse_folder(out: Path) -> None:
    """Raise UserError where an export to this folder would fail or harm what is there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"export: {out} is a file; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        held = "an earlier export" if (out / PLAN_FILE).is_file() else "other things"
        raise UserError(f"export: {out} holds {held} already; name a folder that is new or empty")


def _refuse_small_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes * 1.02 + (64 << 20):
        raise UserError(f"export: {folder} has {gigabytes(free)} free, the model needs {gigabytes(n_bytes)}")


def _save(model: PreTrainedModel, folder: Path, family: Family) -> None:
    """Weights and configuration as transformers saves them, in both spellings, and the base's own files beside them."""
    settings, model.generation_config = model.generation_config, GenerationConfig()  # one that is odd is not written
    try:
        with without_progress_bars():
            model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    finally:
        model.generation_config = settings
    written = read_json(folder / CONFIG)
    original = _same_part(read_json(family.folder / CONFIG), written["model_type"])
    write_json(folder / CONFIG, for_both(written, model.config, original))
    copy_companions(family.folder, folder, family.tokenizer)


def _same_part(original: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """The part of the base's configuration that is of this type: all of it, or the text's of several media."""
    text = original.get("text_config")
    parts = [original, *([text] if isinstance(text, Mapping) else [])]
    return next((part for part in parts if part.get("model_type") == model_type), {})


@torch.inference_mode()
def _logits(model: PreTrainedModel, family: Family) -> torch.Tensor:
    """Logits of a fixed batch, float32 on the host: 2 sequences of 32 tokens spread over the vocabulary."""
    n_tokens = min(len(family.tokenizer), family.preflight.vocab_size)
    ids = (torch.arange(64) * 7919 % n_tokens).reshape(2, 32).to(family.device)
    return model(ids, use_cache=False).logits.float().cpu()


def _prove(folder: Path, family: Family, expected: torch.Tensor) -> tuple[float, tuple[str, ...]]:
    """Load the folder as anybody would and compare its tokens and logits.

    How far these are off, and what transformers 4 cannot read. Raises RuntimeError: a fault of ours, no user's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (differs := tokenizer_difference(family.tokenizer, AutoTokenizer.from_pretrained(folder))) is not None:
        raise RuntimeError(f"the exported tokenizer is not the base's: they differ on {differs}")
    with without_progress_bars():
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=family.dtype, output_loading_info=True)
    model, info = opened
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"the exported model does not load completely: {info}")
    bound = TOLERANCE.get(family.dtype, 1e-4) * float(expected.abs().max().clamp(min=1.0))
    difference = float((_logits(model.eval().to(family.device), family) - expected).abs().max())
    if not difference <= bound:
        raise RuntimeError(f"the exported model's logits differ from the engine's by up to {difference:.3g}")
    again = _older_reading(model, folder, family)
    if again is None or not float((again - expected).abs().max()) <= bound:
        return difference, (f"{OLDER_NOTE} {model.config.model_type}.",)
    return difference, ()


def _older_reading(model: PreTrainedModel, folder: Path, family: Family) -> torch.Tensor | None:
    """Logits of the same weights under the configuration's older keys alone; None where they make no such model."""
    try:
        config = type(model.config).from_dict(older(read_json(folder / CONFIG)))
        with without_progress_bars():
            again = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=family.dtype)
        return _logits(again.eval().to(family.device), family)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError):
        return None  # whatever a class makes of keys that it was not written for: it is told, not raised


def _pattern_notes(family: Family) -> tuple[str, ...]:
    """A sentence for each list of one entry a layer that no longer begins as the base's does."""
    config = family.model.config.get_text_config()
    kept = {name: (values, list(getattr(config, name))) for name, values in family.per_layer_lists.items()}
    return tuple(
        f"Its layers no longer follow the base's pattern; `{name}` in {CONFIG} says which is which "
        f"({', '.join(map(str, mine))}). A tool that takes the pattern from the architecture's name, as llama.cpp does "
        "for Gemma 2 and 3, computes another model."
        for name, (values, mine) in kept.items()
        if mine != list(values[: len(mine)])
    )


def model_card(
    family: Family,
    plan: StitchPlan,
    n_parameters: int,
    *,
    title: str,
    scores: Sequence[Score],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """The folder's README.md: what it is, where each layer comes from, what it scored, whose licences apply."""
    used = [BASE, *(name for name in family.names if name in plan.candidates)]
    labels = {name: family.label(name) for name in used}
    licences = {name: family.preflight.licences.get(name, "not stated") for name in used}
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gptailor"]}
    hub_ids = [label for label in labels.values() if "/" in label]
    if hub_ids:
        front["base_model"] = hub_ids
    if len(set(licences.values())) == 1 and "not stated" not in licences.values():
        front["license"] = licences[BASE]
    dense = family.preflight.n_parameters
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {as_text(title)}",
        "",
        f"A {'shorter' if plan.removed else 'smaller'} model of the family of {as_text(labels[BASE])}: "
        f"{len(plan.kept)} of {plan.n_layers} layers, "
        f"{n_parameters:,} of {dense:,} parameters ({n_parameters / dense:.1%}). Embeddings, final norm and output "
        "head are the base's.",
        "",
        "## Layers",
        "",
        as_text(plan.describe()),
        "",
        f"Layer numbers count in the base. The whole plan is in `{PLAN_FILE}`.",
        "",
        "## Sources and their licences",
        "",
        "| name | model | licence |",
        "|---|---|---|",
        *(f"| {as_text(name)} | {as_text(labels[name])} | {as_text(licences[name])} |" for name in used),
        "",
        "All of these licences apply to this model.",
    ]
    if scores:
        lines += [
            "",
            "## Scores",
            "",
            "| benchmark | metric | score | standard error | examples | used in the search |",
        ]
        lines += ["|---|---|---|---|---|---|", *map(_score_row, scores)]
    if notes:
        lines += ["", "## With other tools", "", *(f"- {as_text(note)}" for note in notes)]
    if facts:
        lines += ["", "## How it was found", ""]
        lines += [f"- {as_text(name)}: {as_text(value)}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _score_row(score: Score) -> str:
    error = "" if score.stderr is None else f"{score.stderr:.4f}"
    used = "yes" if score.is_objective else "no"
    name, metric = as_text(score.benchmark), as_text(score.metric)
    return f"| {name} | {metric} | {score.score:.4f} | {error} | {score.n_samples} | {used} |"


def as_text(value: str) -> str:
    """Any text as text in Markdown, in one line: no markup, HTML, link or table of the writer's survives."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~$^=@-])", r"\\\1", line)
    return re.sub(r"(?i)(https?|ftp|www)(?=[:.])", r"\1&#8203;", line)
