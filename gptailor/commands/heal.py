"""Heal a plan: a short distillation of its model from a dense one, written as a plain folder and kept as a subject.

Everything that needs the run is done here (whose plan, which texts, what must not be among them, the selection split,
the store); the training itself is in gptailor/heal/. What was begun is in a folder beside `out` until it is done, so
that the same command goes on after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError

from gptailor.commands.subjects import find_subjects, plans_of
from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.evaluate.unseen import Unseen
from gptailor.family.spread import devices_of
from gptailor.formats.huggingface import export_hf, refuse_folder
from gptailor.heal.asked import HealAsked, count_text
from gptailor.heal.batches import Batch, batches_of
from gptailor.heal.cost import Sizes, heal_bytes
from gptailor.heal.teaching import kept_bytes
from gptailor.launch.engine import EngineLock, is_alive
from gptailor.launch.events import Event, Say
from gptailor.launch.signals import stop_on_signal
from gptailor.measures import gain
from gptailor.plan import Edit, StitchPlan, Texts
from gptailor.results.subjects import stored_plans
from gptailor.results.summary import summarise
from gptailor.scoring.plan_scorer import SELECTION_EXAMPLES, PlanScorer
from gptailor.scoring.provenance import refuse_other_models
from gptailor.spec.run import RunSpec
from gptailor.stitch.edits.case import most_kept
from gptailor.stitch.edits.healed import HealedFolders, Tensors, digest_of
from gptailor.stitch.edits.registry import HEALED as HEALED_EDIT
from gptailor.stitch.edits.registry import healed_subject, makes_zeros
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.store.writer import RunWriter
from gptailor.trial import HEALED, Subject, next_number
from gptailor.wording import duration, gigabytes, now_and_then, plural, size

if TYPE_CHECKING:
    from gptailor.heal.distil import Distilled
    from gptailor.heal.student import Student

ALL_EXAMPLES = None
"""Of the benchmarks whose rows must not be among the texts."""


def heal(folder: RunFolder, who: str, out: Path, asked: HealAsked, say: Say, device: str | None = None) -> bool:
    """Heal the plan of a subject (`12`, `config:12`, `baseline:sleb@math`) and write it as a plain folder `out`.

    False where it was asked to stop before its end: the same call goes on. Raises UserError.
    """
    out = Path(out).expanduser()
    _join_processes()
    refuse_folder(out)
    if _is_main() and is_alive(folder):
        raise UserError(f"run {folder.run_id}: its engine is at work; heal its plans when it has ended")
    name = f"config:{who}" if who.isdigit() else who
    spec = spec_of(folder, _device(device))
    chosen = find_subjects(folder, [name])
    if len(chosen) != 1 or chosen[0].subject.kind in ("dense", "candidate"):
        raise UserError(f"heal {who}: must be one shorter plan: a configuration's number, or baseline:NAME[@CANDIDATE]")
    say = say if _is_main() else lambda _event: None
    say(Event("opening the family and the selection split", share=0.0))
    scorer = PlanScorer.open(spec, spec.selection, SELECTION_EXAMPLES, folder)
    scorer.known = queries.load_examples(folder)
    scorer.told = scorer.texts.told = now_and_then(lambda text: say(Event(text, share=0.0)))
    (((one, plan),)) = plans_of(chosen, scorer, spec)
    if old := refuse_other_models(folder, spec, {*plan.candidates, asked.teacher or most_kept(plan)}):
        say(Event(old))
    if zeros := [edit.method for edit in plan.edits if makes_zeros(edit)]:
        raise UserError(f"heal {who}: {zeros[0]} made zeros of single weights, which training would fill again")
    if len(devices_of(scorer.family.model)) > 1:
        raise UserError(f"heal {who}: the base is spread over several GPUs; one must hold it, or --device cpu")
    return Healer(folder, spec, scorer, plan, one.subject, out, asked, say).run()


def _device(asked: str | None) -> list[str]:
    """What changes in the run file: a device, or one of several GPUs, where accelerate started several processes."""
    if asked is not None:
        return [f"device={asked}"]
    if (rank := os.environ.get("LOCAL_RANK")) is None:
        return []
    return [f"device=cuda:{rank}" if torch.cuda.is_available() else "device=cpu"]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _join_processes() -> None:
    """Where `accelerate launch` started several, they wait for each other, and for texts that one writes, long."""
    if "WORLD_SIZE" in os.environ:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def _wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@dataclass
class Healer:
    """One heal of one plan. before: the subject that it was. named: its texts, once they are read."""

    folder: RunFolder
    spec: RunSpec
    scorer: PlanScorer
    plan: StitchPlan
    before: Subject
    out: Path
    asked: HealAsked
    say: Say
    named: Texts | None = None

    @property
    def work(self) -> Path:
        """Where texts and checkpoints are until the heal is done."""
        return self.out.parent / f".{self.out.name}.heal"

    @property
    def teacher(self) -> str:
        return self.asked.teacher or most_kept(self.plan)

    @property
    def dense(self) -> StitchPlan:
        """The teacher's plan."""
        return StitchPlan.dense(self.plan.n_layers, self.teacher)

    def run(self) -> bool:
        """Everything; a signal before the training ends the process at once, as there is nothing to keep yet."""
        from gptailor.heal.distil import distil
        from gptailor.heal.student import Student

        self.scorer.family.layer(0, self.teacher)  # an unknown one is refused before anything is written
        self._begin()
        texts, left_out = self._texts()
        batches = batches_of(texts, self.asked.tokens, self.asked.seed)
        stitcher = self.scorer.stitcher
        in_bfloat16 = computes_faster_in_bfloat16(self.scorer.family.device)
        student = Student(stitcher.stitch(self.plan, self.scorer.told), self.asked.lora, self.asked.seed, in_bfloat16)
        self._say_memory(student, batches, in_bfloat16)
        before = self._judge(None) if self.spec.selection else None
        teacher = stitcher.stitch(self.dense)
        with stop_on_signal() as stop, self._said_plainly():
            found = distil(
                student,
                teacher,
                batches,
                self.work,
                rate=self.asked.peak_rate,
                seed=self.asked.seed,
                minutes=self.asked.minutes,
                in_bfloat16=in_bfloat16,
                should_stop=stop.is_set,
                say=lambda text, share: self.say(Event(text, share=share)),
                judge=self._judge if self.spec.selection else None,
            )
        if not found.is_whole:
            self.say(Event(f"stopped at step {found.steps} of {found.asked_steps}; the same command goes on"))
            return False
        if _is_main():
            self._finish(found, left_out, before)
        _wait_for_all()
        return True

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """What training can die of as one sentence."""
        from gptailor.heal.distil import Diverged

        try:
            yield
        except (Diverged, NonFinite) as error:
            raise UserError(
                f"heal: {error}; give a lower --rate than {self.asked.peak_rate:g}, and remove {self.work}"
            ) from error
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"heal: {self.work} cannot be written: {error}; make room there, and the same command goes on"
            ) from error

    def _begin(self) -> None:
        """The folder beside `out`, new or of this very heal. Raises UserError."""
        wanted = self.asked.to_json() | {"plan": self.plan.hash, "minutes": None}  # more or less time may be given
        note = self.work / "asked.json"
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != wanted:
            raise UserError(
                f"heal: {self.work} holds the beginning of another heal; go on with that one, remove the folder, or "
                "name another OUT"
            )
        if _is_main():
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                write_atomically(note, json.dumps(wanted))
            except OSError as error:
                raise UserError(f"heal: {self.work} cannot be written: {error.strerror}") from error
        _wait_for_all()

    def _texts(self) -> tuple[list[list[int]], int]:
        """Token ids without what is to judge, and how many texts were left out for that."""
        kept = self.work / "texts.json"
        if _is_main() and not kept.exists():
            self.say(Event("reading the texts", share=0.0))
            base = StitchPlan.dense(self.plan.n_layers)
            named = self.scorer.texts.named(
                self.asked.texts, self.asked.text_tokens, lambda: self.scorer.stitcher.stitch(base)
            )
            texts = self.scorer.texts.known[named.digest]
            unseen = Unseen(self._judges(), self.scorer.family.tokenizer)
            clean = [text for text in texts if not unseen.holds(text)]
            said = {"named": [named.source, named.n_tokens, named.digest], "all": len(texts), "texts": clean}
            write_atomically(kept, json.dumps(said, separators=(",", ":")))
        _wait_for_all()
        said = json.loads(kept.read_text(encoding="utf-8"))
        left_out = said["all"] - len(said["texts"])
        if left_out:
            self.say(Event(f"{plural(left_out, 'text')} of {said['all']} left out: they hold rows that are to judge"))
        if not any(len(text) > 1 for text in said["texts"]):
            raise UserError(f"--texts {self.asked.texts}: every text holds rows of the held-out or selection splits")
        self.named = Texts(*said["named"])
        return said["texts"], left_out

    def _judges(self) -> list[Any]:
        asked = [*self.spec.held_out, *self.spec.selection]
        return self.scorer.open_benchmarks(self.scorer.family, self.spec, asked, ALL_EXAMPLES)

    def _say_memory(self, student: Student, batches: Sequence[Batch], in_bfloat16: bool) -> None:
        family, trained = self.scorer.family, student.n_trained
        config = family.model.config.get_text_config()
        parameters = self.scorer.stitcher.n_parameters(self.plan)
        sizes = Sizes(
            len(self.plan.kept),
            config.hidden_size,
            family.inner_size,
            config.vocab_size,
            parameters if self.asked.lora else parameters - trained,
            trained,
            config.num_attention_heads if student.writes_out else 0,
            kept_bytes(family.model, batches, in_bfloat16) if family.device.type == "cpu" else 0,
        )
        needed, free = heal_bytes(sizes, in_bfloat16), _free(family.device)
        number = "bfloat16" if in_bfloat16 else "float32"
        text = f"{size(trained)} of {size(parameters)} parameters are trained in {number}; it takes {gigabytes(needed)}"
        self.say(Event(f"{text}, {gigabytes(free)} are free"))

    def _judge(self, layers: Sequence[Tensors] | None) -> float:
        """The mean gain on the selection split, of the plan or of what it is healed to; then the teacher again."""
        plan = self.plan if layers is None else self._healed(layers)
        found = self.scorer.score(plan, SELECTION_EXAMPLES).scores
        self.scorer.stitcher.stitch(self.dense)
        return sum(gain(score.score, score.higher_is_better) for score in found) / len(found)

    def _healed(self, layers: Sequence[Tensors], tokens: int = 0, name: str = "") -> StitchPlan:
        """The plan with these weights, which the stitcher knows from now on."""
        digest, folders = digest_of(layers), self.scorer.stitcher.healed
        assert isinstance(folders, HealedFolders)
        folders.known = {digest: layers}
        said: dict[str, str | int | float] = {
            "before": str(self.before),
            "name": name,
            "teacher": self.teacher,
            "tokens": tokens,
        }
        said |= {"lora": self.asked.lora, "rate": self.asked.peak_rate, "weights": digest}
        return self.plan.edited(Edit(HEALED_EDIT, tuple(said.items()), self.named, self.asked.seed))

    def _finish(self, found: Distilled, left_out: int, before: float | None) -> None:
        with EngineLock(self.folder):
            plans = stored_plans(queries.read_run(self.folder))
            healed = self._healed(found.layers, found.tokens, self._name(plans, digest_of(found.layers)))
            subject = healed_subject(healed)
            facts = self._facts(found, left_out, before)
            export_hf(
                self.scorer.family,
                healed,
                self.out,
                stitcher=self.scorer.stitcher,
                title=f"{self.spec.name}: {len(healed.kept)} layers of {healed.n_layers}, healed",
                facts=facts,
                progress=lambda step, _share: self.say(Event(step, share=1.0)),
            )
            HealedFolders(self.folder.path).remember(digest_of(found.layers), self.out)
            known = {plan.hash: config_id for config_id, plan in plans.items()}
            config_id = known.get(healed.hash, next_number(HEALED, plans))
            writer = RunWriter.open(self.folder, summarise=summarise)
            stitcher = self.scorer.stitcher
            writer.record_plan(config_id, healed, stitcher.n_parameters(healed), stitcher.shares(healed))
        with suppress(OSError):
            shutil.rmtree(self.work)
        judge = f"python -m gptailor evaluate {self.folder.run_id} --subjects {subject}"
        text = f"{self.out}: {subject}, judge it with  {judge}"
        losses = [loss for _, loss in found.course.losses]
        result = {"folder": str(self.out), "subject": str(subject), "config_id": config_id, "tokens": found.tokens}
        result |= {"losses": losses, "seconds": found.course.seconds, "why": found.why, "rate": found.rate}
        self.say(Event(text, share=1.0, result=result))

    def _name(self, plans: dict[int, StitchPlan], digest: str) -> str:
        """A name that no other heal of this plan has: `500k`, `500k-2`."""
        taken = {
            str(dict(plan.edits[-1].parameters)["name"])
            for plan in plans.values()
            if (subject := healed_subject(plan)) is not None
            and subject.before == self.before
            and dict(plan.edits[-1].parameters)["weights"] != digest
        }
        names = [self.asked.name, *(f"{self.asked.name}-{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def _facts(self, found: Distilled, left_out: int, before: float | None) -> dict[str, str]:
        """For the model card: what it was, what it was healed on, and what is known of how that went."""
        family, course = self.scorer.family, found.course
        assert self.named is not None
        how = f"LoRA of rank {self.asked.lora}, merged" if self.asked.lora else "all weights of its layers"
        facts = {
            "Run": f"{self.spec.name} ({self.folder.run_id}), {self.before.label}, healed",
            "Healed by": f"distillation from {family.label(self.teacher)} (dense), {how}, peak rate "
            f"{self.asked.peak_rate:g}, seed {self.asked.seed}; embeddings, final norm and output head were left alone",
            "Healed on": f"{count_text(found.tokens)} tokens, read from at most {count_text(self.named.n_tokens)} of "
            f"{self.named.source} (digest {self.named.digest}); {plural(left_out, 'text')} left out that held rows of "
            "held-out or selection splits",
            "Training": f"{found.steps} of {found.asked_steps} steps in {duration(course.seconds)}, ended: "
            f"{found.why}, at a rate of {found.rate:.2g}",
        }
        if course.losses:
            facts["KL to the teacher, nats a token"] = (
                f"{course.losses[0][1]:.4f} at first, {course.losses[-1][1]:.4f} last"
            )
        if before is not None and course.best is not None:
            facts["Selection split, mean score"] = f"{before:.4f} before, {course.best[1]:.4f} healed"
        return facts


def computes_faster_in_bfloat16(device: torch.device) -> bool:
    """On GPUs with bfloat16, and on CPUs that multiply it in hardware (AMX, AVX-512 BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and has_units


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
