"""Everything that a GPU does otherwise than a CPU, tried by one command of a few minutes: `make gpu-check`.

Its first half needs torch, transformers and this package; its second half is skipped where lm-eval or SMAC is absent.
No network is asked. It writes bench-results/gpu-check.json, prints a table, and ends with 1 if a number was wrong or
something failed. `--device cpu --small` runs what a CPU can run of it in seconds, so that it never rots.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from helpers.families import tiny_config, train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from gptailor.evaluate.direct import is_plain
from gptailor.evaluate.examples import Example, Window
from gptailor.evaluate.forward import Scored, score_direct, score_rows, score_tree
from gptailor.evaluate.packing import Pack, pack_examples
from gptailor.wording import as_table, duration, gigabytes

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt_neox": {"rotary_pct": 1.0},
}
"""Grouped heads, tied heads, norms of queries and keys, sliding windows, capped logits, another kind of layer."""
SHAPES: dict[str, dict[str, Any]] = {
    "0.13 B": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1 B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}
"""Llamas as SmolLM2-135M, Llama-3.2-1B and Llama-2-7B; weights are random, made on the device."""
SMALL = {"tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}}
CLOSE = 2e-3
"""Difference of a text's log-likelihood in float32 that is rounding."""
ROUNDED = 1.6
"""How much farther from float32 our bfloat16 may be than the model's own."""
BATCHES = (8, 32, 128)
"""Of the model's own forward, and of HFLM: the quickest one counts."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ok: None where it was skipped, or where a figure is told and nothing judged."""

    part: str
    name: str
    ok: bool | None
    found: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where and how much. small: shapes that a CPU does in seconds."""

    device: torch.device
    small: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], times: int = 3) -> float:
        """The quickest of some times, after one that warms up."""
        work()
        taken = []
        for _ in range(times):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return min(taken)


Found = Iterator[tuple[str, bool | None, str]]
"""name, whether it is right, what was found."""


# --- what is scored ---------------------------------------------------------------------------------------------------


def examples_of(vocabulary: int, n: int, context: tuple[int, int], seed: int = 0) -> list[Example]:
    """Questions of random tokens behind a shared beginning, with two to four options of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    shared, found = some(40, 40), []
    for number in range(n):
        question = (shared if number % 2 else []) + some(*context)
        options = [some(1, 6) for _ in range(2 + number % 3)]
        windows = [(Window(tuple(question + option), len(option)),) for option in options]
        found.append(Example(0, {}, (), tuple(windows)))
    return found


def packs_of(examples: Sequence[Example], max_tokens: int = 4096, max_scored: int = 2048) -> list[Pack]:
    return pack_examples(examples, 0, len(examples), max_tokens=max_tokens, max_scored=max_scored)


def windows_of(examples: Sequence[Example], packs: Sequence[Pack]) -> list[Window]:
    return [window for pack in packs for member in pack.members for window in examples[member].windows]


def model_of(config: Any, place: Place, dtype: torch.dtype) -> Any:
    """Random weights, made on the device itself: a 7B needs no room in host memory."""
    torch.manual_seed(1)
    with place.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


# --- the parts --------------------------------------------------------------------------------------------------------


def paths(place: Place) -> Found:
    """Packed trees, directly and by the model's own code, and padded rows, against one text at a time in float32."""
    examples = examples_of(300, 24, (3, 30))
    for kind, changes in ARCHITECTURES.items():
        config = tiny_config(kind, **changes)
        exact = model_of(config, place, torch.float32)
        packs = [pack.to(place.device) for pack in packs_of(examples, 400)]
        wanted = [score_rows(exact, [window], 4096)[0] for window in windows_of(examples, packs)]
        rounded = model_of(config, place, torch.float32).to(torch.bfloat16)
        for name, model in (("float32", exact), ("bfloat16", rounded)):
            own = error_of([score_rows(model, [window], 4096)[0] for window in windows_of(examples, packs)], wanted)
            for way, found in ways(model, packs, examples).items():
                yield f"{kind}, {name}, {way}", *judged(found, wanted, name, own)


def ways(model: Any, packs: Sequence[Pack], examples: Sequence[Example]) -> dict[str, list[Scored]]:
    """What each path says of all windows."""
    found = {"tree": [scored for pack in packs for scored in score_tree(model, pack)]}
    found["rows"] = score_rows(model, windows_of(examples, packs), 1024)
    if is_plain(model):
        found["direct"] = [scored for pack in packs for scored in score_direct(model, pack)]
    return found


def judged(found: Sequence[Scored], wanted: Sequence[Scored], dtype: str, own: float) -> tuple[bool, str]:
    """In float32 every text within CLOSE and greedy alike; in bfloat16 not much farther off than the model's own."""
    if dtype == "float32":
        worst = max(abs(a.precise - b.precise) for a, b in zip(found, wanted, strict=True))
        alike = sum(a.is_greedy == b.is_greedy for a, b in zip(found, wanted, strict=True))
        return worst < CLOSE and alike == len(wanted), f"off by {worst:.1e} at most, greedy alike {alike}/{len(wanted)}"
    error = error_of(found, wanted)
    return error <= ROUNDED * own + CLOSE, f"off by {error:.3f} (root mean square), its own forward by {own:.3f}"


def error_of(found: Sequence[Scored], wanted: Sequence[Scored]) -> float:
    """Root mean square of the differences."""
    squares = [(a.precise - b.precise) ** 2 for a, b in zip(found, wanted, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def merging(place: Place) -> Found:
    """Task arithmetic on the device against float64 on the CPU, in both types."""
    from gptailor.plan import LayerChoice
    from gptailor.stitch.merging import TASK_ARITHMETIC, merge

    choice = LayerChoice(0, ("one", "other"), TASK_ARITHMETIC, 0.4)
    draw = torch.Generator().manual_seed(0)
    base, one, other = (torch.randn(256, 192, generator=draw) for _ in range(3))
    exact = base.double() + 0.4 * ((one.double() - base.double()) + (other.double() - base.double()))
    for dtype in (torch.float32, torch.bfloat16):
        moved = [tensor.to(place.device, dtype) for tensor in (base, one, other)]
        states = [{"weight": tensor} for tensor in moved]
        found = merge(choice, states[0], dict(zip(("one", "other"), states[1:], strict=True)))["weight"].double().cpu()
        width = torch.finfo(dtype).eps
        worst = float((found - exact).abs().max() / exact.abs().max())
        yield f"task arithmetic, {dtype}".replace("torch.", ""), worst < 4 * width, f"off by {worst:.1e} of the largest"


def visiting(place: Place) -> Found:
    """Layers that wait in pinned host memory and visit the device say what layers that live there say."""
    from gptailor.family.residence import Room, n_bytes, settle, tensors_of
    from gptailor.family.structure import layer_list

    model, guest = (model_of(tiny_config(), replace(place, device=torch.device("cpu")), torch.float32) for _ in "ab")
    with torch.no_grad():
        for parameter in guest.parameters():
            parameter.mul_(1.1)
    candidates = {"guest": list(layer_list(guest))}
    size = n_bytes(tensors_of([model]))
    visitors = settle(model, candidates, {place.device: Room(size + size // 4)})
    yield "a candidate waits on the host", bool(visitors), f"{gigabytes(size)} of the base, a quarter as much beside it"
    for number, home in enumerate(candidates["guest"]):
        layer = visitors[place.device].get(("guest", number), home)
        wanted = dict(layer_list(guest)[number].named_parameters())
        pairs = [(mine.cpu(), wanted[name]) for name, mine in layer.named_parameters()]
        if not all(torch.equal(*pair) for pair in pairs):
            yield f"layer {number} visits", False, "its weights are not those of the host"
            return
    here = visitors[place.device]
    yield "every layer visits unchanged", True, f"{len(candidates['guest'])} layers; at most {gigabytes(here.capacity)}"


def memory(place: Place) -> Found:
    """A real shortage: what does not fit is scored in halved packs, to the same numbers."""
    if not place.is_cuda:
        yield "a pack that does not fit", None, "skipped: needs a GPU whose memory can be filled"
        return
    config = AutoConfig.for_model("llama", **(SHAPES["0.13 B"]))
    model, examples = model_of(config, place, torch.bfloat16), examples_of(49152, 200, (60, 90))
    small = packs_of(examples, 2048)
    wanted = [one for pack in small for one in score_direct(model, pack.to(place.device))]
    (whole,) = packs_of(examples, 10**9, 10**9)
    torch.cuda.reset_peak_memory_stats(place.device)
    held = torch.cuda.memory_allocated(place.device)
    score_direct(model, whole.to(place.device))
    needed = torch.cuda.max_memory_allocated(place.device) - held
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(place.device)
    filler = torch.empty(max(0, free - needed // 2), dtype=torch.uint8, device=place.device)
    try:
        score_direct(model, whole.to(place.device))
        yield "a shortage is an error of torch", False, "the whole pack fitted into half of what it needs"
    except torch.OutOfMemoryError:
        yield "a shortage is an error of torch", True, f"{gigabytes(needed)} needed, half of it free"
    torch.cuda.empty_cache()
    again = [one for pack in small for one in score_direct(model, pack.to(place.device))]
    del filler
    torch.cuda.empty_cache()
    yield "smaller packs fit, and say the same", again == wanted, f"{len(small)} packs instead of one"


def split(place: Place) -> Found:
    """A base over two devices says what it says on one."""
    from gptailor.family.residence import Room, n_bytes, settle, tensors_of

    if not place.is_cuda or torch.cuda.device_count() < 2:
        yield "a base over two GPUs", None, "skipped: needs two GPUs"
        return
    examples = examples_of(300, 24, (3, 30))
    packs, config = packs_of(examples), tiny_config()
    wanted = score_rows(model_of(config, place, torch.float32), windows_of(examples, packs), 1024)
    model = model_of(config, replace(place, device=torch.device("cpu")), torch.float32)
    half = n_bytes(tensors_of([model])) * 2 // 3
    settle(model, {}, {torch.device("cuda", index): Room(half) for index in (0, 1)})
    found = [one for pack in packs for one in score_tree(model, pack.to(place.device))]
    yield "a base over two GPUs", *judged(found, wanted, "float32", 0.0)


def speed(place: Place) -> Found:
    """Seconds of the same questions: our packs, the model's own forward at its best batch, HFLM, and the floor."""
    for name, shape in (SMALL if place.small else SHAPES).items():
        config = AutoConfig.for_model("llama", **({"vocab_size": 2048} | shape))
        dtype = torch.bfloat16 if place.is_cuda else torch.float32
        try:
            yield from speed_of(name, model_of(config, place, dtype), place)
        except torch.OutOfMemoryError:
            yield f"{name}: speed", None, "skipped: does not fit"
        if place.is_cuda:
            torch.cuda.empty_cache()


def speed_of(name: str, model: Any, place: Place) -> Found:
    n = 24 if place.small else 400
    examples = examples_of(model.config.vocab_size, n, (20, 30) if place.small else (60, 140))
    packs = [pack.to(place.device) for pack in packs_of(examples, 2**14, max(256, 2**26 // model.config.vocab_size))]
    ours = place.seconds(lambda: [score_direct(model, pack) for pack in packs])
    windows = windows_of(examples, packs)
    longest = max(len(window.inputs) for window in windows)
    batches = BATCHES[:1] if place.small else BATCHES
    rows = min(place.seconds(lambda b=b: score_rows(model, windows, b * longest), 1) for b in batches)  # type: ignore[misc]
    floor = floor_seconds(model, packs, place)
    n_tokens = sum(len(pack.tokens) for pack in packs)
    yield (
        f"{name}: our packs",
        None,
        f"{duration(ours)}, {ours / floor:.2f} x the floor, {n_tokens / ours:,.0f} tokens/s",
    )
    yield f"{name}: its own forward", None, f"{rows / ours:.2f} x our time at its best batch"
    if importlib.util.find_spec("lm_eval"):
        taken = hflm_seconds(model, windows, place, batches)
        yield f"{name}: lm-eval's HFLM", None, f"{taken / ours:.2f} x our time at its best batch"
    if place.is_cuda:
        yield f"{name}: where time goes", None, profile(lambda: [score_direct(model, pack) for pack in packs])


def floor_seconds(model: Any, packs: Sequence[Pack], place: Place) -> float:
    """The multiply-adds that nobody can leave out, at the rate that this device's largest product reaches."""
    size = 512 if place.small else 8192
    a, b = (torch.randn(size, size, device=place.device, dtype=model.dtype) for _ in "ab")
    rate = size**3 / place.seconds(lambda: a @ b)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    return sum(len(pack.tokens) * layers + len(pack.scored) * head for pack in packs) / rate


def hflm_seconds(model: Any, windows: Sequence[Window], place: Place, batches: Sequence[int]) -> float:
    """lm-eval's own scoring of the same windows, tokenised already."""
    from lm_eval.models.huggingface import HFLM

    requests = [(("", ""), list(w.tokens[: -w.n_scored]), list(w.tokens[-w.n_scored :])) for w in windows]
    taken = []
    for batch in batches:
        peer = HFLM(pretrained=model, tokenizer=train_tokenizer(), batch_size=batch)
        work: Callable[[], Any] = lambda peer=peer: peer._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[misc] # noqa: E731
        taken.append(place.seconds(work, 1))
    return min(taken)


def profile(work: Callable[[], Any]) -> str:
    """The kernels that take most of the device's time, with their shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    with watched(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    shares = [f"{event.key[:40]} {event.self_device_time_total / total:.0%}" for event in events[:6]]
    return "; ".join(shares)


def whole_search(place: Place) -> Found:
    """The demo's search on the device, its export, and its text: by the command line, as a user runs them."""
    if missing := [name for name in ("lm_eval", "smac", "duckdb") if importlib.util.find_spec(name) is None]:
        yield "a search on the demo", None, f"skipped: {', '.join(missing)} not installed"
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"

        def command(*words: str) -> subprocess.CompletedProcess[str]:
            environment = os.environ | {"GPTAILOR_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
            asked = [sys.executable, "-m", "gptailor", *words]
            return subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)

        keys = {"device": str(place.device), "trials": 9, "budget.min": 30, "budget.max": 90, "held_out": "[]"}
        done = command("search", "data/presets/demo.yaml", *[w for k, v in keys.items() for w in ("--set", f"{k}={v}")])
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        yield "a search on the demo", done.returncode == 0, " ".join(last)
        if done.returncode:
            return
        (run_id,) = [path.parent.name for path in runs.glob("*/run.yaml")]
        story = json.loads(command("show", run_id, "--json").stdout)
        config_id = str(story["front"][0]["config_id"])
        out = command("export", run_id, config_id, str(Path(folder) / "model"))
        yield "its best plan is exported", out.returncode == 0, (out.stdout or out.stderr).strip().splitlines()[-1]
        text = command("generate", run_id, config_id, "--prompt", "one plus two is", "--tokens", "8")
        yield "it writes", text.returncode == 0, (text.stdout or text.stderr).strip().splitlines()[-1]


PARTS: dict[str, Callable[[Place], Found]] = {
    "paths": paths,
    "merging": merging,
    "visiting": visiting,
    "memory": memory,
    "two devices": split,
    "speed": speed,
    "whole": whole_search,
}
"""The first six need torch and transformers alone."""


# --- all of it --------------------------------------------------------------------------------------------------------


def tried(place: Place, parts: Sequence[str], minutes: float) -> Iterator[Check]:
    """Every part; what fails is a check that is not ok, and what no time is left for is skipped."""
    end = time.monotonic() + 60 * minutes
    for part in parts:
        started = time.monotonic()
        try:
            for name, ok, found in PARTS[part](place):
                yield Check(part, name, ok, found, time.monotonic() - started)
                started = time.monotonic()
                if started > end:
                    yield Check(part, "the rest", None, f"skipped: {minutes:g} minutes are over")
                    break
        except Exception as error:
            yield Check(part, "it failed", False, f"{type(error).__name__}: {error}", time.monotonic() - started)


def machine(place: Place) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(place.device) if place.is_cuda else "CPU"
    import transformers

    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU does in seconds")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the rest is skipped (default: 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "gpu-check.json")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here; `--device cpu --small` runs what a CPU can run of it")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    place = Place(torch.device("cuda", 0) if asked.device == "cuda" else torch.device(asked.device), asked.small)
    found = []
    for check in tried(place, asked.parts.split(","), asked.minutes):
        found.append(check)
        print(f"{verdict(check):7} {check.part}: {check.name}: {check.found}", flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(place), "checks": [asdict(check) for check in found]}
    asked.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n" + summary(found, machine(place)))
    return 1 if any(check.ok is False for check in found) else 0


def verdict(check: Check) -> str:
    return "–" if check.ok is None else "ok" if check.ok else "WRONG"


def summary(found: Sequence[Check], where: dict[str, str]) -> str:
    """A row a part: how much of it is right, and the seconds that it took."""
    rows: list[tuple[str, ...]] = [("part", "right", "wrong", "told or skipped", "time")]
    for part in dict.fromkeys(check.part for check in found):
        own = [check for check in found if check.part == part]
        counts = [str(sum(check.ok is state for check in own)) for state in (True, False, None)]
        rows.append((part, *counts, duration(sum(check.seconds for check in own))))
    return ", ".join(f"{name} {value}" for name, value in where.items()) + "\n" + as_table(rows)


if __name__ == "__main__":
    sys.exit(main())
