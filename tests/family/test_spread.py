"""One base over several devices: the map, what follows it, who visits whom, and what is said of it before the start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluate_tools import GENERATION, evaluator, opened, rows, write_task

from gptailor.errors import UserError
from gptailor.evaluate.attention import PackMasks, attending_by_pack
from gptailor.evaluate.packing import build_pack
from gptailor.family.models import Family, open_family
from gptailor.family.preflight import preflight
from gptailor.family.residence import n_bytes, pick_devices, rooms_for, settle, tensors_of
from gptailor.family.spread import Room, home_of, is_spread, let_states_follow, place_layers, spread
from gptailor.launch.devices import Device, device_of, devices_of, places
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.scoring.cluster.start import _only_gpus, start
from gptailor.scoring.memory import Memory, predict_memory
from gptailor.search import engine
from gptailor.spec.sections import Benchmark
from gptailor.stitch.stitcher import Stitcher
from gptailor.store.folder import RunFolder

CPU, META = torch.device("cpu"), torch.device("meta")
"""Torch's `meta` keeps no data but knows what lives there: a second device on any machine."""
GB = 10**9
LLAMA_70B = ([1_711_000_000] * 80, 4_202_000_000)


# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rooms", "counts"),
    [
        ([Room(80)], [6]),
        ([Room(80), Room(80)], [6, 0]),
        ([Room(60), Room(60)], [2, 4]),
        ([Room(100, 30), Room(100, 30)], [2, 4]),  # a reserve on each is worth more than a base in one place
        ([Room(100, 30)], [6]),  # without another device, the base takes from the reserve
        ([Room(30), Room(100)], [0, 6]),
        ([Room(60, 25), Room(60, 25)], [2, 4]),  # with half of the reserves, if there is no other way
        ([Room(79)], None),
        ([Room(40), Room(30)], None),
        ([Room(19), Room(100)], None),  # embeddings and head are on the first device, or nowhere
    ],
)
def test_where_layers_live(rooms: list[Room], counts: list[int] | None) -> None:
    """Six layers of 10 bytes, and 20 bytes that are no layer."""
    named = dict(zip("ab", rooms, strict=False))
    homes = place_layers([10] * 6, 20, named)
    assert (homes and [homes.count(name) for name in named]) == counts  # type: ignore[misc]
    assert homes is None or homes == sorted(homes), "neighbours live together"


@pytest.mark.parametrize(("n", "free"), [(3, 75), (4, 75), (8, 75), (2, 141), (2, 76)])
def test_a_70b_base_is_shared_evenly(n: int, free: int) -> None:
    """In bfloat16, 141 GB; a quarter of each device is left to trials where that is possible."""
    layers, others = LLAMA_70B
    rooms = {f"cuda:{index}": Room(free * GB, free * GB // 4) for index in range(n)}
    homes = place_layers(layers, others, rooms)
    assert homes is not None and list(dict.fromkeys(homes)) == list(rooms)
    used = [homes.count(name) * layers[0] + (others if name == "cuda:0" else 0) for name in rooms]
    assert max(used) < free * GB and max(used) - min(used) < 9 * layers[0]
    assert free == 76 or max(used) <= 0.75 * free * GB


def test_a_70b_base_does_not_fit_on_one_h100() -> None:
    assert place_layers(*LLAMA_70B, {"cuda:0": Room(79 * GB, 20 * GB)}) is None


# --- what follows it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_family: Path, make_spec: Callable[..., Any]) -> Family:
    return open_family(make_spec(tiny_family))


@pytest.fixture
def family(tiny_family: Path, make_spec: Callable[..., Any]) -> Family:
    return open_family(make_spec(tiny_family))


PLANS = {
    "dense": StitchPlan.dense(6),
    "fewer": StitchPlan.without([1, 4], 6),
    "mixed": StitchPlan(
        6,
        (
            LayerChoice(0, ("math",)),
            LayerChoice(1, ("math", "code"), "task_arithmetic", 0.4),
            LayerChoice(2, folds=((3, 0.5),)),
            LayerChoice(4, ("code", "prose"), "ties", 0.7),
            LayerChoice(5, ("math", "prose"), "task_arithmetic", 0.3, base_layer=4),
        ),
    ),
}


def test_what_is_spread_scores_as_before(plain: Family, family: Family, tmp_path: Path) -> None:
    """Both halves live on the CPU here, with all that would move what they are given."""
    write_task(tmp_path, "choice", test=rows(4, 10, context=(3, 30), options=(2, 3)))
    write_task(tmp_path, "writing", text=GENERATION, validation=rows(5, 4))
    benchmarks = opened(
        tmp_path,
        plain.tokenizer,
        Benchmark(benchmark="choice", metric="choice_prob", split="test"),
        Benchmark(benchmark="writing", metric="bleu,first"),
    )
    spread(family.model, [CPU] * 6, CPU)
    before, after = Stitcher(plain), Stitcher(family)
    engines = [evaluator(benchmarks, plain.tokenizer) for _ in range(2)]
    for name, plan in PLANS.items():
        models = before.stitch(plan), after.stitch(plan)
        assert [is_spread(model) for model in models] == [False, True], name
        for benchmark in benchmarks:
            there, here = (
                engine.items(model, benchmark, 0, benchmark.n_examples)
                for engine, model in zip(engines, models, strict=True)
            )
            assert here == (there if benchmark is benchmarks[1] else pytest.approx(there, abs=1e-4)), name
    assert [engine.path for engine in engines] == ["direct", "tree"]


def test_what_layers_are_given_is_moved_to_them(family: Family, tmp_path: Path) -> None:
    """Layers 3 to 5 live on meta, which gives nothing back: the model is left where its last layer has run."""
    write_task(tmp_path, "choice", test=rows(4, 6, context=(3, 30), options=(2, 3)))
    benchmark = opened(tmp_path, family.tokenizer, Benchmark(benchmark="choice", metric="acc", split="test"))[0]
    pack = build_pack(benchmark.examples, range(6))
    model: Any = family.model
    spread(model, [CPU] * 3 + [META] * 3, CPU)
    given: list[tuple[set[str], int]] = []
    packs = set()

    def look(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [*args, *kwargs.values(), *(kwargs["position_embeddings"])]
        there = [value.device.type for value in tensors if isinstance(value, torch.Tensor)]
        masks = kwargs["gptailor_pack"]
        packs.add(id(masks))
        found = {masks.pack.tokens.device.type, masks.pack.buckets[0].keys.device.type, masks.pack.places.device.type}
        given.append(({*there, *found}, len(there)))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
    model.model.norm.register_forward_pre_hook(leave, prepend=True)
    with torch.inference_mode(), attending_by_pack(model), pytest.raises(Left):
        masks = PackMasks(pack, model.dtype, by_buckets=True)
        model(input_ids=pack.tokens[None], position_ids=pack.positions[None], use_cache=False, gptailor_pack=masks)
    assert [there for there, _ in given] == [{"cpu"}] * 3 + [{"meta"}] * 3
    assert min(n for _, n in given) >= 3, "hidden states, cosine, sine"
    assert len(packs) == 2, "one copy a device for one forward"


class Left(Exception):
    pass


def leave(*_given: object) -> None:
    raise Left


def test_what_follows_the_layers_brings_the_states_back(family: Family) -> None:
    let_states_follow(family.model, META)
    norm: Any = family.model.get_submodule("model.norm").to(META)
    head: Any = family.model.get_submodule("lm_head").to(META)
    states = torch.zeros(1, 2, family.model.config.hidden_size)
    assert norm(states).device == META and head(states).device == META


def test_a_merge_happens_where_its_layer_lives(family: Family) -> None:
    """Layers that are folded into, or merged over, one of another device are moved to it."""
    spread(family.model, [CPU] * 3 + [META] * 3, CPU)
    names = {name: [family.layer(index, name) for index in range(6)] for name in family.names}
    half = Family(family.model, family.tokenizer, names, family.preflight, family.renumbering, CPU, family.spec, {})
    stitcher = Stitcher(half, cache_bytes=10**6)
    for choice in (
        LayerChoice(4, folds=((1, 0.5),)),
        LayerChoice(1, ("math", "code"), "task_arithmetic", 0.4, base_layer=4),
        LayerChoice(1, ("math", "code"), "linear", 0.4, base_layer=4),
    ):
        assert {tensor.device for tensor in tensors_of([stitcher.layer(choice)])} == {META}
    home = stitcher.layer(LayerChoice(1, ("math", "code"), "task_arithmetic", 0.4))
    assert {tensor.device for tensor in tensors_of([home])} == {CPU}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen3"])
def test_any_architecture_is_spread(model_type: str) -> None:
    from helpers.families import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before = model(ids).logits
        let_states_follow(model, CPU)
        assert torch.equal(model(ids).logits, before)


# --- base and candidates ----------------------------------------------------------------------------------------------


def test_candidates_live_beside_the_base_or_visit_it(family: Family) -> None:
    """Half of the base has to live on the second device; there is room for two layers of one candidate more."""
    layers = {name: [family.layer(i, name) for i in range(6)] for name in family.names}
    layer = n_bytes(tensors_of([family.layer(0)]))
    others = n_bytes(tensors_of([family.model])) - 6 * layer
    own = layer - 2 * 32 * 4  # the norms are the base's
    rooms = {CPU: Room(others + 3 * layer), META: Room(4 * layer + 2 * own)}
    with pytest.raises(
        UserError, match=r"device: the base needs \d+ kB, cpu has \d+ kB free, meta has \d+ kB free; use"
    ):
        settle(family.model, dict(layers), rooms | {META: Room(2 * layer)})
    visitors = settle(family.model, layers, rooms)
    homes = [home_of(layer) for layer in family.model.model.layers]
    assert homes == [CPU] * 2 + [META] * 4 and is_spread(family.model)
    assert {tensor.device for tensor in tensors_of([family.model.lm_head, family.model.model.norm])} == {CPU}
    settled = Family(
        family.model, family.tokenizer, layers, family.preflight, family.renumbering, CPU, family.spec, {}, visitors
    )
    assert visitors[META].capacity == 2 * own, "no candidate's four layers fit"
    for name in family.names:
        assert home_of(layers[name][2]) == CPU, "it waits on the host"
        guests = [settled.layer(index, name) for index in range(6)]
        assert [{t.device for t in tensors_of([guest])} for guest in guests] == [{home} for home in homes]
    assert visitors[META].n_bytes <= 2 * own


def test_further_devices_are_looked_at_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_devices("cpu") == [CPU] and rooms_for(10**15, [CPU])[CPU].free > 10**15, "a host is never asked"
    monkeypatch.setattr("gptailor.family.residence._room", lambda _device: Room(100, 25))
    devices = [torch.device("cuda", index) for index in range(3)]
    assert list(rooms_for(75, devices)) == devices[:1]
    assert list(rooms_for(76, devices)) == devices
    assert list(rooms_for(76, devices[1:2])) == devices[1:2]


def test_a_certain_gpu_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptailor.family.residence.pick_device", lambda _wanted: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [device.index for device in pick_devices("auto")] == [0, 1, 2]
    assert [device.index for device in pick_devices("cuda:0")] == [0]


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """gpus(8, free): as many made-up GPUs of so many bytes, all of them free."""

    def make(n: int, free: float) -> None:
        found = [Device(f"cuda:{index}", "GPU", int(free), int(free)) for index in range(n)]
        monkeypatch.setattr("gptailor.launch.devices._cuda", lambda: iter(found))

    return make


@pytest.mark.parametrize(
    ("n", "workers", "named"),
    [
        (8, "auto", [f"cuda:{index}" for index in range(8)]),
        (8, 8, [f"cuda:{index}" for index in range(8)]),
        (8, 2, ["cuda:0..3", "cuda:4..7"]),
        (8, 3, ["cuda:0..1", "cuda:2..3", "cuda:4..5"]),
        (8, 1, ["cuda:0..7"]),
        (8, 5, [f"cuda:{index}" for index in range(5)]),
        (2, 3, ["cuda:0", "cuda:1", "cuda:0-2"]),
    ],
)
def test_workers_divide_the_gpus(gpus: Callable[..., Any], n: int, workers: Any, named: list[str]) -> None:
    gpus(n, GB)
    assert places(workers, "auto") == named


def test_a_worker_sees_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cuda:4..6") == ["cuda:4", "cuda:5", "cuda:6"] and device_of("cuda:4..6") == "cuda:4"
    assert devices_of("cuda:1-2") == ["cuda:1"] and devices_of("cpu-2") == ["cpu"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _only_gpus("cuda:2..3") == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,7,5")
    assert _only_gpus("cuda:1..2") == {"CUDA_VISIBLE_DEVICES": "GPU-b,7"}
    assert _only_gpus("cuda:3-2") == {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.alone
def test_dask_starts_workers_that_have_several_gpus(
    gpus: Callable[..., Any], tiny_family: Path, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    gpus(4, GB)
    cluster = start(make_spec(tiny_family, device="auto", workers={"local": 2}), RunFolder.of(tmp_path, "run-1"))
    try:
        with cluster.connect() as client:
            client.wait_for_workers(2, timeout=60)
            seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
            names = {facts["name"]: seen[at] for at, facts in client.scheduler_info(n_workers=-1)["workers"].items()}
    finally:
        cluster.close()
    assert names == {"cuda:0..1": "0,1", "cuda:2..3": "2,3"} and cluster.threads is None


def test_a_run_waits_for_all_that_it_computes_on(
    gpus: Callable[..., Any], tiny_family: Path, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tiny_family, device="auto", workers={"local": 2})
    gpus(5, GB)
    assert list(engine._device_names(spec)) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    here = make_spec(tiny_family, device="auto")
    base = preflight(here).model_bytes["base"]
    for module in ("gptailor.search.engine", "gptailor.family.residence"):
        monkeypatch.setattr(f"{module}.pick_devices", lambda _: [torch.device("cuda", index) for index in range(3)])
    gpus(3, 2 * base)
    assert list(engine._device_names(here)) == ["cuda:0"]
    gpus(3, 0.8 * base)
    assert list(engine._device_names(here)) == ["cuda:0", "cuda:1", "cuda:2"]


# --- said before the start --------------------------------------------------------------------------------------------

PARTS = {"base": 141 * GB, "candidates": 411 * GB, "working memory": 2 * GB}


@pytest.mark.parametrize(
    ("memory", "verdict"),
    [
        (
            Memory("cuda:0", {"base": 141 * GB}, 225 * GB, (75 * GB,) * 3),
            "fits, split over 3 GPUs: 141.00 GB needed, 3 x 75.00 GB free",
        ),
        (
            Memory("cuda:0", PARTS, 225 * GB, (75 * GB,) * 3),
            "fits, split over 3 GPUs, with candidates kept in host memory, which is slower: 554.00 GB needed, "
            "3 x 75.00 GB free",
        ),
        (
            Memory("cuda:0", PARTS, 600 * GB, (140 * GB, 460 * GB)),
            "fits, split over 2 GPUs: 554.00 GB needed, 140.00 GB + 460.00 GB free",
        ),
        (
            Memory("cuda:0", PARTS, 80 * GB, (40 * GB,) * 2, is_refused=True),
            "does not fit: 554.00 GB needed, 2 x 40.00 GB free; choose another device, a smaller model or fewer "
            "candidates",
        ),
        (
            Memory("cuda:0", {"base": 141 * GB}, 142 * GB, (71 * GB,) * 2, is_refused=True),
            "does not fit: 141.00 GB needed, 2 x 71.00 GB free; choose another device, a smaller model or fewer "
            "candidates",
        ),
    ],
)
def test_verdicts(memory: Memory, verdict: str) -> None:
    assert memory.verdict == verdict


def test_memory_is_predicted_for_the_gpus_of_a_worker(
    gpus: Callable[..., Any], tiny_family: Path, make_spec: Callable[..., Any]
) -> None:
    spec = make_spec(tiny_family, device="auto", workers={"local": 2})
    found = replace(preflight(spec), vocab_size=1, hidden_size=1)  # no working memory to speak of
    base = found.model_bytes["base"]
    layer = base // 8
    gpus(2, 10 * base)
    one = predict_memory(spec, found)
    assert one.device == "cuda:0" and not one.split and one.free == 10 * base
    gpus(4, base)
    two = predict_memory(spec, found)
    assert two.split == (base, base) and two.free == 2 * base and not two.is_refused
    assert two.verdict.startswith("fits, split over 2 GPUs")
    gpus(4, 2 * layer)
    none = predict_memory(spec, found)
    assert none.is_refused and none.verdict.startswith("does not fit:")
    gpus(2, 2 * layer)
    assert predict_memory(spec, found).verdict.startswith("does not fit:"), "each worker has one"
