"""YAML files and arguments in, entries out: a path, a YAML node and the words that say where it stands.

Nothing here knows which values are right; a mistake of form (syntax, a key given twice) goes into the list of problems.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tdro_hpc.config.keys import Key, KeyPath, is_section, key_of, path_of

COMMAND_LINE = "command line"
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
# libyaml reads the 25 tasks in 3 ms instead of 40; both loaders give the same nodes.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Entry:
    """One value that somebody gave."""

    path: KeyPath
    node: yaml.Node
    source: str  # configs/demo.yaml:14, or "command line"

    @property
    def place(self) -> str:
        """Where it stands, as a part of a sentence."""
        return f"on the {COMMAND_LINE}" if self.source == COMMAND_LINE else f"in {self.source}"


def shown_path(path: Path) -> str:
    """The path as a person would type it: relative where it lies below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def is_null(node: yaml.Node) -> bool:
    """Whether the node is `null`, `~` or nothing."""
    return node.tag == _NULL


def value_of(node: yaml.Node, key: Key | None) -> Any:
    """Python value of a node: text, None, a list or a dict; numbers stay text, OmegaConf converts them by type.

    Text keys take the characters as they stand: YAML would make a number of the commit 1234567 and a boolean of the
    language `no`. Their null is the empty text, which the schema reads as "none".
    """
    if isinstance(node, yaml.SequenceNode):
        return [value_of(item, None) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {name_of(name): value_of(item, None) for name, item in node.value}
    if is_null(node):
        kind = key.kind if key else ""
        return {"str": None if key and key.optional else "", "list": []}.get(kind)
    return os.path.expanduser(node.value) if node.value.startswith("~/") else node.value


def read_arguments(arguments: list[str], problems: list[str]) -> list[tuple[str, str]]:
    """Name and text of every `name=text`."""
    pairs = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not argument.isprintable() and any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            problems.append(f"{shown} on the command line is not UTF-8. Type it in UTF-8, or rename the file.")
        elif equals and name.strip():
            pairs.append((name.strip(), text.strip()))
        else:
            word = name.strip().lstrip("-") or "key"
            problems.append(f"{argument!r} on the command line is not of the form key=value. Type {word}=<value>.")
    return pairs


def pick_entry(name: str, text: str) -> Entry:
    """The entry of `model=minilm` and the like: its text is a name or a path as it stands."""
    return Entry((name,), yaml.ScalarNode(_TEXT, text), COMMAND_LINE)


def argument_entries(name: str, text: str) -> list[Entry]:
    """Entries of one `name=text`: one, or those inside a mapping given for a section."""
    path = path_of(name)
    return _entries(path, _argument_node(path, text), None, [])


def _argument_node(path: KeyPath, text: str) -> yaml.Node:
    key = key_of(path)
    verbatim = key is not None and key.kind == "str" and text[:1] not in ("'", '"', "[", "{")
    if not verbatim or text in ("null", "Null", "NULL", "~"):
        try:
            node = yaml.compose(text, Loader=_Loader)
            return yaml.ScalarNode(_NULL, "") if node is None else node
        except yaml.YAMLError:
            pass  # not YAML: the text itself is judged by the type of the key
    return yaml.ScalarNode(_TEXT, text)


def read_file(file: Path, prefix: KeyPath, problems: list[str]) -> list[Entry]:
    """Entries of a YAML file in the order of its lines; `prefix` is the section that the file fills, () = all."""
    name = shown_path(file)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(
            f"{name}{line} is not YAML: {error.problem}. Write one `key: value` a line, indented by spaces, "
            "and quote text that holds ': ' or ' #'."
        )
        return []
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{name} cannot be read: {error}. Save it as UTF-8 text that you may read.")
        return []
    if root is None or root.value == []:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{name}:1 holds no keys. Write one `key: value` a line.")
        return []
    entries = _entries(prefix, root, name, problems)
    _find_duplicates(entries, problems)
    return entries


def _find_duplicates(entries: list[Entry], problems: list[str]) -> None:
    first: dict[KeyPath, Entry] = {}
    for entry in entries:
        if entry.path in first:
            problems.append(_twice(entry.path, first[entry.path].source, entry.source))
        first.setdefault(entry.path, entry)


def _twice(path: KeyPath, first: str, second: str) -> str:
    return f"{'.'.join(path)} is given twice: in {first} and in {second}. Delete one of the two."


def _entries(path: KeyPath, node: yaml.Node, file: str | None, problems: list[str], line: int = 1) -> list[Entry]:
    """Entries below a node: sections are opened, anything else is one entry; file None = command line."""
    is_open = not path or is_section(path)
    if not (isinstance(node, yaml.MappingNode) and is_open and node.value):
        return [Entry(path, node, COMMAND_LINE if file is None else f"{file}:{line}")]
    found: list[Entry] = []
    lines: dict[KeyPath, int] = {}
    for key_node, value_node in _pairs(node):
        text = name_of(key_node)
        # Only names of tasks may hold dots; elsewhere `s0.steps: 5` is `s0: {steps: 5}`.
        names = (text,) if path == ("data", "tasks") else tuple(text.split("."))
        below, at = (*path, *names), key_node.start_mark.line + 1
        if below in lines and is_section(below):
            problems.append(_twice(below, f"{file}:{lines[below]}", f"{file}:{at}"))
        lines[below] = at
        found += _entries(below, value_node, file, problems, at)
    return found


def name_of(key: yaml.Node) -> str:
    """Name that a key node spells; YAML also allows lists as keys, which no schema knows."""
    return key.value if isinstance(key, yaml.ScalarNode) else "?"


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes of a mapping, with `<<: *anchor` put in; the mapping's own keys win."""
    own = [pair for pair in node.value if pair[0].tag != _MERGE]
    names = {name_of(key) for key, _ in own}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if key.tag == _MERGE:
            for mapping in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                for inner in _pairs(mapping) if isinstance(mapping, yaml.MappingNode) else []:
                    merged.setdefault(name_of(inner[0]), inner)
    return [pair for name, pair in merged.items() if name not in names] + own
