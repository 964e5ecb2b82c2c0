"""The data section of a config in, tasks with their rows out. Runs on login nodes: never imports torch."""

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tdro_hpc.config.schema import DataConfig, TaskConfig
from tdro_hpc.data.derived import home_cache
from tdro_hpc.data.formats import CONVERTERS, Rows, formats_that_fit
from tdro_hpc.data.formats.folders import is_beir, is_msmarco
from tdro_hpc.data.hub import fetch_file, fetch_folder, list_files
from tdro_hpc.data.record import Record
from tdro_hpc.data.taskfile import read_task_file

logger = logging.getLogger(__name__)

TASK_FILE = "tasks.yaml"
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.tar.gz")  # best first: what needs no unpacking
FOLDER_FORMATS = ("beir", "msmarco")
_NO_PLACE = "data.tasks names tasks, not where they are. Set data.dir=<folder> or data.hub=<data set id>."


class Task:
    """One task and its rows. Can be pickled and forked; rows are read from disk when they are asked for."""

    def __init__(self, name: str, config: TaskConfig, path: Path, *, cache_dir: str, on_bad_row: str) -> None:
        self.name = name
        self.config = config
        self.path = path
        form = CONVERTERS[config.format]
        skips = on_bad_row == "skip"
        variant = f"skip-{config.format}" if skips else "raise"
        self._rows: Rows = form.open(path, cache_dir=cache_dir, check=form.convert if skips else None, variant=variant)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def skipped_rows(self) -> int:
        """Rows left out under data.on_bad_row=skip."""
        return self._rows.skipped_rows

    def record(self, row: int) -> Record:
        """One row, from 0.

        raises  ValueError naming file, line, what is wrong and how a row looks; IndexError past the last row
        """
        form = CONVERTERS[self.config.format]
        raw: Any = None
        try:
            raw = self._rows.raw(row)
            return form.convert(raw)
        except ValueError as error:
            fits = [] if raw is None else formats_that_fit(raw)
            hint = f"\nThe row fits format {' or '.join(fits)}: set it for task {self.name}." if fits else ""
            raise ValueError(
                f"{self._rows.place(row)}: {error}.\nA row of format {self.config.format}: {form.example}{hint}\n"
                "Repair the row, or set data.on_bad_row=skip to leave such rows out."
            ) from error

    def report(self) -> None:
        """Say what was skipped, when anything was."""
        if self.skipped_rows:
            lines = ", ".join(map(str, self._rows.skipped_lines))
            logger.warning(
                "task %s: %d bad rows of %s are skipped, %d are left; first lines: %s; the first because: %s",
                self.name, self.skipped_rows, self._rows.path, len(self), lines, self._rows.first_problem,
            )  # fmt: skip


def describe_tasks(config: DataConfig) -> dict[str, TaskConfig]:
    """Name -> description of every task of a run, in the order of the config, of tasks.yaml, or of the names.

    Reads no rows. Where data.tasks is empty, tasks.yaml of data.dir (or of data.hub) describes them; without it every
    file of rows is a task of format tdro, and every BEIR or MS MARCO folder one of that format.
    raises  ValueError with all mistakes
    """
    if config.tasks:
        tasks = config.tasks
        if config.dir and (Path(config.dir).expanduser() / TASK_FILE).is_file():
            logger.warning("%s/%s is not read: data.tasks describes the tasks", config.dir, TASK_FILE)
    elif config.dir:
        tasks = _tasks_of_folder(_data_folder(config))
    elif config.hub:
        tasks = _tasks_of_hub(config)
    elif config.builder:
        raise ValueError("data.builder=embedded: its tasks exist once stage prepare has run. Run stage=prepare first.")
    else:
        raise ValueError("There is no data. Set data.dir=<folder>, data.hub=<data set id> or data=tdro25.")
    return _chosen(tasks, config.only)


def find_tasks(config: DataConfig) -> dict[str, TaskConfig]:
    """Name -> description as far as this machine knows before anything is built or fetched; {} = not known yet.

    Opens no rows.
    raises  ValueError where there is no data, naming all files that are missing together
    """
    if not config.tasks and not config.dir and (config.builder or config.hub):
        return {}
    tasks = describe_tasks(config)
    if config.dir:
        _local_paths(_data_folder(config), tasks)
    elif not config.hub and not config.builder:
        raise ValueError(_NO_PLACE)
    return tasks


def open_tasks(config: DataConfig) -> dict[str, Task]:
    """Every task of the config with its rows, in the order of the config; unpacks and indexes what is new.

    raises  ValueError naming all files that are missing together, and all tasks whose first row is wrong
    """
    descriptions = describe_tasks(config)
    paths = _paths(config, descriptions)
    # The hub's cache belongs to huggingface_hub: nothing is written into it.
    cache_dir = config.cache_dir or ("" if config.dir else str(home_cache()))
    tasks: dict[str, Task] = {}
    problems = []
    for name, description in descriptions.items():
        try:
            task = Task(name, description, paths[name], cache_dir=cache_dir, on_bad_row=config.on_bad_row)
            if len(task) == 0:
                raise ValueError(
                    f"{task.path} has no rows ({task.skipped_rows} skipped). A row of format {description.format}: "
                    f"{CONVERTERS[description.format].example}"
                )
            task.record(0)  # a wrong format shows now, not at some later step
            task.report()
            tasks[name] = task
        except ValueError as error:
            problems.append(f"task {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return tasks


def _data_folder(config: DataConfig) -> Path:
    folder = Path(config.dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data.dir is {config.dir}, which is not a folder. Set data.dir=<folder of task files>.")
    return folder


def _tasks_of_folder(folder: Path) -> dict[str, TaskConfig]:
    found = {path.name: TaskConfig(file=path.name) for path in sorted(folder.iterdir()) if path.name.endswith(ENDINGS)}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (is_beir(path) or is_msmarco(path)):
            found[path.name] = TaskConfig(file=path.name, format="beir" if is_beir(path) else "msmarco")
    if (folder / TASK_FILE).is_file():
        tasks = read_task_file(folder / TASK_FILE)
        _report_undescribed(tasks, list(found), folder / TASK_FILE)
        return tasks
    if not found:
        raise ValueError(
            f"data.dir is {folder}, which holds no {', '.join('*' + ending for ending in ENDINGS)} and no BEIR or "
            "MS MARCO folder. Put one file a task there; other names can be given in tasks.yaml: `my_task: {file: x}`."
        )
    return _one_each(found)


def _tasks_of_hub(config: DataConfig) -> dict[str, TaskConfig]:
    names = list_files(config.hub, revision=config.hub_revision)
    # Of two files with one name the one nearer to the top is the task.
    nearest_last = sorted(names, key=lambda name: -name.count("/"))
    found = {name.rsplit("/", 1)[-1]: TaskConfig(file=name) for name in nearest_last if name.endswith(ENDINGS)}
    if TASK_FILE in names:
        path = fetch_file(config.hub, TASK_FILE, revision=config.hub_revision)
        tasks = read_task_file(path)
        _report_undescribed(tasks, list(found), path)
        return tasks
    if not found:
        raise ValueError(
            f"The hub data set {config.hub} has no {', '.join('*' + ending for ending in ENDINGS)}. Describe its files "
            "under data.tasks, or choose another data.hub."
        )
    return _one_each(found)


def _one_each(found: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
    """Tasks by name without the ending; of x.jsonl and x.jsonl.gz the one that needs no unpacking."""
    tasks: dict[str, TaskConfig] = {}
    for ending in ("", *ENDINGS):
        for file, description in found.items():
            if file.endswith(ending) and (ending or description.format in FOLDER_FORMATS):
                name = file.removesuffix(ending)
                if name in tasks:
                    logger.warning("task %s is read from %s; %s is not used", name, tasks[name].file, file)
                tasks.setdefault(name, description)
    return dict(sorted(tasks.items()))


def _report_undescribed(tasks: dict[str, TaskConfig], files: list[str], task_file: Path) -> None:
    used = {description.file.split("/")[0] for description in tasks.values() if description.file}
    used |= {name + ending for name, description in tasks.items() if not description.file for ending in ("", *ENDINGS)}
    unused = [file for file in files if file not in used]
    if unused:
        logger.warning("%s does not name %s: not used", task_file, ", ".join(unused))


def _chosen(tasks: dict[str, TaskConfig], only: str) -> dict[str, TaskConfig]:
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    problems = []
    for name in wanted:
        if name not in tasks:
            near = get_close_matches(name, tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the tasks are {', '.join(tasks)}."
            problems.append(f"data.only names {name!r}, which is not a task: {hint}")
    if problems:
        raise ValueError("\n".join(problems))
    return {name: task for name, task in tasks.items() if not wanted or name in wanted}


def _paths(config: DataConfig, descriptions: dict[str, TaskConfig]) -> dict[str, Path]:
    if config.dir:
        return _local_paths(_data_folder(config), descriptions)
    if not config.hub:
        raise ValueError(_NO_PLACE)
    problems = []
    paths: dict[str, Path] = {}
    for name, description in descriptions.items():
        try:
            paths[name] = _hub_path(config, name, description)
        except ValueError as error:
            problems.append(f"task {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def _hub_path(config: DataConfig, name: str, description: TaskConfig) -> Path:
    file = description.file or name
    if description.format in FOLDER_FORMATS:
        folder, _, split = file.partition("/")
        return fetch_folder(config.hub, folder, revision=config.hub_revision) / split
    if not description.file:
        names = list_files(config.hub, revision=config.hub_revision)
        file = next((name + ending for ending in ENDINGS if name + ending in names), name + ENDINGS[0])
    return fetch_file(config.hub, file, revision=config.hub_revision)


def _local_paths(folder: Path, descriptions: dict[str, TaskConfig]) -> dict[str, Path]:
    """Path of each task; ValueError with all that are missing."""
    paths: dict[str, Path] = {}
    missing = []
    there = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    for name, description in descriptions.items():
        file = description.file or name
        found = [folder / f"{file}{ending}" for ending in ("", *ENDINGS) if (folder / f"{file}{ending}").exists()]
        found += _same_rows(folder, file)
        if description.format not in FOLDER_FORMATS:
            found = [path for path in found if path.is_file()]
        if found:
            paths[name] = found[0]
            continue
        near = get_close_matches(file, there, n=1)
        hint = f"; the nearest name there is {near[0]}" if near else ""
        looked = file if description.file else f"{file}, {', '.join(file + ending for ending in ENDINGS)}"
        missing.append(f"  {name}: {looked}{hint}")
    if missing:
        lines = "\n".join(missing)
        raise ValueError(
            f"{len(missing)} of {len(descriptions)} tasks have no file in data.dir={folder}:\n{lines}\n"
            "Put the files there, name them with data.tasks.<name>.file=<path in the folder>, or leave tasks out with "
            f"data.only={','.join(paths) or '<names>'}."
        )
    return paths


def _same_rows(folder: Path, file: str) -> list[Path]:
    """The same rows in another packing: x.jsonl serves a task whose file is x.jsonl.tar.gz."""
    stem = next((file.removesuffix(ending) for ending in reversed(ENDINGS) if file.endswith(ending)), None)
    if stem is None:
        return []
    return [folder / f"{stem}{ending}" for ending in ENDINGS if (folder / f"{stem}{ending}").is_file()]
