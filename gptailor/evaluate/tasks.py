"""Find and load lm-eval's own Task objects, once per run.

lm-eval's index of its 14,000 tasks takes over ten seconds to build, a run's own folders take milliseconds: the index is
built only when a name is not found in the run's folders.
"""

from __future__ import annotations

import difflib
import glob
import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptailor import shipped
from gptailor.errors import UserError
from gptailor.evaluate import rouge
from gptailor.evaluate.safety import check_task_file, code_is_allowed, use_sandboxed_templates

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from gptailor.spec.sections import Benchmark

SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
FEWSHOT_SEED = 1234  # lm-eval's default for drawing few-shot examples


def find_tasks(names: Iterable[str], include_path: Sequence[str]) -> TaskManager:
    """An index in which every name is found and none of the files involved runs code. Raises UserError."""
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    use_sandboxed_templates()
    find_shipped_data()
    rouge.register()
    folders = tuple(_folder(path) for path in include_path)
    trusted = Path(lm_eval.tasks.__file__).parent
    wanted = set(names)
    own = found = _index(folders, include_defaults=False)
    missing = _closure(own, wanted)[1]
    if missing:
        _explain_unread(missing, own, folders, trusted)
        found = _whole_index(folders)
        missing = _closure(found, wanted)[1] & wanted
        if missing:
            raise UserError("\n".join(_unknown(name, found, own) for name in sorted(missing)))
    for name in sorted(_closure(found, wanted)[0]):
        path = found.task_index[name].yaml_path
        if path is not None:
            check_task_file(Path(path), trusted)
    return found


def load_tasks(manager: TaskManager, spec: Benchmark) -> tuple[list[Task], Group | None]:
    """The benchmark's tasks on the asked split with the asked number of shots, and its group if it is one."""
    from lm_eval.api.task import ConfigurableTask

    name = spec.benchmark
    kind = manager.task_index[name].kind.name
    if kind == "TAG":
        members = sorted(manager.task_index[name].tags)
        raise UserError(
            f"benchmark {name}: is a tag over {len(members)} tasks without a score of its own; name one of them: "
            + ", ".join(members[:8])
        )
    try:
        loaded = manager.load([name])
    except UserError as error:
        raise UserError(f"benchmark {name}: {error}") from error
    except Exception as error:  # a task file may fail in any way, and whatever it is, it is the file's author's to read
        file = manager.task_index[name].yaml_path
        where = f" (task file {file})" if file is not None else ""
        raise UserError(f"benchmark {name}: lm-eval cannot load it: {cause_of(error)}{where}") from error
    tasks = list(loaded["tasks"].values())
    for task in tasks:
        if not isinstance(task, ConfigurableTask):
            raise UserError(f"benchmark {name}: task {task.task_name} is not built on lm-eval's ConfigurableTask")
        if getattr(task, "UNSAFE_CODE", False) and not code_is_allowed():
            raise UserError(f"benchmark {name}: task {task.task_name} runs code that the model wrote; it is refused")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"benchmark {name}: task {task.task_name} needs images or sound, not text alone")
        _choose_split(task, spec)
        _choose_shots(task, spec)
    return tasks, loaded["groups"].get(name)


def _choose_split(task: Task, spec: Benchmark) -> None:
    """Make `task.eval_docs` the asked split, so that few-shot examples never hold the question they precede."""
    splits = {split: task.get_config(field) for split, field in SPLITS.items()}
    chosen = splits[spec.whole_split]
    if chosen is None:
        there = [split for split, value in splits.items() if value is not None]
        raise UserError(
            f"benchmark {spec.benchmark}: task {task.task_name} has no {spec.whole_split} split; "
            f"it has {', '.join(there)}"
        )
    if spec.whole_split == "test":
        return
    # lm-eval evaluates the test split if there is one, else the validation split; and leaves the question itself out
    # of its examples when the examples' split is the test split (or neither is named).
    fewshot = task.fewshot_cfg
    if spec.whole_split == "train" and fewshot.split is None and fewshot.samples is None:
        fewshot.split = chosen
    same = spec.whole_split == "train" or fewshot.split == chosen
    task.set_config("test_split", chosen if same else None)


def _choose_shots(task: Task, spec: Benchmark) -> None:
    fixed = task.get_config("num_fewshot")
    if spec.num_fewshot is not None and fixed == 0 and spec.num_fewshot != 0:
        raise UserError(
            f"benchmark {spec.benchmark}: task {task.task_name} fixes num_fewshot to 0 in its file, and lm-eval then "
            f"ignores the {spec.num_fewshot} asked for; leave num_fewshot out"
        )
    if spec.num_fewshot is not None:
        task.set_config("num_fewshot", spec.num_fewshot)
    elif fixed is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@cache
def _whole_index(folders: tuple[Path, ...]) -> TaskManager:
    return _index(folders, include_defaults=True)


def _index(folders: Sequence[Path], include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=include_defaults)


@cache
def find_shipped_data() -> None:
    """Let task files that name shipped data by a relative path, as the demo's do, find it from every folder."""
    from lm_eval.api.task import ConfigurableTask

    plain = ConfigurableTask.download

    def download(self: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        given = dict(dataset_kwargs or {})
        if "data_files" in given:
            given["data_files"] = _found(given["data_files"])
        plain(self, given, **options)

    ConfigurableTask.download = download


def _found(files: Any) -> Any:
    """Names of data files as `datasets` takes them: one, a list, or by split."""
    if isinstance(files, dict):
        return {split: _found(names) for split, names in files.items()}
    if isinstance(files, (list, tuple)):
        return [_found(name) for name in files]
    if "://" in str(files):
        return files
    found = shipped.find(files)
    if "::" in str(found):
        raise UserError(f"{found}: '::' joins addresses for the library that reads data; rename the folder or the file")
    return glob.escape(str(found)) if found.exists() else str(found)  # a name with [ or * in it is no pattern


def _folder(path: str) -> Path:
    folder = shipped.find(path)
    if not folder.is_dir():
        raise UserError(f"include_path: {path} is not a folder; it must hold lm-eval task files (*.yaml)")
    return folder.resolve()


def _closure(manager: TaskManager, names: set[str]) -> tuple[set[str], set[str]]:
    """Names found with all that their groups and tags refer to, and names that are not in the index."""
    found: set[str] = set()
    missing: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        entry = manager.task_index.get(name)
        if entry is None:
            missing.add(name)
        elif name not in found:
            found.add(name)
            if entry.kind.name == "TAG":
                todo += sorted(entry.tags)
            elif entry.kind.name == "GROUP":
                todo += _members(entry.cfg or {})
    return found, missing


def _members(config: dict[str, Any]) -> list[str]:
    """Tasks, groups and tags that a group's file refers to by name (those defined inside it are no references)."""
    listed = config.get("task") or []
    names = []
    for member in listed if isinstance(listed, list) else [listed]:
        if isinstance(member, str):
            names.append(member)
        elif isinstance(member, dict) and "group" in member:
            names += _members(member)
        elif isinstance(member, dict) and "dataset_path" not in member and "task" in member:
            names.append(str(member["task"]))
    return names


def _explain_unread(names: set[str], own: TaskManager, folders: Sequence[Path], trusted: Path) -> None:
    """lm-eval passes over files that it cannot read; say so where such a file bears a wanted name. Raises UserError."""
    read = {Path(entry.yaml_path) for entry in own.task_index.values() if entry.yaml_path}
    for folder in folders:
        for file in sorted(folder.glob("**/*.yaml")):
            if file.stem in names and file not in read:
                check_task_file(file, trusted)
                raise UserError(f"benchmark {file.stem}: {file} defines no task of this name (`task: {file.stem}`)")


def _unknown(name: str, found: TaskManager, own: TaskManager) -> str:
    close = difflib.get_close_matches(name, found.all_tasks, n=5, cutoff=0.5)
    if not close and own.all_tasks:
        close = own.all_tasks[:8]
    message = f"benchmark {name}: neither lm-eval nor include_path has a task or group of this name"
    if close:
        message += f"; did you mean {', '.join(close)}?"
    return message


def cause_of(error: BaseException) -> str:
    """What an error says, and what the innermost one behind it says.

    Libraries wrap them, and name the file or the row inside only.
    """
    inner: BaseException = error
    seen = {id(error)}
    while (below := inner.__cause__ or inner.__context__) is not None and id(below) not in seen:
        seen.add(id(below))
        inner = below
    return _line(error) if inner is error else f"{_line(error)}; because of {_line(inner)}"


def _line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:12]) or type(error).__name__
    return f"{type(error).__name__}: {text[:400]}"
