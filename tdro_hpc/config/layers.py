"""Arguments in, all given values out, lowest precedence first (load.py states it). Finds and reads the picked files."""

import difflib
import os
from pathlib import Path

import yaml

from tdro_hpc.config.keys import GROUPS, PICKS
from tdro_hpc.config.source import (
    Entry,
    argument_entries,
    is_null,
    name_of,
    pick_entry,
    read_file,
    shown_path,
    value_of,
)


def configs_folders() -> list[Path]:
    """Folders in which names are looked up: the current directory's, the repository's, the installed package's."""
    package = Path(__file__).resolve().parents[1]
    folders = (Path("configs"), package.parent / "configs", package / "configs")
    # Run from the repository, the first two are one folder.
    return list({folder.resolve(): folder for folder in reversed(folders) if folder.is_dir()}.values())[::-1]


def layered_entries(pairs: list[tuple[str, str]], folders: list[Path], problems: list[str]) -> list[Entry]:
    """Entries of all layers, lowest first.

    pairs      name and text of every argument
    folders    where the names of picks are looked up
    problems   gets what is wrong with picks and files
    """
    picked = {name: pick_entry(name, text) for name, text in pairs if name in PICKS}
    config = picked.pop("config", None)
    own = _file_entries("config", config, folders, problems) if config else []
    used, own = _split_use(own, problems)
    used = {group: entry for group, entry in used.items() if group not in picked}
    given = {name for name, text in pairs if text}
    entries = _picked_entries(used, folders, problems)
    if given & {"data.dir", "data.hub"}:
        entries = _without_built_data(entries)
    entries += own
    # A pick on the command line replaces its whole section.
    entries = [entry for entry in entries if entry.path[0] not in picked]
    entries += _picked_entries(picked, folders, problems)
    for name, text in pairs:
        if name not in PICKS:
            entries += argument_entries(name, text)
    return entries


def _without_built_data(entries: list[Entry]) -> list[Entry]:
    """The entries less the data set that a pick has built: data named on the command line bring their own tasks."""
    builds = any(entry.path == ("data", "builder") and value_of(entry.node, None) for entry in entries)
    return [entry for entry in entries if not builds or entry.path[:2] not in (("data", "builder"), ("data", "tasks"))]


def _picked_entries(picks: dict[str, Entry], folders: list[Path], problems: list[str]) -> list[Entry]:
    """Entries of the picked files, the recipe's first, and the name of the recipe."""
    entries = []
    for group in sorted(picks, key=lambda group: group != "recipe"):
        entries += _file_entries(group, picks[group], folders, problems)
    if "recipe" in picks:
        entries.append(picks["recipe"])
    return entries


def _split_use(entries: list[Entry], problems: list[str]) -> tuple[dict[str, Entry], list[Entry]]:
    """Picks of a config file by group, and its other entries."""
    picks: dict[str, Entry] = {}
    complete = False
    for entry in entries:
        if entry.path[0] == "use":
            found, complete = _picks_in(entry, problems)
            picks |= found
    rest = [entry for entry in entries if entry.path[0] != "use"]
    recipe = [entry for entry in rest if entry.path == ("recipe",)]
    if recipe and not complete:
        picks.setdefault("recipe", recipe[-1])
        rest = [entry for entry in rest if entry.path != ("recipe",)]
    return picks, rest


def _picks_in(entry: Entry, problems: list[str]) -> tuple[dict[str, Entry], bool]:
    """Picks of one `use` entry, each at its own line, and whether it says that nothing is picked (`use: {}`)."""
    picks: dict[str, Entry] = {}
    names: list[str] = []
    if len(entry.path) > 1:  # use.model: minilm
        names = [".".join(entry.path[1:])]
        picks[names[0]] = Entry(entry.path[1:], entry.node, entry.source)
    elif isinstance(entry.node, yaml.MappingNode):
        file = entry.source.rpartition(":")[0]
        for key, value in entry.node.value:
            names.append(name_of(key))
            picks[names[-1]] = Entry((names[-1],), value, f"{file}:{key.start_mark.line + 1}")
    elif not is_null(entry.node):
        problems.append(
            f"use {entry.place} is {value_of(entry.node, None)!r}; it must pick by group. "
            f"Write use: {{model: <name>}}; the groups are {', '.join(GROUPS)}."
        )
    for name in names:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, n=1) or GROUPS
            problems.append(f"Unknown pick use.{name} {picks.pop(name).place}. Write {' or '.join(near)} in its place.")
    return picks, isinstance(entry.node, yaml.MappingNode) and not entry.node.value


def _file_entries(group: str, pick: Entry, folders: list[Path], problems: list[str]) -> list[Entry]:
    """Entries of the file that a pick names."""
    name = str(value_of(pick.node, None) or "")
    file: Path | None = Path(name)
    if not (file and ("/" in name or file.suffix in (".yaml", ".yml")) and os.path.isfile(file)):
        stem = name.removesuffix(".yaml")
        places = [_named(folder, group) / f"{stem}.yaml" for folder in folders]
        file = next((place for place in places if stem and os.path.isfile(place)), None)
    if file is None:
        problems.append(_unknown_pick(group, name, pick, folders))
        return []
    return read_file(file, () if group in ("config", "recipe") else (group,), problems)


def _named(folder: Path, group: str) -> Path:
    return folder if group == "config" else folder / group


def _unknown_pick(group: str, name: str, pick: Entry, folders: list[Path]) -> str:
    """What is wrong with a pick that names no file, the names nearest to it, and what was perhaps meant instead."""
    places = " or ".join(shown_path(_named(folder, group)) for folder in folders) or "any folder of configs"
    what = f"{group}={name} {pick.place}: there is no file {name or '<name>'}.yaml in {places}."
    if "/" in name and name.endswith((".yaml", ".yml")):
        what = f"{group}={name} {pick.place}: there is no file {name}."
    if os.path.isdir(name):
        if group == "config" and (Path(name) / "config.yaml").is_file():
            return f"{what} Type config={Path(name) / 'config.yaml'}."
        if group == "data":
            return f"{what} For a folder of task files type data.dir={name}."
    if group == "model" and ("/" in name or ":" in name):
        return f"{what} For a model by its hub id, folder or package type model.name={name}."
    names = sorted({file.stem for folder in folders for file in _named(folder, group).glob("*.yaml")})
    near = difflib.get_close_matches(name, names, n=3) or names
    return f"{what} Type {' or '.join(f'{group}={choice}' for choice in near) or f'{group}=<path of a YAML file>'}."
