"""From a saved run to a model that can be used: export a configuration's plan, or let it answer beside the dense base.

Both open the family anew from the run's own run file, in a process of their own. An export works in host memory, so
that it never takes a GPU from a search.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gptailor import shipped
from gptailor.errors import UserError
from gptailor.formats.published import BaseAt, read_family, read_plan, strip_text
from gptailor.launch.events import Event, Say
from gptailor.plan import BASE, StitchPlan
from gptailor.results import worth
from gptailor.results.subjects import stored_plan, stored_subjects
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Repair
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder
from gptailor.trial import DENSE, BenchmarkKey, Score, Subject, TrialStatus
from gptailor.wording import gigabytes, now_and_then

if TYPE_CHECKING:
    from gptailor.stitch.stitcher import Stitcher

MAX_PROMPT = 8000
"""Characters."""
WARM_UP_TOKENS = 2


def export_model(
    folder: RunFolder,
    config_id: int,
    out: Path,
    say: Say,
    *,
    push: str | None = None,
    dry_run: bool = False,
    repair: Repair | None = None,
) -> None:
    """Write a configuration's model as a plain Hugging Face folder `out`; it appears when complete and proven.

    say: called with each step and its share. push: OWNER/NAME on the hub to send it to; an export of the same plan that
    is at `out` already is sent as it is. dry_run: only list what would be sent. repair: done to the plan before; the
    card then has no scores, as those are of the plan without it. Raises UserError.
    """
    from gptailor.formats import hub
    from gptailor.scoring.provenance import refuse_other_models, stale_scores

    if push is not None:
        hub.refuse_name(push)
    tables = queries.read_run(folder)
    plan = stored_plan(tables, config_id)
    spec = spec_of(folder)
    if old := refuse_other_models(folder, spec, plan.candidates):
        say(Event(old))
    stale = stale_scores(folder, spec, lambda text: say(Event(text)))
    if push is None or repair is not None or stale or not _is_export_of(out, plan):
        fresh = _without(tables, spec, stale)
        scores = scores_of(fresh, config_id) if repair is None else []
        facts = facts_of(fresh, spec, config_id)
        title = f"{spec.name}: "
        write_model(spec, plan, out, say, folder=folder, repair=repair, title=title, scores=scores, facts=facts)
    if push is None:
        return
    for name, size in hub.uploads(out):
        say(Event(f"{'would send' if dry_run else 'sends'} {name} ({size:,} bytes)"))
    say(Event(f"nothing was sent to {push}" if dry_run else hub.push(out, push)))


def _is_export_of(out: Path, plan: StitchPlan) -> bool:
    """Is this plan's export there already?"""
    from gptailor.formats.huggingface import PLAN_FILE

    try:
        return StitchPlan.from_json(json.loads((out / PLAN_FILE).read_text(encoding="utf-8"))) == plan
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False


def export_mergekit(folder: RunFolder, config_id: int, out: Path, say: Say) -> None:
    """Write a configuration's plan as a YAML file for mergekit, naming the models as the run file does.

    Raises UserError where mergekit cannot express the plan.
    """
    from gptailor.scoring.provenance import refuse_other_models

    plan = stored_plan(queries.read_run(folder), config_id)
    if out.exists():
        raise UserError(f"export: {out} is there already; name a file that is not")
    spec = spec_of(folder)
    if old := refuse_other_models(folder, spec, plan.candidates):  # the file names them by their places
        say(Event(old))
    text = _mergekit_text(spec, plan)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"export: {out} could not be written: {error}") from error
    say(Event(f"{out}: build it with  mergekit-yaml {out} FOLDER", result={"file": str(out)}))


def _mergekit_text(spec: RunSpec, plan: StitchPlan) -> str:
    from gptailor.family.models import open_family
    from gptailor.family.preflight import inspect_family
    from gptailor.formats.mergekit import LINEAR_FILTERS, mergekit_yaml

    found = inspect_family(spec, download=True)
    base = location(spec.base_model)
    models = {BASE: base}
    for name in (name for name in spec.candidates if name in plan.candidates):
        where = location(spec.candidates[name])
        # mergekit's way to say adapter
        models[name] = f"{base}+{where}" if found.checkpoints[name].is_adapter else where
    projections = LINEAR_FILTERS
    if any(choice.output_scale != 1.0 for choice in plan.kept):
        attention, mlp = open_family(spec.model_copy(update={"device": "cpu"})).output_projections
        projections = (attention.rpartition(".")[2], mlp.rpartition(".")[2])
    return mergekit_yaml(plan, models, dtype=found.preflight.dtype, projections=projections)


def location(named: str) -> str:
    """A folder's full path, as mergekit may run elsewhere; a hub id as it is."""
    path = shipped.find(named)
    return str(path.resolve()) if path.is_dir() else named


def stitch_plan(
    plan_file: str,
    family_file: str,
    out: Path,
    say: Say,
    *,
    base_at: BaseAt = "source",
    repair: Repair | None = None,
) -> None:
    """Write the model of a plan's file as a plain Hugging Face folder, proven as exports are. Raises UserError."""
    spec = read_family(family_file)
    if repair is not None and "objectives" in repair.texts.split("+"):
        raise UserError("--texts objectives: a family file names none; give base, file:PATH or hub:DATA_SET")
    plan = read_plan(plan_file, tuple(spec.candidates), base_at)
    say(Event(strip_text(plan)))
    write_model(spec, plan, out, say, repair=repair, facts={"Plan": Path(plan_file).name})


def write_model(
    spec: RunSpec,
    plan: StitchPlan,
    out: Path,
    say: Say,
    *,
    folder: RunFolder | None = None,
    repair: Repair | None = None,
    title: str = "",
    **card: Any,
) -> None:
    """Export the plan of the family of `spec`; title begins the model card's, `card` is what else it says."""
    from gptailor.family.models import open_family
    from gptailor.formats.huggingface import export_hf, refuse_folder
    from gptailor.scoring.plan_scorer import run_texts
    from gptailor.stitch.edits.healed import HealedFolders
    from gptailor.stitch.edits.registry import refuse_repair, repair_edit
    from gptailor.stitch.stitcher import Stitcher

    refuse_folder(out)
    say(Event("opening the family", share=0.0))
    family = open_family(spec.model_copy(update={"device": "cpu"}))
    texts = run_texts(family.reader, spec, folder)
    stitcher = Stitcher(family, texts=texts, healed=HealedFolders(None if folder is None else folder.path))
    if repair is not None:
        refuse_repair(plan, "the plan", repair.method)
        say(Event("reading the texts of the repair", share=0.0))
        dense = StitchPlan.dense(family.n_layers)
        named = texts.named(repair.texts, repair.tokens_for(family.inner_size), lambda: stitcher.stitch(dense))
        plan = plan.edited(repair_edit(repair, named, spec.seed))
    if plan.edits:
        stitcher.stitch(plan, now_and_then(lambda text: say(Event(text, share=0.0))))
    done = export_hf(
        family,
        plan,
        out,
        stitcher=stitcher,
        title=f"{title}{len(plan.kept)} layers stitched from {plan.n_layers} of {family.label('base')}",
        progress=lambda step, share: say(Event(step, share=share)),
        **card,
    )
    text = (
        f"{done.folder}: {done.n_layers} layers, {done.n_parameters:,} parameters, {gigabytes(done.n_bytes)}; "
        f"reloaded, its logits differ from the engine's by at most {done.max_difference:.2g}"
    )
    for note in done.notes:
        say(Event(f"note: {note}"))
    say(Event(text, result=asdict(done) | {"folder": str(done.folder)}))


# --- what the store knows of a configuration --------------------------------------------------------------------------


def _without(tables: queries.RunTables, spec: RunSpec, stale: set[BenchmarkKey]) -> queries.RunTables:
    """The tables without scores of these benchmarks."""
    if not stale:
        return tables
    names = {one.name for one in spec.objectives if (one.key, one.metric, one.split) in stale}
    scores, judged = tables.scores, tables.evaluations
    keys = judged[["benchmark", "metric", "split"]].itertuples(index=False, name=None)
    return replace(
        tables,
        scores=scores[~(scores.benchmark + "/" + scores.metric).isin(names)],
        evaluations=judged[pd.Series([key not in stale for key in keys], index=judged.index, dtype=bool)],
    )


def scores_of(tables: queries.RunTables, config_id: int) -> list[Score]:
    """Its scores at the highest budget it reached, then those of evaluations, the ones first that chose it.

    `is_objective` says of each whether it had a part in the choice: scores of the objectives and of the selection have.
    """
    trials = tables.trials
    mine = trials[(trials.config_id == config_id) & (trials.status == TrialStatus.SUCCESS)].sort_values("budget")
    searched = tables.scores[tables.scores.trial_id == mine.trial_id.iloc[-1]] if len(mine) else tables.scores.head(0)
    subject = stored_subjects(tables)[config_id]
    judged = tables.evaluations[tables.evaluations.subject == str(subject)]
    keys = list(judged[["benchmark", "metric", "split"]].itertuples(index=False, name=None))
    objectives, choosers = ({one.key for one in asked} for asked in (tables.spec.objectives, tables.spec.selection))
    known = objectives if len(searched) else set()  # a baseline's are stored as a trial's and as a subject's
    used, twice = (
        pd.Series([key in among for key in keys], index=judged.index, dtype=bool)
        for among in (objectives | choosers, known)
    )
    rows = _with_split(judged, used)[~twice].sort_values("is_objective", ascending=False, kind="stable")
    return [*_scores(searched), *_scores(rows)]


def facts_of(tables: queries.RunTables, spec: RunSpec, config_id: int) -> dict[str, str]:
    """How it was found, for the model card."""
    trials = tables.trials
    facts = {
        "Run": f"{spec.name} ({tables.run_id}), configuration {config_id}, seed {spec.seed}",
        "Trials": f"{len(trials)}, of which {int((trials.status == TrialStatus.SUCCESS).sum())} succeeded, on rungs of "
        f"{', '.join(map(str, spec.budget.rungs))} examples a benchmark",
    }
    dense = tables.evaluations[tables.evaluations.subject == str(DENSE)].sort_values("n_samples")
    dense = dense.drop_duplicates(["benchmark", "metric", "split"], keep="last")
    for score in _scores(_with_split(dense)):
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        facts[f"Dense base on {score.name}"] = f"{score.score:.4f}{error} ({score.n_samples} examples)"
    for row in worth.of_plan(tables, config_id).itertuples(index=False):
        name, ratio, value, dense, device = row
        facts[f"{name}, beside the dense base"] = f"{ratio} ({value} beside {dense}; {device})"
    made_with = tables.versions.items()
    facts["Made with"] = ", ".join(f"{name} {version}" for name, version in made_with if name != "device")
    return {name: value for name, value in facts.items() if value}


def _with_split(evaluations: pd.DataFrame, used: pd.Series | bool = False) -> pd.DataFrame:
    """Rows of `evaluations` as rows of `scores`, the split in the benchmark's name. used: in the choice of a plan."""
    return evaluations.assign(is_objective=used, benchmark=evaluations.benchmark + " (" + evaluations.split + ")")


def _scores(rows: pd.DataFrame) -> Iterator[Score]:
    for row in rows.itertuples():
        error = None if pd.isna(row.stderr) else float(row.stderr)
        yield Score(
            str(row.benchmark),
            str(row.metric),
            float(row.score),
            error,
            int(row.n_samples),
            bool(row.higher_is_better),
            bool(row.is_objective),
        )


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model wrote. memory: bytes of its weights and of what generating added to them."""

    subject: str
    text: str
    prompt: str
    n_tokens: int
    seconds: float
    tokens_per_second: float
    memory: int
    n_layers: int
    n_parameters: int


def generate(
    folder: RunFolder,
    config_id: int,
    prompt: str,
    say: Say,
    *,
    max_tokens: int = 64,
    device: str | None = None,
    chat: bool = True,
) -> None:
    """Let the dense base and a configuration's model continue a prompt, greedily.

    `say` is told each step, and an Answer of each as a result.

    chat: put the prompt into the tokenizer's chat template where it has one. device: another than the run's. Raises
    UserError.
    """
    if not prompt.strip() or len(prompt) > MAX_PROMPT:
        raise UserError(f"prompt: must have 1 to {MAX_PROMPT} characters, got {len(prompt)}")
    if not 1 <= max_tokens <= 2048:
        raise UserError(f"tokens: must be 1 to 2048, got {max_tokens}")
    tables = queries.read_run(folder)
    plan, who = stored_plan(tables, config_id), stored_subjects(tables)[config_id]
    spec = spec_of(folder, [f"device={device}"] if device is not None else [])
    from gptailor.scoring.provenance import refuse_other_models

    if old := refuse_other_models(folder, spec, plan.candidates):
        say(Event(old))
    say(Event("opening the models"))
    from gptailor.family.models import open_family
    from gptailor.scoring.plan_scorer import run_texts
    from gptailor.stitch.edits.healed import HealedFolders
    from gptailor.stitch.stitcher import Stitcher

    family = open_family(spec)
    texts = run_texts(family.reader, spec, folder)
    stitcher = Stitcher(family, texts=texts, healed=HealedFolders(folder.path))
    for subject, chosen in ((DENSE, StitchPlan.dense(family.n_layers)), (who, plan)):
        name = "the dense base" if subject == DENSE else f"plan {config_id}"
        say(Event(f"{name} writes"))
        answer = _answer(stitcher, chosen, subject, prompt, max_tokens, chat)
        say(Event(f"{answer.text.strip()}\n({answer.n_tokens} tokens, {answer.seconds:.1f} s)", result=asdict(answer)))


def _answer(stitcher: Stitcher, plan: StitchPlan, subject: Subject, prompt: str, max_tokens: int, chat: bool) -> Answer:
    import torch

    from gptailor.evaluate.examples import chat_renderer
    from gptailor.family.spread import devices_of

    family = stitcher.family
    model, tokenizer = stitcher.stitch(plan), family.tokenizer
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = chat_renderer(tokenizer, family.spec.chat_template_args)(turn)
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(family.device)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and ids.shape[1] + max_tokens > window:
        raise UserError(f"prompt: its {ids.shape[1]} tokens and {max_tokens} new ones exceed the model's {window}")

    generator: Any = model  # the mixin's type is unknown to type checkers

    def write(tokens: int) -> Any:
        with torch.inference_mode():
            return generator.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                return_dict_in_generate=True,
            )

    write(WARM_UP_TOKENS)  # mapped weights are read from disk on their first use
    gpus = [device for device in devices_of(model) if device.type == "cuda"]
    before = sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    started = time.monotonic()
    written = write(max_tokens)
    seconds = time.monotonic() - started
    peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    grown = peak - before if gpus else _cache_bytes(written.past_key_values)
    new = written.sequences[0, ids.shape[1] :]
    return Answer(
        subject=str(subject),
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt=prompt,
        n_tokens=len(new),
        seconds=round(seconds, 4),
        tokens_per_second=round(len(new) / max(seconds, 1e-9), 2),
        memory=stitcher.n_bytes(plan) + grown,
        n_layers=len(plan.kept),
        n_parameters=stitcher.n_parameters(plan),
    )


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that generating kept; 0 where the model keeps them in a form of its own."""
    layers = getattr(cache, "layers", ())
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
