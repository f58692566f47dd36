"""What a trial costs here, and what it costs elsewhere: `make bench`. Every row is a ratio within one run.

On the SmolLM2 family (on the demo family where it is absent), for plans with about a quarter of the layers removed,
merges included:

    pipeline   mergekit writes the plan's model to disk, lm-eval's command line scores it
    resident   the stitched model in memory, lm-eval's evaluate() with HFLM at the best batch size
    engine     this project, first trial (cold) and the median of the rest (warm)
    floor      multiply-adds of the distinct tokens through the kept layers and of the head at the scored positions
               over the rate that one large matrix product of the same shapes and type reaches in the same run
    products   the engine's own matrix products and nothing else: its packs, one a thread, through the plan's layers
    search     whole searches of 60 and 200 trials, start and references included, against their own trials scored one
               by one by the resident peer and by the pipeline (of each rung a few are timed)
    suggest    SMAC's time, at 30 layers x 3 candidates and 40 x 4
    memory     peak memory of the engine against the bytes of the family's distinct tensors

Writes bench-results/engine.json and prints a table. Takes about 90 minutes on two cores; --quick takes about 5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from gptailor.evaluate.packing import build_pack
from gptailor.formats.mergekit import mergekit_yaml
from gptailor.plan import BASE, StitchPlan
from gptailor.scoring.item_cache import items_key
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.search.space import PlanSpace, build_space, initial_design
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Budget
from gptailor.threads import side_by_side

Answers = dict[tuple[str, int], float]
"""(benchmark, row) -> 1 for right, 0 for wrong."""
BATCHES = (4, 16)
"""Of the resident peer: the quicker one is timed, both are compared."""
COMPARED = 4
"""Plans whose answers are compared, example by example."""

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Setting:
    name: str
    spec: RunSpec
    examples: int
    n_plans: int


def setting(family: Path | None, quick: bool) -> Setting:
    """The SmolLM2 family and four real benchmarks where they are, else the demo family with its own."""
    if family is not None and (family / "base").is_dir() and (SHARED / "benchmarks").is_dir():
        names = ("piqa", "commonsenseqa", "arc_easy", "boolq")
        data: dict[str, Any] = {
            "base_model": str(family / "base"),
            "candidates": {name: str(family / name) for name in ("language", "math", "code")},
            "remove": 8,
            "objectives": [{"benchmark": f"{n}_local", "metric": "acc_norm", "split": "test"} for n in names],
            "include_path": [str(SHARED / "benchmarks")],
            "dtype": "bfloat16",
        }
        title = "SmolLM2-135M family, 22 of 30 layers, bfloat16"
    else:
        import yaml

        data = yaml.safe_load((ROOT / "data" / "presets" / "demo.yaml").read_text())
        data = {key: data[key] for key in ("base_model", "candidates", "remove", "objectives", "include_path")}
        title = "demo family"
    spec = build_spec(
        data | {"name": "bench", "device": "cpu", "budget": {"min": 27, "max": 243}, "trials": 18 if quick else 60}
    )
    return Setting(title, spec, 20 if quick else 100, 3 if quick else 10)


def plans_of(space: PlanSpace, bench: PlanScorer, count: int) -> list[StitchPlan]:
    """Plans like a search's: one-shot cuts, and points drawn from the space, merges included."""
    design = initial_design(space, bench.influence_orders())
    drawn = [space.decode(c) for c in space.configspace.sample_configuration(count)]
    return [*design[: count // 3], *drawn][:count]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def pipeline(setting: Setting, plan: StitchPlan, tasks: list[str], n: int) -> float:
    """Seconds in which mergekit writes the plan's model and lm-eval's command line scores it, a process each."""
    paths = {BASE: setting.spec.base_model, **setting.spec.candidates}
    with tempfile.TemporaryDirectory() as tmp:
        config = Path(tmp) / "plan.yaml"
        dtype = "bfloat16" if setting.spec.dtype == "bfloat16" else "float32"
        config.write_text(mergekit_yaml(plan, {k: str(Path(v).resolve()) for k, v in paths.items()}, dtype=dtype))
        merge = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), f"{tmp}/model", "--copy-tokenizer"]
        score = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp}/model"]
        score[-1] += f",dtype={dtype}"
        score += ["--tasks", ",".join(tasks), "--limit", str(n), "--batch_size", "16", "--device", "cpu"]
        score += ["--include_path", *setting.spec.include_path]
        took = 0.0
        for command in (merge, score):
            spent, done = timed(lambda c=command: subprocess.run(c, cwd=ROOT, capture_output=True, text=True))  # type: ignore[misc]
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
            took += spent
    return took


class ResidentPeer:
    """lm-eval's evaluate() on the model in memory, tasks loaded once, the very examples that the engine scores."""

    def __init__(self, bench: PlanScorer) -> None:
        from lm_eval.tasks import TaskManager

        self.bench = bench
        folders = [str(p) for p in bench.family.spec.include_path]
        names = [b.spec.benchmark for b in bench.benchmarks]
        manager = TaskManager(include_path=folders, include_defaults=False)
        self.tasks = manager.load(names)
        for benchmark in bench.benchmarks:
            self.tasks["tasks"][benchmark.spec.benchmark].config.test_split = benchmark.spec.split

    def score(self, plan: StitchPlan, n: int, batch_size: int) -> tuple[float, dict[str, float], Answers]:
        """Seconds, scores and answers of one plan on the first n examples of every benchmark."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        model = self.bench.stitcher.stitch(plan)
        samples = {b.spec.benchmark: sorted(index for _, index in b.order[:n]) for b in self.bench.benchmarks}

        def work() -> Any:
            peer = HFLM(pretrained=model, tokenizer=self.bench.family.tokenizer, batch_size=batch_size)
            return evaluate(lm=peer, task_dict=self.tasks, samples=samples, bootstrap_iters=0, log_samples=True)

        seconds, result = timed(work)
        metrics = {b.spec.benchmark: b.spec.metric for b in self.bench.benchmarks}
        scores = {name: float(result["results"][name][f"{metric},none"]) for name, metric in metrics.items()}
        logged = result["samples"]
        answers = {(name, s["doc_id"]): float(s[metric]) for name, metric in metrics.items() for s in logged[name]}
        return seconds, scores, answers


def answers_of(bench: PlanScorer, plan: StitchPlan, n: int) -> Answers:
    """What the engine's scores are made of, by the same keys."""
    bench.score(plan, n)
    return {
        (b.spec.benchmark, index): float(item)
        for b in bench.benchmarks
        for (_, index), item in zip(b.order[:n], bench.known[items_key(plan, b)], strict=True)
    }


def floor(bench: PlanScorer, plan: StitchPlan, n: int) -> dict[str, float]:
    """Least seconds: multiply-adds over the measured rate of large products of the same shapes and type."""
    tokens = scored = 0
    for benchmark in bench.benchmarks:
        pack = build_pack(benchmark.examples, range(n))
        tokens, scored = tokens + len(pack.tokens), scored + len(pack.scored)
    model = bench.stitcher.stitch(plan)
    layer = bench.family.layer(plan.kept[0].layer)
    shapes = [tuple(m.weight.shape) for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    head = tuple(model.get_output_embeddings().weight.shape)
    layer_rate = _matmul_rate(shapes, bench.family.dtype)
    head_rate = _matmul_rate([head], bench.family.dtype)
    layer_flops = 2 * tokens * len(plan.kept) * sum(a * b for a, b in shapes)
    head_flops = 2 * scored * head[0] * head[1]
    return {
        "distinct_tokens": tokens,
        "scored_positions": scored,
        "rate_tflops": (layer_flops + head_flops) / (layer_flops / layer_rate + head_flops / head_rate) / 1e12,
        "seconds": layer_flops / layer_rate + head_flops / head_rate,
    }


def _matmul_rate(shapes: list[tuple[int, ...]], dtype: torch.dtype, rows: int = 4096) -> float:
    """Multiply-adds a second (counted twice) of x @ w.T over the given weight shapes, the best of several sizes."""
    best = 0.0
    for size in (1024, 2048, rows):
        work = [(torch.randn(size, k).to(dtype), torch.randn(m, k).to(dtype)) for m, k in shapes]
        for _ in range(2):
            for x, w in work:
                torch.nn.functional.linear(x, w)
        repeats = 5
        seconds, _ = timed(lambda w=work, r=repeats: [torch.nn.functional.linear(x, y) for _ in range(r) for x, y in w])  # type: ignore[misc]
        best = max(best, repeats * sum(2 * size * m * k for m, k in shapes) / seconds)
    return best


def products(bench: PlanScorer, plan: StitchPlan) -> float:
    """Seconds that the products alone take of the packs of a trial: the wall, however the rest is written."""
    model = bench.stitcher.stitch(plan)
    layers = [bench.stitcher.layer(choice) for choice in plan.kept]
    weights = [m.weight for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight
    packs = [pack for chunk in bench.evaluator._packs.values() for pack in chunk.packs]

    def through(pack: Any) -> list[Any]:
        inputs = {k: torch.randn(len(pack.tokens), k).to(bench.family.dtype) for k in {w.shape[1] for w in weights}}
        with torch.inference_mode():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            read = inputs[head.shape[1]][: len(pack.scored)]
            for part in head.split(8192):
                torch.nn.functional.linear(read, part)
        return []

    return timed(lambda: side_by_side(through, packs, [len(pack.tokens) for pack in packs]))[0]


def suggest_seconds(n_layers: int, n_candidates: int, trials: int) -> float:
    """Mean seconds of one suggestion, over a search of `trials` trials with made-up scores."""
    from gptailor.search.loop import INITIAL_SHARE
    from gptailor.search.suggest import Suggester

    names = {f"c{k}": "none" for k in range(n_candidates)}
    objectives = [{"benchmark": "a"}, {"benchmark": "b"}]
    spec = build_spec(
        {"name": "x", "base_model": "b", "candidates": names, "remove": n_layers // 4, "objectives": objectives}
        | {"budget": {"min": 27, "max": 243}, "trials": trials}
    )
    space = build_space(spec, n_layers)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        start = initial_design(space, [(BASE, range(n_layers))])[: round(INITIAL_SHARE * trials)]
        suggester = Suggester(spec, space, start, Path(folder))
        spent = 0.0
        for _ in range(trials):
            seconds, suggestion = timed(suggester.ask)
            spent += seconds
            suggester.tell(suggestion, rng.random(2).tolist())
    return spent / trials


def search_rows(
    setting: Setting, n_trials: int, peer: ResidentPeer, batch_size: int, tasks: list[str], sample: int, piped: int
) -> dict[str, Any]:
    """A whole search in a process of its own, and its trials by its peers.

    sample, piped: trials of each rung that the resident peer and the pipeline are timed on; the others count as these.
    """
    from gptailor.results.frames.seconds import seconds as parts_of
    from gptailor.store import queries
    from gptailor.store.folder import RunFolder

    with tempfile.TemporaryDirectory() as tmp:
        run_file = Path(tmp) / "run.yaml"
        run_file.write_text(setting.spec.model_copy(update={"trials": n_trials}).to_yaml())
        command = [sys.executable, "-m", "gptailor", "search", str(run_file), "--runs", f"{tmp}/runs"]
        seconds, done = timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        run_id = next(p.name for p in Path(f"{tmp}/runs").iterdir() if not p.name.startswith("."))
        tables = queries.read_run(RunFolder.of(f"{tmp}/runs", run_id))
    plans = {r.config_id: StitchPlan.from_json(json.loads(r.plan)) for r in tables.plans.itertuples()}
    took = {"resident": 0.0, "pipeline": 0.0}
    for budget, trials in tables.trials.groupby("budget"):
        n = int(budget)
        ways: dict[str, tuple[int, Callable[[StitchPlan], float]]] = {
            "resident": (sample, lambda plan, n=n: peer.score(plan, n, batch_size)[0]),  # type: ignore[misc]
            "pipeline": (piped, lambda plan, n=n: pipeline(setting, plan, tasks, n)),  # type: ignore[misc]
        }
        for way, (count, score) in ways.items():
            chosen = list(trials.itertuples())[:: max(1, len(trials) // count)][:count] if count else []
            measured = [score(plans[trial.config_id]) for trial in chosen]
            if measured:
                took[way] += statistics.mean(measured) * len(trials)
                each = f"{statistics.mean(measured):.1f} s a trial"
                print(f"  rung {n}: {way} {each} ({len(measured)} of {len(trials)} timed)", flush=True)
    parts = {row.part: row.seconds for row in parts_of(tables.seconds).itertuples()}
    return {"seconds": seconds, "trials": len(tables.trials), "parts": parts, **took}


def memory_row(setting: Setting) -> dict[str, float]:
    """Peak resident memory of an engine that scores three plans, in a process of its own, in bytes."""
    code = (
        "import json, sys\n"
        "from tests.bench.engine import *\n"
        "s = build_spec(json.loads(sys.argv[1]))\n"
        "bench = PlanScorer.open(s, s.objectives, max_examples=int(sys.argv[2]))\n"
        "distinct = bench.family.distinct_bytes\n"
        "space = build_space(s, bench.family.n_layers)\n"
        "[bench.score(p, int(sys.argv[2])) for p in plans_of(space, bench, 3)]\n"
        "print(json.dumps([peak_memory(), distinct]))\n"
    )
    command = [sys.executable, "-c", code, setting.spec.model_dump_json(), str(setting.examples)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    peak, distinct = json.loads(done.stdout.splitlines()[-1])
    return {"peak": peak, "distinct": distinct, "bar": 1.15 * distinct + 700e6}


def peak_memory() -> int:
    """Bytes that this process had resident at most. Not ru_maxrss, which a child takes over from its parent."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, help="folder with base, language, math and code (SmolLM2)")
    parser.add_argument("--quick", action="store_true", help="fewer plans, examples and trials")
    parser.add_argument(
        "--rows", default="engine,resident,floor,products,pipeline,memory,suggest,search", help="which rows"
    )
    parser.add_argument("--plans", type=int, help="score this many plans (by default 10, or 3 with --quick)")
    parser.add_argument("--pipeline-plans", type=int, help="time the pipeline on this many of the plans only")
    parser.add_argument("--searches", default="60,200", help="trials of the searches (with --quick: 18)")
    parser.add_argument("--peer-trials", type=int, default=4, help="trials a rung that the resident peer is timed on")
    parser.add_argument("--pipeline-trials", type=int, default=1, help="the same for the pipeline; 0 leaves it out")
    arguments = parser.parse_args()
    rows = set(arguments.rows.split(","))
    this = setting(arguments.family, arguments.quick)
    n = this.examples
    print(f"{this.name}; {n} examples of each of {', '.join(o.benchmark for o in this.spec.objectives)}", flush=True)
    results: dict[str, Any] = {"setting": this.name, "examples": n, "threads": torch.get_num_threads()}
    one_rung = this.spec.model_copy(update={"budget": Budget(min=n, max=n)})  # else examples beyond n share packs
    bench = PlanScorer.open(one_rung, one_rung.objectives, max_examples=max(n, this.spec.budget.max))
    space = build_space(this.spec, bench.family.n_layers)
    plans = plans_of(space, bench, arguments.plans or this.n_plans)

    # Way by way for one plan after the other: a machine's rate changes from one minute to the next.
    cold = timed(lambda: bench.score(plans[0], n))[0]
    bench.known.clear()
    peer = ResidentPeer(bench) if rows & {"resident", "search"} else None
    batch_size, other_batch = sorted(BATCHES, key=lambda b: peer.score(plans[0], n, b)[0] if peer else b)
    tasks = [benchmark.spec.benchmark for benchmark in bench.benchmarks]
    piped = plans[: len(plans) if arguments.pipeline_plans is None else arguments.pipeline_plans]
    by_way: dict[str, list[float]] = {
        "engine": [],
        "stitch": [],
        "floor": [],
        "products": [],
        "resident": [],
        "pipeline": [],
    }
    changes = {"engine": 0, "resident": 0, "of": 0}
    largest_gap = 0.0
    for plan in plans:
        seconds, scored = timed(lambda plan=plan: bench.score(plan, n))  # type: ignore[misc]
        by_way["engine"].append(seconds)
        by_way["stitch"].append(scored.stitch_seconds)
        if "floor" in rows:
            results["floor"] = floor(bench, plan, n)
            by_way["floor"].append(results["floor"]["seconds"])
        if "products" in rows:
            by_way["products"].append(products(bench, plan))
        if peer and "resident" in rows:
            seconds, scores, theirs = peer.score(plan, n, batch_size)
            by_way["resident"].append(seconds)
            largest_gap = max(largest_gap, *(abs(s.score - scores[s.benchmark]) for s in scored.scores))
            if len(by_way["resident"]) <= COMPARED:
                ours, again = answers_of(bench, plan, n), peer.score(plan, n, other_batch)[2]
                changes["engine"] += sum(ours[key] != theirs[key] for key in theirs)
                changes["resident"] += sum(again[key] != theirs[key] for key in theirs)
                changes["of"] += len(theirs)
        if "pipeline" in rows and plan in piped:
            by_way["pipeline"].append(pipeline(this, plan, tasks, n))
        print("  " + ", ".join(f"{way} {took[-1]:.2f} s" for way, took in by_way.items() if took), flush=True)
    results["seconds"] = by_way | {"cold": cold}
    if peer and "resident" in rows:
        results["changes"] = changes | {"batches": [batch_size, other_batch], "largest_gap": largest_gap}
    if "suggest" in rows:
        shapes = [(30, 3), (40, 4)]
        results["suggest"] = {f"{a}x{b}": suggest_seconds(a, b, this.spec.trials) for a, b in shapes}
    if "search" in rows:
        assert peer is not None
        asked = [this.spec.trials] if arguments.quick else [int(n) for n in arguments.searches.split(",")]
        counts = (arguments.peer_trials, arguments.pipeline_trials)
        results["searches"] = [search_rows(this, n, peer, batch_size, tasks, *counts) for n in asked]
    if "memory" in rows:
        results["memory"] = memory_row(this)
    results["peak_of_this_process"] = peak_memory()
    out = ROOT / "bench-results"
    out.mkdir(exist_ok=True)
    (out / "engine.json").write_text(json.dumps(results, indent=2))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The readable form: medians over the plans; ratios are medians of each plan's own."""
    took = results["seconds"]
    lines = [("", "seconds", "")]
    lines.append(("engine, cold", f"{took['cold']:.2f}", ""))
    lines.append((f"engine, warm ({len(took['engine'])} plans)", f"{statistics.median(took['engine']):.2f}", "1 x"))
    for way in ("resident", "pipeline", "floor", "products"):
        if took[way]:
            ratios = [seconds / ours for seconds, ours in zip(took[way], took["engine"], strict=False)]
            spread = f"{statistics.median(ratios):.2f} x the engine's ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append((way, f"{statistics.median(took[way]):.2f}", spread))
    share = sum(took["stitch"]) / sum(took["engine"])
    lines.append(("stitching, of that", f"{statistics.mean(took['stitch']):.2f}", f"{share:.1%} of the engine's"))
    if "changes" in results:
        row = results["changes"]
        lines.append(("answers other than the peer's", str(row["engine"]), f"of {row['of']}"))
        between = f"of {row['of']}, between batches of {row['batches'][0]} and {row['batches'][1]}"
        lines.append(("the peer's other than its own", str(row["resident"]), between))
    for row in results.get("searches", ()):
        lines.append((f"search of {row['trials']} trials", f"{row['seconds']:.1f}", ""))
        for way in filter(row.__getitem__, ("resident", "pipeline")):
            ratio = f"{row[way] / row['seconds']:.2f} x the search"
            lines.append((f"its trials, {way}", f"{row[way]:.1f}", ratio))
        whole = sum(row["parts"].values())
        lines += [(f"{p} in the search", f"{took:.2f}", f"{took / whole:.1%}") for p, took in row["parts"].items()]
    for name, seconds in results.get("suggest", {}).items():
        lines.append((f"one suggestion, {name}", f"{seconds:.3f}", ""))
    if "memory" in results:
        row = results["memory"]
        lines.append(("peak memory, MB", f"{row['peak'] / 1e6:.0f}", f"bar {row['bar'] / 1e6:.0f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
