"""Stitched models for everybody else: a plain Hugging Face folder that needs nothing of this project.

A stitched model is a live transformers model whose configuration was kept in step, so transformers itself saves it;
merges and output scales are already in its tensors. What is written is proven before it is handed over: the folder is
loaded as a stranger would load it, and must give the engine's logits.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from gptailor.errors import UserError
from gptailor.family.models import Family, without_progress_bars
from gptailor.plan import BASE, StitchPlan
from gptailor.stitch.stitcher import Stitcher
from gptailor.trial import Score

PLAN_FILE = "gptailor_plan.json"
MAX_SHARD = "5GB"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits that a reloaded model may show, relative to the largest logit."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its model's size, and how far its logits are from the engine's (0 is equal)."""

    folder: Path
    n_layers: int
    n_parameters: int
    n_bytes: int
    max_difference: float


def export_hf(
    family: Family,
    plan: StitchPlan,
    out_dir: str | Path,
    *,
    stitcher: Stitcher | None = None,
    title: str = "Stitched model",
    scores: Sequence[Score] = (),
    facts: Mapping[str, str] | None = None,
    progress: Progress = lambda step, share: None,
) -> Export:
    """Write the plan's model as a plain Hugging Face folder, reload it and compare logits; the family's model is the
    plan's afterwards.

    scores and facts go into the model card. The folder appears when it is complete and proven, never before; one with
    something in it is left alone. progress: called with what is done now and the share of the work that is done.
    Raises UserError.
    """
    out = Path(out_dir).expanduser()
    stitcher = stitcher or Stitcher(family)
    refuse_folder(out)
    if family.spec.trust_remote_code and type(family.model).__module__.startswith("transformers_modules"):
        raise UserError("export: the base runs code of its own (trust_remote_code), which is not written anywhere")
    partial = None
    progress("stitching", 0.0)
    model = stitcher.stitch(plan)
    expected = _logits(model, family)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _refuse_small_disk(out.parent, stitcher.n_bytes(plan))
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        progress("writing weights", 0.1)
        with without_progress_bars():
            model.save_pretrained(partial, max_shard_size=MAX_SHARD)
        family.tokenizer.save_pretrained(partial)
        (partial / PLAN_FILE).write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")
        card = model_card(family, plan, stitcher.n_parameters(plan), title=title, scores=scores, facts=facts or {})
        (partial / "README.md").write_text(card, encoding="utf-8")
        progress("loading it again", 0.6)
        difference = _prove(partial, family, expected)
        partial.chmod(0o755)  # mkdtemp keeps others out; a finished folder is an ordinary one
        partial.rename(out)  # an empty folder gives way
    except OSError as error:
        raise UserError(f"export: {out} could not be written: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    progress("done", 1.0)
    return Export(out, len(plan.kept), stitcher.n_parameters(plan), stitcher.n_bytes(plan), difference)


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
        raise UserError(f"export: {folder} has {free >> 20} MB free, the model needs {n_bytes >> 20} MB")


@torch.inference_mode()
def _logits(model: Any, family: Family) -> torch.Tensor:
    """Logits of a fixed batch, float32 on the host: 2 sequences of 32 tokens spread over the vocabulary."""
    n_tokens = min(len(family.tokenizer), family.preflight.vocab_size)
    ids = (torch.arange(64) * 7919 % n_tokens).reshape(2, 32).to(family.device)
    return model(ids, use_cache=False).logits.float().cpu()


def _prove(folder: Path, family: Family, expected: torch.Tensor) -> float:
    """Load the folder as anybody would and compare its logits. Raises RuntimeError: a fault of ours, no user's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    with without_progress_bars():
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=family.dtype, output_loading_info=True)
    model, info = opened
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"the exported model does not load completely: {info}")
    found = _logits(model.eval().to(family.device), family)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE.get(family.dtype, 1e-4) * float(expected.abs().max().clamp(min=1.0)):
        raise RuntimeError(f"the exported model's logits differ from the engine's by up to {difference:.3g}")
    return difference


def model_card(
    family: Family,
    plan: StitchPlan,
    n_parameters: int,
    *,
    title: str,
    scores: Sequence[Score],
    facts: Mapping[str, str],
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
        f"A shorter model of the family of {as_text(labels[BASE])}: {len(plan.kept)} of {plan.n_layers} layers, "
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
