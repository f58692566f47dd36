"""Distillation by transformers' Trainer: the student learns the teacher's next-token distributions on some texts.

The loss is KL(teacher || student), the mean over tokens (loss.py); its gradient needs no labels. Trainer brings steps,
mixed precision, several devices (accelerate) and checkpoints; ours is the loss, the watch over time and signals, and
the early stop. trl's DistillationTrainer learns on what the student writes itself, which costs several times as much,
and would be one more dependency.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from gptailor.errors import UserError
from gptailor.heal.batches import Batch, inputs
from gptailor.heal.loss import Head, divergence
from gptailor.heal.student import Student
from gptailor.heal.teaching import Teaching, kept_bytes
from gptailor.heap import MAX_KEPT, keep_freed_memory
from gptailor.stitch.edits.healed import Tensors
from gptailor.store.folder import write_atomically
from gptailor.wording import duration

WARM_UP = 0.05
CHECKPOINTS, JUDGEMENTS = 20, 8
"""Of a whole heal."""
TRAINED = "trained.safetensors"
"""In each checkpoint."""
PATIENCE = 3
"""Judgements in a row without a new best, after which a heal ends."""
SAY_SECONDS = 5.0

T = TypeVar("T")
Judge = Callable[[Sequence[Tensors]], float]
"""How good these layers are on the selection split; more is better."""


@dataclass
class Course:
    """How a heal goes, kept with each checkpoint. seconds: of training. losses: (step, loss). judged: (step, value)."""

    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        return max(self.judged, key=lambda one: one[1], default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last judgements were none of them a new best."""
        best = self.best
        return best is not None and sum(step > best[0] for step, _ in self.judged) >= PATIENCE


@dataclass(frozen=True)
class Distilled:
    """layers: the healed tensors, of the best judgement where there were any. steps: of how many. why: it ended.

    rate: where the learning rate had fallen to. is_whole: False where it was asked to stop, and can go on from its
    checkpoint.
    """

    layers: Sequence[Tensors]
    steps: int
    asked_steps: int
    tokens: int
    course: Course
    why: str
    rate: float

    @property
    def is_whole(self) -> bool:
        return self.why != STOPPED


DONE, STOPPED, TIME_UP, NO_BETTER = "done", "stopped", "time is up", "no better on the selection split"


class Diverged(Exception):
    """The loss of a step is no number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"training diverged at step {step}: its loss is no number")


class Distiller(Trainer):
    """Trainer with the teacher's distributions as the goal; its model gives last hidden states, not logits.

    spent: the share of its time that a heal has used; 0 where it has as much as it takes.
    """

    def __init__(self, teaching: Teaching, head: Head, spent: Callable[[], float], **settings: Any) -> None:
        super().__init__(**settings)
        self.teaching, self.head, self.spent = teaching, head, spent

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        wanted = self.teaching.states(int(inputs.pop("batch")))
        loss = divergence(self.head, model(**inputs)[inputs["attention_mask"].bool()], wanted)
        if not torch.isfinite(loss):
            raise Diverged(self.state.global_step + 1)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # so says torch.save where the disk is full
            raise OSError(str(error)) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        """What is trained, by the model's own names: transformers renames experts, and loads no names that it gave."""
        if not self.args.should_save:  # another process does
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in self._trained().items()}, folder / TRAINED)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        path, own = Path(resume_from_checkpoint) / TRAINED, self._trained()
        found = load_file(path) if path.is_file() else {}
        if found.keys() != own.keys():
            raise UserError(
                f"heal: {path.parent} holds the beginning of a heal by another version; remove {path.parents[1]}, "
                "which begins anew"
            )
        for name, tensor in own.items():
            tensor.copy_(found[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        model: Any = self.model
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The usual rate of every step, or of the later one that its time has come to: at the end of either it is 0."""
        found = super().create_scheduler(num_training_steps, optimizer)
        assert isinstance(found, LambdaLR)
        found.lr_lambdas = [self._in_time(of_step, num_training_steps) for of_step in found.lr_lambdas]
        return found

    def _in_time(self, of_step: Callable[[Any], float], steps: int) -> Callable[[int], float]:
        return lambda step: of_step(max(step, steps * self.spent()))


def distil(
    student: Student,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    work: Path,
    *,
    rate: float,
    seed: int,
    minutes: float | None,
    in_bfloat16: bool,
    should_stop: Callable[[], bool],
    say: Callable[[str, float], None],
    judge: Judge | None = None,
) -> Distilled:
    """Train the student on the batches; where `work` holds checkpoints of it, from the last one on.

    minutes: of training at most; the rate falls to 0 with the steps or with the time, whichever ends first. say: told
    what is done and its share. should_stop: asked after every step; then there is a checkpoint, and the same
    call goes on later. judge: asked eight times; the layers that it likes best are given back.
    """
    n_devices = int(os.environ.get("WORLD_SIZE", "1"))
    steps = math.ceil(len(batches) / n_devices)
    every = max(1, math.ceil(steps / CHECKPOINTS))
    device = teacher.device
    if device.type == "cpu":
        keep_freed_memory(MAX_KEPT)  # what a step frees, the next one takes
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", str(device))  # accelerate takes the first GPU otherwise
    settings = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # a batch of ours
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP * steps),
        logging_steps=max(1, steps // 50),
        save_steps=every,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=in_bfloat16,
        use_cpu=device.type == "cpu",
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # several GPUs are accelerate's, one a process, not nn.DataParallel's
    watch = Watch(student, work, steps, minutes, should_stop, say, judge)
    keeps = kept_bytes(teacher, batches, in_bfloat16, n_devices) > 0
    trainer = Distiller(
        Teaching(teacher, batches, keeps, in_bfloat16),
        Head(student.plain),
        lambda: watch.spent,
        model=student.model,
        args=settings,
        train_dataset=list(range(len(batches))),
        data_collator=lambda of_one: inputs(batches[of_one[0]], torch.device("cpu")) | {"batch": torch.tensor(of_one)},
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_whole(work))
    done = trainer.state.global_step
    seen = sum(len(text) for batch in batches[: done * n_devices] for text in batch)
    layers = watch.best_layers() if watch.course.judged else student.layers()
    assert trainer.lr_scheduler is not None
    rate_now = float(trainer.lr_scheduler.get_last_lr()[0])
    return Distilled(layers, done, steps, seen, watch.course, watch.why, rate_now)


def _last_whole(work: Path) -> str | None:
    """The last checkpoint that was written to its end, which its state is; one that was cut off is taken away."""
    while (found := get_last_checkpoint(str(work))) is not None:
        try:
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(found)
        else:
            break
    return found


class Watch(TrainerCallback):
    """Looks at the clock, at signals and at the selection split after every step, and says how it goes."""

    def __init__(
        self,
        student: Student,
        work: Path,
        steps: int,
        minutes: float | None,
        should_stop: Callable[[], bool],
        say: Callable[[str, float], None],
        judge: Judge | None,
    ) -> None:
        self.student, self.steps, self.minutes = student, steps, minutes
        self.should_stop, self.say, self.judge = should_stop, say, judge
        self.notes, self.best = work / "course.json", work / "best.safetensors"
        self.course, self.why = Course(), DONE
        self._began = self._said = 0.0
        self._before = 0.0

    @property
    def is_main(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    @property
    def spent(self) -> float:
        """The share of its minutes that is over, in every process the same."""
        return 0.0 if self.minutes is None else min(1.0, self.course.seconds / (60 * self.minutes))

    def on_train_begin(self, *given: Any, **_: Any) -> None:
        state: TrainerState = given[1]
        if state.global_step and self.notes.exists():
            said = json.loads(self.notes.read_text(encoding="utf-8"))
            self.course = Course(said["seconds"], *([tuple(one) for one in said[key]] for key in ("losses", "judged")))
            self.say(f"goes on from step {state.global_step} of {self.steps}", state.global_step / self.steps)
        self._before, self._began = self.course.seconds, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.course.losses.append((state.global_step, float(logs["loss"])))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.course.seconds = _agreed(self._before + time.monotonic() - self._began)  # the next step's rate is due

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        step = state.global_step
        is_over = (
            step == self.steps or self.spent >= 1
        )  # whatever ends it, the last layers are among those to choose from
        eighths = math.floor(JUDGEMENTS * max(step / self.steps, self.spent))
        if self.judge is not None and (is_over or eighths > len(self.course.judged)):
            self._judge(step)
        why = None
        if self.should_stop():
            why = STOPPED
        elif self.spent >= 1:
            why = TIME_UP
        elif self.course.is_over:
            why = NO_BETTER
        why = _agreed(why)
        if why is not None and step < self.steps:
            self.why, control.should_training_stop = why, True
            control.should_save |= why == STOPPED
        self._tell(step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        if self.is_main:
            write_atomically(self.notes, json.dumps(asdict(self.course)))

    def _judge(self, step: int) -> None:
        value = 0.0
        if self.is_main:
            assert self.judge is not None
            layers, best = self.student.layers(), self.course.best
            value = self.judge(layers)
            if best is None or value > best[1]:
                part = self.best.with_suffix(".new")
                save_file(
                    {f"{place} {name}": t for place, state in enumerate(layers) for name, t in state.items()}, part
                )
                part.replace(self.best)
            self.say(f"step {step}: {value:.4f} on the selection split", step / self.steps)
        self.course.judged.append((step, value))

    def _tell(self, step: int) -> None:
        if time.monotonic() - self._said < SAY_SECONDS and step < self.steps:
            return
        self._said = time.monotonic()
        share = max(step / self.steps, self.spent)
        left = self.course.seconds * (1 / share - 1)
        loss = f", loss {self.course.losses[-1][1]:.4f}" if self.course.losses else ""
        self.say(f"step {step} of {self.steps}{loss}, {duration(left)} left", share)

    def best_layers(self) -> list[Tensors]:
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(self.best).items():
            place, _, name = key.partition(" ")
            layers.setdefault(int(place), {})[name] = tensor
        return [layers[place] for place in sorted(layers)]


def _agreed(mine: T) -> T:
    """What the first process says, in all of them: none trains at another rate, or waits for one that has stopped."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    said = [mine]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]
