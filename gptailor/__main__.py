"""The command line: one thin function a command. `python -m gptailor --help` lists them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptailor.errors import UserError
from gptailor.heap import begin_in_huge_pages
from gptailor.versions import VERSION

if TYPE_CHECKING:
    from gptailor.launch.events import Say
    from gptailor.spec.sections import Repair
    from gptailor.store.folder import RunFolder

OK, USER_ERROR, RUN_FAILED, INTERRUPTED = 0, 2, 1, 130
WARM_ENGINES, SERIES = "warm-engines", "series"
"""launch.warm.COMMAND and launch.series.COMMAND, which are no commands for people."""
MODEL_WORK = {"redundancy", "heal", "generate", "evaluate", "measure", "export", "stitch"}
"""Commands that compute in this very process; engines are children."""
ENGINE_IMPORTS = (
    "gptailor.search.engine",
    "lm_eval.tasks",
    "sklearn.ensemble",
    "transformers.models.llama.modeling_llama",
)
"""What an engine has imported when its first trial begins, of what takes long."""


def entry() -> int:
    """The command `gptailor`, and `python -m gptailor`."""
    if sys.argv[1:2] and sys.argv[1] in MODEL_WORK:
        begin_in_huge_pages()
    return main()


def main(argv: list[str] | None = None) -> int:
    """Run a command. 0: done; 1: the run failed; 2: something asked is wrong; 130: interrupted or stopped."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] in ([WARM_ENGINES], [SERIES]):
        return _forks(given[0], int(given[1]))
    for word in given:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # Python's stand-in for a byte that is no UTF-8
            print(f"gptailor: argument {word!a}: is not UTF-8 text; rename the file", file=sys.stderr)
            return USER_ERROR
    arguments = command_parser().parse_args(given)
    if arguments.runs is None:
        from gptailor.store.folder import runs_root  # not before it is asked for: DuckDB comes with it

        arguments.runs = str(runs_root())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    try:
        status = arguments.function(arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while Python exits
        return status
    except UserError as problem:
        return _refuse(arguments, str(problem))
    except (PermissionError, NotADirectoryError, IsADirectoryError) as problem:  # a path that is not what it should be
        return _refuse(arguments, f"{problem.filename}: {(problem.strerror or str(problem)).lower()}")
    except KeyboardInterrupt:
        print("gptailor: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _refuse(arguments: argparse.Namespace, why: str) -> int:
    if getattr(arguments, "events", False):
        from gptailor.launch.events import Event

        _say(arguments)(Event(error=why))
    else:
        print(f"gptailor: {why}", file=sys.stderr)
    return USER_ERROR


def search(arguments: argparse.Namespace) -> int:
    """Search from a run file: check it, make its folder, run it here and report."""
    from gptailor.launch.engine import prepare
    from gptailor.spec.files import load_spec

    folder = prepare(arguments.runs, load_spec(arguments.run_file, arguments.set))
    return _run_here(folder, arguments)


def baseline(arguments: argparse.Namespace) -> int:
    """Score what published pruning methods give for a run file, on the base and on each candidate."""
    from gptailor.launch.engine import prepare
    from gptailor.spec.files import build_spec, load_spec
    from gptailor.spec.sections import Baseline

    names = [str(name) for name in Baseline] if arguments.names == "all" else arguments.names.split(",")
    spec = load_spec(arguments.run_file, arguments.set)
    title = f"{spec.name[:50]}, {'baselines' if len(names) > 1 else names[0]}"
    changed = spec.model_dump(mode="json") | {"baselines": names, "name": title}
    if (asked := _repair(arguments)) is not None:
        changed["operations"] = list(dict.fromkeys([*changed["operations"], "repair"]))
        changed["repair"] = asked.model_dump(mode="json")
    folder = prepare(arguments.runs, build_spec(changed, "baseline"))
    return _run_here(folder, arguments)


def experiment(arguments: argparse.Namespace) -> int:
    """Run a set of runs that differ in a few keys, one after another, and show one table of them."""
    from gptailor.commands.experiment import is_finished, load_experiment, run_experiment

    asked = load_experiment(arguments.file, arguments.run, arguments.set)
    if arguments.dry:
        print("\n".join(asked.runs))
        return OK
    folders = run_experiment(asked, arguments.runs, lambda text: print(text, flush=True))
    if arguments.report:
        from gptailor.results.comparison import write_comparison

        begun = {label: folder for label, folder in folders.items() if folder.exists()}
        print(write_comparison(asked.name, list(begun.values()), Path(arguments.report), list(begun)))
    return OK if all(map(is_finished, folders.values())) else RUN_FAILED


def engine(arguments: argparse.Namespace) -> int:
    """Run, or go on with, a run that is prepared (what the dashboard starts)."""
    return _engine(_at_home(arguments))


def runs(arguments: argparse.Namespace) -> int:
    """List the saved runs."""
    from gptailor.results.run_list import runs_json
    from gptailor.results.story_text import runs_text

    print(json.dumps(runs_json(arguments.runs), indent=2) if arguments.json else runs_text(arguments.runs))
    return OK


def show(arguments: argparse.Namespace) -> int:
    """Tell a run's story: its state, its trials, its front. For a plan's file (.json): draw its layers."""
    if arguments.run_id.endswith(".json"):
        from gptailor.formats.published import read_plan, strip_text

        plan = read_plan(arguments.run_id)
        print(json.dumps(plan.to_json(), indent=2) if arguments.json else strip_text(plan))
        return OK
    from gptailor.results.story import run_json
    from gptailor.results.story_text import run_text

    story = run_json(_folder(arguments))
    print(json.dumps(story, indent=2) if arguments.json else run_text(story))
    return OK


def check(arguments: argparse.Namespace) -> int:
    """Preflight of a run file: does the family fit, do the benchmarks open, what will it take."""
    from gptailor.commands.check import check_json, check_text
    from gptailor.spec.files import load_spec

    spec = load_spec(arguments.run_file, arguments.set)
    print(json.dumps(check_json(spec, arguments.runs)) if arguments.json else check_text(spec, arguments.runs))
    return OK


def redundancy(arguments: argparse.Namespace) -> int:
    """Before a search: which layers of the base and of each candidate look cheap, and whether candidates conflict."""
    from gptailor.launch.warm import collector_at_rest

    with collector_at_rest():
        from gptailor.commands.redundancy import redundancy as look
        from gptailor.commands.redundancy import tell
    from gptailor.spec.files import load_spec
    from gptailor.store.asked import spec_of

    is_file = Path(arguments.run).suffix in (".yaml", ".yml")
    arguments.run_id = arguments.run
    folder = None if is_file else _at_home(arguments)
    spec = load_spec(arguments.run, arguments.set) if folder is None else spec_of(folder, arguments.set)
    say = _say(arguments)
    runs = arguments.runs if folder is None else folder.root
    tell(look(spec, say, runs, arguments.examples, folder), spec, say)
    return OK


def export(arguments: argparse.Namespace) -> int:
    """Write a configuration's model as a plain Hugging Face folder, or its plan as a file for mergekit."""
    from gptailor.commands.export import export_mergekit, export_model

    folder, config_id, repair = _at_home(arguments), arguments.config_id, _repair(arguments)
    out = Path(arguments.out)
    if arguments.dry_run and not arguments.push:
        raise UserError("export: --dry-run lists what --push would send; add --push OWNER/NAME")
    if arguments.form == "mergekit":
        if arguments.push:
            raise UserError("export: --push sends a model's folder; leave --as mergekit out")
        if repair is not None:
            raise UserError("export: mergekit cannot repair; leave --as mergekit out")
        export_mergekit(folder, config_id, out, _say(arguments))
    else:
        say, push, dry_run = _say(arguments), arguments.push, arguments.dry_run
        export_model(folder, config_id, out, say, push=push, dry_run=dry_run, repair=repair)
    return OK


def heal(arguments: argparse.Namespace) -> int:
    """Heal a plan by a short distillation, write its model as a plain folder, and keep it as a subject to judge."""
    from gptailor.launch.warm import collector_at_rest

    with collector_at_rest():
        from gptailor.commands.heal import heal as train
    from gptailor.heal.asked import HealAsked, parse_count

    folder = _at_home(arguments)
    asked = HealAsked(
        texts=arguments.texts,
        tokens=parse_count(arguments.tokens),
        minutes=arguments.minutes,
        lora=arguments.lora,
        rate=arguments.rate,
        teacher=arguments.teacher,
        seed=arguments.seed,
    )
    done = train(folder, arguments.config_id, Path(arguments.out), asked, _say(arguments), arguments.device)
    return OK if done else INTERRUPTED


def report(arguments: argparse.Namespace) -> int:
    """Write a run, or several side by side, as one HTML page that needs nothing else."""
    if len(arguments.run_ids) == 1:
        from gptailor.results.report import write_report

        folder = _folder(arguments, arguments.run_ids[0])
        print(write_report(folder, Path(arguments.out or f"{folder.run_id}.html")))
        return OK
    from gptailor.results.comparison import write_comparison

    folders = [_folder(arguments, run_id) for run_id in arguments.run_ids]
    print(write_comparison("Runs side by side", folders, Path(arguments.out or "comparison.html")))
    return OK


def tables(arguments: argparse.Namespace) -> int:
    """Write all tables of a run as Parquet or CSV files, with a manifest of their rows and checksums."""
    from gptailor.store.sharing import export_tables

    print(export_tables(_folder(arguments), arguments.out, arguments.format))
    return OK


def stitch(arguments: argparse.Namespace) -> int:
    """Build the model of a plan's file, ours or one that auto-merge-llm published, as a Hugging Face folder."""
    from gptailor.commands.export import stitch_plan

    stitch_plan(
        arguments.plan,
        arguments.family,
        Path(arguments.out),
        _say(arguments),
        base_at=arguments.base_layer,
        repair=_repair(arguments),
    )
    return OK


def generate(arguments: argparse.Namespace) -> int:
    """Let the dense base and a configuration's model continue a prompt."""
    from gptailor.commands.export import generate as write

    write(
        _at_home(arguments),
        arguments.config_id,
        arguments.prompt,
        _say(arguments),
        max_tokens=arguments.tokens,
        device=arguments.device,
        chat=not arguments.plain,
    )
    return OK


def pause(arguments: argparse.Namespace) -> int:
    """Let the run finish its trial and wait."""
    from gptailor.launch.engine import is_alive, request

    folder = _folder(arguments)
    if not is_alive(folder):
        raise UserError(f"run {folder.run_id}: no engine is at work on it, so there is nothing to pause")
    request(folder, "pause")
    print("it will pause after the current trial; `python -m gptailor resume` lifts the pause")
    return OK


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a paused, stopped or lost run, in the background."""
    from gptailor.launch import engine

    folder = _folder(arguments)
    was_paused = engine.asked(folder, "pause")
    pid = engine.resume(folder)
    if pid is not None:
        print(f"its engine runs as process {pid}; log: {folder.log}")
    else:
        print("the pause is lifted" if was_paused else "its engine is at work already")
    return OK


def stop(arguments: argparse.Namespace) -> int:
    """Stop a run; what it scored stays, and `resume` goes on with it."""
    from gptailor.launch import engine

    print(engine.stop(_folder(arguments)))
    return OK


def extend(arguments: argparse.Namespace) -> int:
    """Give a run more trials or hours, and go on with it in the background."""
    from gptailor.launch.extend import extend as more

    print(more(_at_home(arguments), arguments.trials, arguments.walltime))
    return OK


def repair(arguments: argparse.Namespace) -> int:
    """Rebuild a run's database from its journal."""
    from gptailor.launch.engine import EngineLock
    from gptailor.store.repair import rebuild

    folder = _folder(arguments)
    with EngineLock(folder):
        done = rebuild(folder)
    lost = f"; lines {', '.join(map(str, done.damaged))} of the journal are damaged and lost" if done.damaged else ""
    print(f"{done.n_trials} trials from {done.events} events{lost}")
    return OK


def evaluate(arguments: argparse.Namespace) -> int:
    """Score the dense base, candidates, one-shot cuts, the best plan and the front on the held-out benchmarks."""
    from gptailor.launch.warm import collector_at_rest

    with collector_at_rest():
        from gptailor.commands.evaluate import evaluate as judge
    subjects, benchmarks = (list(filter(None, text.split(","))) for text in (arguments.subjects, arguments.benchmarks))
    judge(_at_home(arguments), _say(arguments), subjects, benchmarks, arguments.examples, _repair(arguments))
    return OK


def measure(arguments: argparse.Namespace) -> int:
    """Measure what plans are worth in use: tokens a second and memory, beside the dense base in plain transformers."""
    from gptailor.commands.measure import measure as take

    subjects = list(filter(None, arguments.subjects.split(",")))
    take(_at_home(arguments), _say(arguments), subjects, arguments.device)
    return OK


def dashboard(arguments: argparse.Namespace) -> int:
    """Open the dashboard: launch, watch, understand, compare and export runs in the browser."""
    from gptailor import shipped

    given = {"server.port": arguments.port, "server.address": arguments.address}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, "-m", "streamlit", "run", str(shipped.ROOT / "streamlit_app.py"), *options]
    os.execve(sys.executable, command, os.environ | {"GPTAILOR_RUNS": arguments.runs})


def _say(arguments: argparse.Namespace) -> Say:
    from gptailor.launch.events import say_to_people, say_to_programs

    return say_to_programs if getattr(arguments, "events", False) else say_to_people


def _repair(arguments: argparse.Namespace) -> Repair | None:
    """The repair that --repair and --texts ask for, or None. Raises UserError."""
    from pydantic import ValidationError

    from gptailor.spec.sections import Repair

    if arguments.repair is None:
        if arguments.texts is not None:
            raise UserError("--texts: are those of a repair; name one with --repair")
        return None
    asked = {"method": arguments.repair} | ({} if arguments.texts is None else {"texts": arguments.texts})
    try:
        return Repair.model_validate(asked)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = "--texts" if problem["loc"][:1] == ("texts",) else "--repair"
        said = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise UserError(f"{option} {problem['input']}: {said}") from error


def _run_here(folder: RunFolder, arguments: argparse.Namespace) -> int:
    from gptailor.store.folder import runs_root

    print(f"run {folder.run_id}", flush=True)
    status = _engine(folder)
    hints = {OK: ("look at it", "show"), INTERRUPTED: ("go on with it", "resume")}
    if status in hints:
        text, command = hints[status]
        runs = "" if Path(arguments.runs) == runs_root() else f" --runs {shlex.quote(arguments.runs)}"
        print(f"{text}:  python -m gptailor {command} {folder.run_id}{runs}", flush=True)
    return status


def _engine(folder: RunFolder) -> int:
    from gptailor.launch.supervisor import is_child, supervise
    from gptailor.launch.warm import import_all, is_forked

    if not is_child():
        return supervise(folder, main if is_forked() else None)
    import_all(ENGINE_IMPORTS)
    from gptailor.search.engine import run_engine
    from gptailor.search.progress import Report
    from gptailor.trial import RunStatus

    if not (folder.log.exists() and os.path.samestat(os.fstat(sys.stderr.fileno()), folder.log.stat())):
        handler = logging.FileHandler(folder.log)  # an engine that was launched writes there already
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("gptailor").addHandler(handler)
    ended = run_engine(folder, Report())
    return {RunStatus.FINISHED: OK, RunStatus.STOPPED: INTERRUPTED}.get(ended, RUN_FAILED)


def _forks(kind: str, channel: int) -> int:
    """What a dashboard's engines are forked from (launch/warm.py), or an experiment's commands (launch/series.py)."""
    import socket

    from gptailor.launch import series, warm

    return (warm if kind == WARM_ENGINES else series).serve(socket.socket(fileno=channel), ENGINE_IMPORTS, main)


def _folder(arguments: argparse.Namespace, run_id: str | None = None) -> RunFolder:
    from gptailor.store.folder import RunFolder

    run_id = run_id or arguments.run_id
    folder = RunFolder.of(arguments.runs, run_id)
    if not folder.path.is_dir():
        raise UserError(f"run {run_id}: there is none in {arguments.runs}; `python -m gptailor runs` lists them")
    return folder


def _at_home(arguments: argparse.Namespace) -> RunFolder:
    """The run's folder, seen from where the run was started: relative paths of its run file begin there."""
    folder = _folder(arguments)
    home = folder.started_in
    if home is None or home == Path.cwd():
        return folder
    folder = type(folder)(folder.path.absolute())
    if "out" in arguments:
        arguments.out = str(Path(arguments.out).absolute())
    if getattr(arguments, "texts", None):
        arguments.texts = "+".join(map(_absolute, arguments.texts.split("+")))
    os.chdir(home)
    return folder


def _absolute(source: str) -> str:
    """A source of texts, where its path is relative to this folder, wherever the command goes on."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if colon and kind == "file" else source


def _called_as() -> str:
    return "gptailor" if Path(sys.argv[0]).name == "gptailor" else "python -m gptailor"


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_called_as(), description="Shorter models by cutting and stitching.")
    parser.add_argument("--version", action="version", version=f"gptailor {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        function: Callable[[argparse.Namespace], int],
        *,
        names: bool = False,
        run_id: bool = False,
        run_file: bool = False,
    ) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").splitlines()[0]
        command = commands.add_parser(function.__name__.replace("_", "-"), help=text, description=text)
        if names:
            command.add_argument("names", metavar="NAMES", help="published methods, with commas, or all of them: all")
        if run_file:
            command.add_argument("run_file", metavar="RUN.yaml", help="what is asked, such as data/presets/demo.yaml")
            command.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, dotted: budget.max=243"
            )
        if run_id:
            command.add_argument("run_id", metavar="RUN_ID", help="a saved run: `runs` lists them")
        command.add_argument("--runs", metavar="DIR", help="folder of runs (default: $GPTAILOR_RUNS, else data/runs)")
        command.set_defaults(function=function)
        return command

    as_events: dict[str, Any] = {
        "dest": "events",
        "action": "store_true",
        "help": "JSON lines: each step, the share that is done, results, an error",
    }

    def with_repair(command: Any) -> Any:
        command.add_argument(
            "--repair",
            metavar="METHOD",
            help="repair without training: refit, replaceme, replaceme_cosine, rcpu or prune_comp",
        )
        command.add_argument(
            "--texts", metavar="SOURCE", help="of the repair: objectives (default), base, file:PATH or hub:DATA_SET"
        )
        return command

    a_plan = "one of the run's plans, by its number: `show` lists the front's"
    add(search, run_file=True)
    with_repair(add(baseline, names=True, run_file=True))
    several = add(experiment)
    several.add_argument("file", metavar="FILE", help="such as data/experiments/operations.yaml")
    several.add_argument("--run", metavar="RUN.yaml", help="start from this run file instead of the experiment's")
    several.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of every run, as for `search`"
    )
    several.add_argument("--report", metavar="FILE", help="write table and charts as one HTML page as well")
    several.add_argument("--dry", action="store_true", help="check the files and list the runs, no more")
    add(check, run_file=True).add_argument("--json", action="store_true", help="machine-readable, problems included")
    look = add(redundancy)
    look.add_argument("run", metavar="RUN", help="a run file (.yaml), or a saved run by its id")
    look.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, as for `search`")
    look.add_argument(
        "--examples",
        type=int,
        default=30,
        metavar="N",
        help="of each objective, scored without each layer; 0: none (default: 30)",
    )
    look.add_argument("--json", **as_events)
    add(engine, run_id=True)
    add(runs).add_argument("--json", action="store_true", help="machine-readable")
    add(show, run_id=True).add_argument("--json", action="store_true", help="machine-readable")
    take = with_repair(add(export, run_id=True))
    take.add_argument("config_id", type=int, metavar="CONFIG_ID", help=a_plan)
    take.add_argument("out", metavar="OUT", help="the folder or file to write; it must not be there yet")
    take.add_argument(
        "--as",
        dest="form",
        choices=("huggingface", "mergekit"),
        default="huggingface",
        help="a model's folder, or a YAML file that mergekit builds it from (default: huggingface)",
    )
    take.add_argument("--push", metavar="OWNER/NAME", help="send the folder to the Hugging Face hub, privately")
    take.add_argument("--dry-run", action="store_true", help="with --push: list what would be sent, send nothing")
    take.add_argument("--json", **as_events)
    train = add(heal, run_id=True)
    train.add_argument(
        "config_id", metavar="CONFIG_ID", help="one of the run's plans, by its number, or baseline:NAME[@CANDIDATE]"
    )
    train.add_argument("out", metavar="OUT", help="the folder to write; it must not be there yet")
    train.add_argument(
        "--texts",
        default="objectives+base",
        metavar="SOURCE",
        help="objectives, base (written by the base), file:PATH, hub:DATA_SET, or several joined by + "
        "(default: objectives+base)",
    )
    train.add_argument("--tokens", default="1M", metavar="N", help="to train on, such as 500k or 5M (default: 1M)")
    train.add_argument("--minutes", type=float, metavar="N", help="of training at most (default: no limit)")
    train.add_argument(
        "--lora",
        type=int,
        default=16,
        metavar="N",
        help="rank of the adapters; 0: train the layers (default: 16)",
    )
    train.add_argument("--rate", type=float, metavar="X", help="peak learning rate (default: 0.001, or 0.0002)")
    train.add_argument(
        "--teacher", default="", metavar="NAME", help="base or a candidate (default: whom most kept layers come from)"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of texts (default: 0)")
    train.add_argument("--device", help="another device than the run's, such as cpu")
    train.add_argument("--json", **as_events)
    send = add(report)
    send.add_argument("run_ids", nargs="+", metavar="RUN_ID", help="one saved run or several")
    send.add_argument("--out", metavar="FILE", help="default: RUN_ID.html here, or comparison.html of several")
    out = add(tables, run_id=True)
    out.add_argument("out", metavar="DIR", help="the folder to write into")
    out.add_argument("--format", choices=("parquet", "csv"), default="parquet", help="of the files (default: parquet)")
    build = with_repair(add(stitch))
    build.add_argument("plan", metavar="PLAN", help="a plan's file (JSON): ours, or one that auto-merge-llm published")
    build.add_argument("--family", required=True, metavar="FAMILY.yaml", help="base_model and candidates, in order")
    build.add_argument("--out", required=True, metavar="DIR", help="the folder to write; it must not be there yet")
    build.add_argument(
        "--base-layer",
        choices=("source", "output"),
        default="source",
        help="published prune files: a merge starts from the base's layer at its own index (source, what was meant) or "
        "at its position in the result (output, what the published code did)",
    )
    answer = add(generate, run_id=True)
    answer.add_argument("config_id", type=int, metavar="CONFIG_ID", help=a_plan)
    answer.add_argument("--prompt", required=True, metavar="TEXT", help="what both models go on from")
    answer.add_argument("--tokens", type=int, default=64, metavar="N", help="to write at most (default: 64)")
    answer.add_argument("--device", help="another device than the run's, such as cpu")
    answer.add_argument("--plain", action="store_true", help="leave the tokenizer's chat template out")
    answer.add_argument("--json", **as_events)
    for function in (pause, resume, stop, repair):
        add(function, run_id=True)
    more = add(extend, run_id=True)
    more.add_argument("--trials", type=int, metavar="N", help="trials in all")
    more.add_argument("--walltime", metavar="TIME", help="time in all, such as 8h")
    watch = add(dashboard)
    watch.add_argument("--port", type=int, metavar="N", help="of the web server (default: 8501)")
    watch.add_argument("--address", metavar="HOST", help="to listen on (default: 127.0.0.1, this machine alone)")
    judge = with_repair(add(evaluate, run_id=True))
    judge.add_argument(
        "--subjects",
        default="",
        help="of dense, candidates, baselines, best, sizes, front, repaired, healed, candidate:NAME, baseline:NAME, "
        "config:ID, repaired:SUBJECT/NAME, healed:SUBJECT/NAME (default: dense,candidates,baselines,best,front; with "
        "--repair, which keeps the repaired plans as subjects beside what they were: best)",
    )
    judge.add_argument("--benchmarks", default="", help="names, with commas (default: all held out)")
    judge.add_argument("--examples", type=int, metavar="N", help="per benchmark (default: all)")
    judge.add_argument("--json", **as_events)
    use = add(measure, run_id=True)
    use.add_argument(
        "--subjects", default="best", help="of best, front, baselines, config:ID, with commas (default: best)"
    )
    use.add_argument("--device", help="another device than the run's, such as cpu")
    use.add_argument("--json", **as_events)
    return parser


if __name__ == "__main__":
    sys.exit(entry())
