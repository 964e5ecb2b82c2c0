"""tasks.yaml in, task descriptions out: name -> keys of config.schema.TaskConfig. All mistakes come together."""

from difflib import get_close_matches
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdro_hpc.config.keys import TASK_KEYS, Key
from tdro_hpc.config.schema import FORMATS, TaskConfig
from tdro_hpc.config.source import Entry, read_file, value_of

KINDS = {"str": "a text", "int": "a whole number", "bool": "true or false", "list": "a list of texts: [one, two]"}


def read_task_file(path: Path) -> dict[str, TaskConfig]:
    """Tasks that a tasks.yaml describes, in its order.

    raises  ValueError with every mistake of the file, one a line, when there is any
    """
    problems: list[str] = []
    tasks = read_tasks(read_file(path, ("data", "tasks"), problems), problems)
    if problems:
        raise ValueError("\n".join(problems))
    if not tasks:
        raise ValueError(f"{path} describes no task. Write one a line, such as `my_task: {{}}`, or delete the file.")
    return tasks


def read_tasks(entries: list[Entry], problems: list[str]) -> dict[str, TaskConfig]:
    """Tasks of the entries below data.tasks; what is wrong with an entry is added to `problems`."""
    values: dict[str, dict[str, object]] = {}
    lines: dict[str, str] = {}
    for entry in (entry for entry in entries if len(entry.path) > 2):  # `{}` alone has no name
        name = entry.path[2]
        lines.setdefault(name, entry.source)
        values.setdefault(name, {})
        if len(entry.path) == 4 and entry.path[3] in TASK_KEYS:
            _take_value(entry, TASK_KEYS[entry.path[3]], values[name], problems)
        elif len(entry.path) == 4:
            problems.append(_unknown(entry, entry.path[3]))
        elif value_of(entry.node, None) not in (None, {}):
            problems.append(_misplaced(entry))
    tasks: dict[str, TaskConfig] = {}
    for name, keys in values.items():
        try:
            tasks[name] = TaskConfig(**keys)  # type: ignore[arg-type]
        except ValueError as error:
            found = [line + _nearest_format(line, keys) for line in str(error).split("\n")]
            problems += [f"{lines[name]}: task {name}: {line}" for line in found]
    return tasks


def _take_value(entry: Entry, key: Key, values: dict[str, object], problems: list[str]) -> None:
    """Put the typed value of an entry into `values`; OmegaConf decides what is a bool or a number."""
    given = value_of(entry.node, key)
    try:
        if key.kind == "list" and not isinstance(given, list):
            raise ValueError("no list")
        merged = OmegaConf.merge(OmegaConf.structured(TaskConfig), {key.name: given})
        values[key.name] = OmegaConf.to_container(merged)[key.name]  # type: ignore[call-overload, index]
    except (ValueError, OmegaConfBaseException):
        shown = given if isinstance(given, str) else entry.node.tag.rsplit(":", 1)[-1]
        problems.append(f"{entry.source}: {key.name} is {shown!r}; it must be {KINDS[key.kind]}.")


def _unknown(entry: Entry, name: str) -> str:
    near = get_close_matches(name, TASK_KEYS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{entry.source}: a task has no key {name!r}.{hint} Its keys: {', '.join(TASK_KEYS)}."


def _misplaced(entry: Entry) -> str:
    if len(entry.path) > 4:
        return f"{entry.source}: {'.'.join(entry.path[2:])} is too deep. Write task, then its keys, one level below it."
    return f"{entry.source}: {entry.path[-1]} holds no keys. Write the keys of a task below its name, or `{{}}`."


def _nearest_format(problem: str, keys: dict[str, object]) -> str:
    near = get_close_matches(str(keys.get("format", "")), FORMATS, n=1)
    return f" Did you mean {near[0]}?" if problem.startswith("format ") and near else ""
