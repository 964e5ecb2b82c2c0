"""The schema as a flat list of dotted keys: which exist, of what type, and which one a misspelt name was meant to be.

A path is a tuple of names, ("s0", "steps"); task names may hold dots, therefore paths are not split strings.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from typing import Any

from tdro_hpc.config.schema import Config, TaskConfig

GROUPS = ("model", "data", "parallel", "cluster", "recipe")  # picks: <group>=<name> reads configs/<group>/<name>.yaml
PICKS = (*GROUPS, "config")

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """One key that takes a value."""

    name: str  # dotted, as a person types it; only the last name for the keys of a task
    kind: str  # bool, int, float, str, list
    optional: bool  # null is a value
    default: Any


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _keys_of(section: type, prefix: str) -> tuple[dict[str, Key], dict[str, type]]:
    """Keys of a section and of the sections in it, and those sections; both by dotted name."""
    keys: dict[str, Key] = {}
    sections: dict[str, type] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections[name] = typing.cast(type, hint)
            inner_keys, inner_sections = _keys_of(sections[name], f"{name}.")
            keys |= inner_keys
            sections |= inner_sections
        elif typing.get_origin(hint) is not dict:
            inner = [part for part in typing.get_args(hint) if part is not type(None)]
            optional = type(None) in typing.get_args(hint)
            kind = "list" if typing.get_origin(hint) is list else (inner[0] if optional else hint).__name__
            keys[name] = Key(name, kind, optional, _default_of(field))
    return keys, sections


KEYS, SECTIONS = _keys_of(Config, "")
TASK_KEYS, _ = _keys_of(TaskConfig, "")


def path_of(dotted: str) -> KeyPath:
    """KeyPath of a key typed with dots; everything between `data.tasks.` and the last name is the name of a task."""
    parts = tuple(dotted.split("."))
    if parts[:2] == ("data", "tasks") and len(parts) > 4:
        return ("data", "tasks", ".".join(parts[2:-1]), parts[-1])
    return parts


def is_task(path: KeyPath) -> bool:
    """Whether the path is data.tasks.<name>, a section that exists for every name."""
    return path[:2] == ("data", "tasks") and len(path) == 3


def is_section(path: KeyPath) -> bool:
    """Whether the path holds further keys instead of a value."""
    return ".".join(path) in SECTIONS or path == ("data", "tasks") or is_task(path)


def key_of(path: KeyPath) -> Key | None:
    """The key at a path; None where there is none."""
    if path[:2] == ("data", "tasks"):
        return TASK_KEYS.get(path[3]) if len(path) == 4 else None
    return KEYS.get(".".join(path))


def keys_of_section(path: KeyPath) -> list[str]:
    """Dotted names that can be typed in a section, () being the top: its own keys and its sections."""
    if path[:2] == ("data", "tasks") and len(path) == 3:
        return [".".join((*path, name)) for name in TASK_KEYS]
    prefix = "".join(f"{part}." for part in path)
    names = [name for name in (*KEYS, *SECTIONS) if name.startswith(prefix)]
    return list(dict.fromkeys(name for name in names if "." not in name[len(prefix) :]))


def nearest_keys(path: KeyPath, options: tuple[str, ...]) -> list[str]:
    """Dotted names that were probably meant, best first; several when sections share the name; none when none is near.

    options   further words that may be typed at the top, such as picks
    """
    dotted, last = ".".join(path), path[-1]
    names = list(KEYS)
    if path[:2] == ("data", "tasks"):
        names += [".".join((*path[:3], name)) for name in TASK_KEYS]
    if len(path) == 1:
        names += options

    def score(name: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, dotted, name).ratio()
        end = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return 0.5 * whole + 0.5 * end, end

    scored = sorted(((*score(name), name) for name in names), key=lambda item: -item[0])
    best, end, name = scored[0]
    if end < 0.6 and best < 0.7:
        return []
    section, _, word = name.rpartition(".")
    if section == ".".join(path[:-1]):
        return [name]
    return [name] + [other for _, _, other in scored[1:] if other.rpartition(".")[2] == word]


def default_text(value: Any) -> str:
    """A value as it is typed after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
