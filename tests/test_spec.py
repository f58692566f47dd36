"""Run files: what is accepted, and that every refusal names the key, the value and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from gptailor.errors import UserError
from gptailor.spec.files import build_spec, keys_at, load_spec, parse_spec
from gptailor.spec.records import fields_of, record_of
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Budget
from gptailor.spec.values import parse_duration

MINIMAL = """
name: demo
base_model: models/base
candidates: {math: models/math, code: models/code}
remove: 0.25
objectives: [{benchmark: piqa, metric: acc}]
"""

REFUSALS = [
    ("foo=1", r"foo: unknown key; accepted here: name, base_model"),
    ("objective=1", r"objective: unknown key; did you mean 'objectives'\?"),
    ("budget.mni=5", r"budget\.mni: unknown key; did you mean 'min'\?"),
    ("objectives.0.metricc=acc", r"objectives\.0\.metricc: unknown key; did you mean 'metric'\?"),
    ("base_model=null", r"base_model: must be text \(in quotes, .*\), got nothing"),
    ("name=2024-01-01", r"name: must be text \(in quotes, .*\), got datetime\.date\(2024, 1, 1\)"),
    ("candidates=[a, b]", r"candidates: must be keys with values, such as \{NAME: VALUE\}, got \['a', 'b'\]"),
    ("candidates.math=5", r"candidates\.math: must be text .*, got 5"),
    ("remove=9.5", r"remove: must be a whole number of layers such as 8, or a fraction .*, got 9\.5"),
    ("remove=-1", r"remove: must be a whole number .*, got -1"),
    ("remove=1.0", r"remove: could mean one layer or all of them; write 1 for one layer, .*, got 1\.0"),
    ("remove=.nan", r"remove: must be a whole number .*, got nan"),
    ("remove=true", r"remove: must be a number of layers such as 8, .*, got true"),
    ("remove=many", r"remove: must be a number of layers such as 8, .*, got 'many'"),
    ("remove={}", r"remove: must say one of parameters, memory or speed, or from and to, got {}"),
    ("remove={from: 4}", r"remove: must say both from and to, from one layer on, such as {from: 4, to: 12}, got"),
    ("remove={from: 0, to: 4}", r"remove: must say both from and to, from one layer on"),
    ("remove={from: 4, to: 4}", r"remove: must go from fewer layers to more, .*; write one number alone, got"),
    ("remove={from: 4, to: 12, speed: 2}", r"remove: must say one of parameters, memory or speed, or from and to"),
    ("remove={from: 4, to: many}", r"remove\.to: must be a number of layers such as 8, .*, got 'many'"),
    ("remove={speed: 1.3, memory: 9GB}", r"remove: must say one of parameters, memory or speed, or"),
    ("remove={parameters: 20}", r"remove\.parameters: must be a share such as 20% or 0\.2, got 20"),
    ("remove={memory: 9}", r"remove\.memory: must be an amount such as 9GB or 512MiB, got 9"),
    ("remove={speed: 1}", r"remove\.speed: must be above 1, which is as fast as the dense base, such as 1\.3, got 1"),
    ("remove={share: 1}", r"remove\.share: unknown key; accepted here: parameters, memory, speed, from, to"),
    ("remove=0", r"remove: is 0, but operations lists remove"),
    ("operations=[cut]", r"operations\.0: must be 'remove', 'select', 'merge', 'fold' or 'repair', got 'cut'"),
    ("operations=remove", r"operations: must be a list such as \[A, B\], got 'remove'"),
    (
        "operations=[merge, merge]",
        r"operations: must list each of remove, select, merge, fold, repair at most once, .*, got \['merge'",
    ),
    ("operations=[]", r"operations: must list each of remove, select, merge, fold, repair at most once"),
    ("operations=[select]", r"remove: is 0\.25, but operations does not list remove"),
    ("candidates={}", r"candidates: selecting or merging needs at least one"),
    ("candidates={math: x}", r"operations: merge needs two or more candidates; with one, use \[remove, select\]"),
    ("candidates.base=x", r"candidates: 'base' cannot name a candidate"),
    ("candidates={a+b: x, c: y}", r"candidates: 'a\+b' cannot name a candidate"),
    ("merge.factor=[1, 0]", r"merge\.factor: must be \[low, high\]"),
    ("merge.factor=0.5", r"merge\.factor: must be a list such as \[A, B\], got 0\.5"),
    (
        "merge.factor=[0, .nan]",
        r"merge\.factor: must be \[low, high\] with -2\.0 <= low <= high <= 4\.0, got \[0, nan\]",
    ),
    ("merge.factor=['0', 1]", r"merge\.factor\.0: must be a number, got '0'"),
    ("merge.method=TIES", r"merge\.method: must be the name of one of mergekit's methods, such as .*, got 'TIES'"),
    ("merge.parameters={density: .inf}", r"merge\.parameters: density must be a finite number, true or false, got"),
    ("merge.parameters={density: half}", r"merge\.parameters: density must be a finite number, true or false, got"),
    ("output_scale=[2, 1]", r"output_scale: must be \[low, high\] with 0\.0 <= low <= high <= 4\.0, got \[2, 1\]"),
    ("output_scale=[-1, 1]", r"output_scale: must be \[low, high\] with 0\.0 <= low"),
    ("output_scale=1.0", r"output_scale: must be a list such as \[A, B\], got 1\.0"),
    ("budget={min: 100, max: 10}", r"budget: min \(100\) must not be above max \(10\)"),
    ("budget=100", r"budget: must be keys with values: min, max, eta, got 100"),
    ("budget.min=0", r"budget\.min: must be greater than or equal to 1, got 0"),
    ("budget.max=10.5", r"budget\.max: must be a whole number, got 10\.5"),
    ("budget.eta=1", r"budget\.eta: must be greater than or equal to 2, got 1"),
    ("objectives=[]", r"objectives: .*at least 1 item"),
    (
        "objectives=[piqa]",
        r"objectives\.0: must be keys with values: benchmark, metric, split, num_fewshot, got 'piqa'",
    ),
    ("objectives.0.benchmark=''", r"objectives\.0\.benchmark: .*at least 1 character, got ''"),
    ("objectives.0.split=dev", r"objectives\.0\.split: must be train, validation or test, or .*, got 'dev'"),
    ("objectives.0.split=validation[9:9]", r"objectives\.0\.split: must be train, .*, got 'validation\[9:9\]'"),
    ("objectives.0.num_fewshot=-1", r"objectives\.0\.num_fewshot: must be greater than or equal to 0, got -1"),
    ("objectives=[{benchmark: a}, {benchmark: a}]", r"objectives: the same benchmark and metric is listed twice"),
    ("held_out=[{benchmark: piqa, split: validation}]", r"held_out\.0: piqa on its validation split is an objective"),
    ("held_out=[{benchmark: a}, {benchmark: a}]", r"held_out: the same benchmark, metric and split is listed twice"),
    ("include_path=tasks", r"include_path: must be a list such as \[A, B\], got 'tasks'"),
    ("trials=0", r"trials: must be greater than or equal to 1, got 0"),
    ("trials='60'", r"trials: must be a whole number, got '60'"),
    ("trials=6.5", r"trials: must be a whole number, got 6\.5"),
    ("trials=true", r"trials: must be a whole number, got true"),
    ("walltime=3600", r"walltime: must be text .*, got 3600"),
    ("walltime=0s", r"walltime: must be longer than nothing, such as 90s, .*, got '0s'"),
    ("walltime=-2h", r"walltime: must be a duration such as 90s, .*, got '-2h'"),
    ("walltime=2x", r"walltime: must be a duration such as 90s, 45m, 2h or 1h30m, got '2x'"),
    ("seed=-1", r"seed: must be greater than or equal to 0, got -1"),
    ("device=tpu", r"device: must be auto, cpu, mps, cuda or a certain GPU such as cuda:1, got 'tpu'"),
    ("device=cuda:-1", r"device: must be auto, .*, got 'cuda:-1'"),
    ("dtype=int8", r"dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
    ("batch_size=0", r"1 problem\n  batch_size: must be auto, or a number of rows from 1 to 4096, got 0"),
    ("batch_size=big", r"1 problem\n  batch_size: must be auto, .*, got 'big'"),
    ('base_model="a\\0b"', r"base_model: has the character '\\x00', which cannot be in a path here; rename the folder"),
    ('candidates.math="a\\nb"', r"candidates\.math: has the character '\\n', which cannot be in a path here"),
    ('include_path=["a\\x1bb"]', r"include_path\.0: has the character '\\x1b', which cannot be in a path here"),
    (f"base_model={'a' * 256}", r"base_model: has a name of more than 255 bytes, which no folder has"),
    (
        "chat_template_args={enable_thinking: false}",
        r"chat_template_args: are settings of the chat template; set",
    ),
    ("chat_template_args={effort: [low]}", r"chat_template_args: effort must be true, false, a number or text, got"),
    ("trust_remote_code=1", r"trust_remote_code: must be true or false, got 1"),
    ('name="a\\tb"', r"name: must have a visible character and no control characters"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[change for change, _ in REFUSALS])
def test_refusals_name_the_key_and_the_value(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_spec(MINIMAL, [change])


WHOLE = (
    "held_out=[{benchmark: arc}]",
    "selection=[{benchmark: boolq}]",
    "merge={method: ties}",
    "budget={min: 9}",
    "remove={speed: 2}",
    "workers={slurm: {jobs: 2}}",
)
"""What makes every record of a run file stand in MINIMAL."""


def nested(record: type[BaseModel] = RunSpec, path: str = "") -> Iterator[tuple[str, type[BaseModel] | None]]:
    """Every key of a run file, such as `selection.0.metric`, with the record whose keys stand below it."""
    for key, field in fields_of(record).items():
        below = record_of(field.annotation)
        is_list = below is not None and "tuple" in str(field.annotation)
        yield f"{path}{key}", below
        if below is not None:
            yield from nested(below, f"{path}{key}.0." if is_list else f"{path}{key}.")


def problems(*changes: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_spec(MINIMAL, [*WHOLE, *changes])
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("path", [path for path, _ in nested()])
def test_every_key_misspelt_is_answered_with_the_keys_of_its_level(path: str) -> None:
    parents, _, key = path.rpartition(".")
    level = keys_at(parents.split(".") if parents else ())
    assert key in level
    (line,) = problems(f"{path}qx=1")
    close = [known for known in level if line == f"{path}qx: unknown key; did you mean {known!r}?"]
    assert close or line == f"{path}qx: unknown key; accepted here: {', '.join(level)}"
    (line,) = problems(f"{f'{parents}.' if parents else ''}zzzz=1")
    assert line.endswith(f"zzzz: unknown key; accepted here: {', '.join(level)}")


@pytest.mark.parametrize("path", [path for path, _ in nested()])
@pytest.mark.parametrize("wrong", ["{qqqq: {}}", "[[{}]]"])
def test_every_key_of_a_wrong_type_is_named(path: str, wrong: str) -> None:
    assert all(line.startswith(path) and ": " in line for line in problems(f"{path}={wrong}"))


def test_records_that_are_none() -> None:
    assert problems("selection=[3]") == [
        "selection.0: must be keys with values: benchmark, metric, split, num_fewshot, got 3"
    ]
    (line,) = problems("workers.slurm=7")
    assert line.startswith("workers.slurm: must be keys with values: jobs, cores, memory")
    assert problems("workers.slurm.queu=x") == ["workers.slurm.queu: unknown key; did you mean 'queue'?"]


def test_every_benchmark_of_a_run_file_is_known() -> None:
    spec = parse_spec(MINIMAL, [*WHOLE])
    assert [one.benchmark for one in spec.benchmarks] == ["piqa", "arc", "boolq"]


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(UserError, match=r"3 problems\n.*seed.*\n.*\n|3 problems") as caught:
        parse_spec(MINIMAL, ["seed=-1", "trials=0", "foo=1"])
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trials", r"--set trials: expected key=value"),
        ("objectives.7.metric=acc", r"'7' must be a list index from 0 to 0"),
        ("name.first=x", r"--set name.first=x: name is a single value"),
        ("trials=[", r"--set trials: not valid YAML"),
    ],
)
def test_changes_that_do_not_fit(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_spec(MINIMAL, [change])


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder; name a YAML file"):
        load_spec(tmp_path)
    for content, message in [
        (b"", "got an empty file"),
        (b"- a", "got a list"),
        (b"a: [", r"not valid YAML at line \d+"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * 300_000, "larger than 262 kB"),
        (b"name: &a [*a]", "problem"),
        (b"trials: 9\ntrials: 10", "not valid YAML at line 2, column 1: 'trials' is given twice"),
        (b"candidates:\n  math: a\n  math: b", "line 3, column 3: 'math' is given twice"),
        (b"name: 2024-13-45", "not valid YAML"),
    ]:
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_spec(path)


def test_round_trip_and_changes() -> None:
    spec = parse_spec(MINIMAL, ["trials=60", "budget.max=243", "budget.min=27", "output_scale=[0.8, 1.2]"])
    assert parse_spec(spec.to_yaml()) == spec
    assert (spec.trials, spec.budget.rungs, spec.output_scale) == (60, (27, 81, 243), (0.8, 1.2))


def test_rungs_are_hyperbands() -> None:
    assert Budget().rungs == (111, 333, 1000)
    assert Budget(min=30, max=270).rungs == (30, 90, 270)
    assert Budget(min=50, max=50).rungs == (50,)
    assert Budget(min=1, max=81).rungs == (1, 3, 9, 27, 81)


@pytest.mark.parametrize(("asked", "n_layers", "expected"), [(8, 30, 8), (0.25, 30, 8), ("25%", 12, 3), (0.1, 10, 1)])
def test_a_fraction_is_rounded_up(asked: float | str, n_layers: int, expected: int) -> None:
    data = {"name": "x", "base_model": "b", "candidates": {"a": "p", "c": "q"}, "objectives": [{"benchmark": "t"}]}
    assert build_spec(data | {"remove": asked}).n_removed(n_layers) == expected


def test_too_many_layers_removed() -> None:
    spec: RunSpec = parse_spec(MINIMAL, ["remove=12"])
    with pytest.raises(UserError, match=r"remove: 12 takes 12 of 12 layers; at least one must stay"):
        spec.n_removed(12)


def test_durations() -> None:
    assert parse_duration("1h30m") == 5400
    assert parse_duration("90s") == 90
