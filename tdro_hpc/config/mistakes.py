"""An entry that cannot be taken in, a sentence out: what, got, expected, and what to type instead."""

import typing
from typing import Any

from tdro_hpc.config.keys import (
    GROUPS,
    SECTIONS,
    Key,
    default_text,
    is_section,
    key_of,
    keys_of_section,
    nearest_keys,
)
from tdro_hpc.config.source import COMMAND_LINE, Entry, value_of

_KIND_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list of texts",
}


def unknown_key(entry: Entry, words: tuple[str, ...]) -> str:
    """What is wrong with a key that does not exist; `words` may be typed at the top besides keys."""
    dotted = ".".join(entry.path)
    what = f"Unknown key {dotted} {entry.place}."
    near = nearest_keys(entry.path, words)
    if not near:
        section = entry.path[:-1]
        names = ", ".join(keys_of_section(section)) if is_section(section) or not section else ", ".join(SECTIONS)
        return f"{what} Type one of these instead: {names}."
    best = near[0]
    value = value_of(entry.node, None)
    text = default_text(value) if value is not None and not isinstance(value, dict) else "<value>"
    if best in words:
        return f"{what} Did you mean {best}? Type {best}={text}."
    nearest = key_of(tuple(best.split("."))) or key_of((*entry.path[:3], best.rpartition(".")[2]))
    assert nearest is not None, f"the nearest name {best} is no key"
    meant = f"Did you mean {_either(near)} (default {default_text(nearest.default) or 'empty'})?"
    if entry.source == COMMAND_LINE:
        return f"{what} {meant} Type {best}={text}."
    if ".".join(entry.path[:-1]) == best.rpartition(".")[0]:
        return f"{what} {meant} Write {best.rpartition('.')[2]}: {text} in its place."
    return f"{what} {meant} Delete the line and type {best}={text}."


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def special_text(entry: Entry, value: Any) -> str:
    """What is wrong with a text that OmegaConf would take for a reference or a missing value."""
    dotted = ".".join(entry.path)
    return (
        f"{dotted} {entry.place} is {value!r}; values are taken as they stand, ${{...}} and ??? stand for nothing. "
        f"Type {dotted}=<the value itself>."
    )


def section_with_value(entry: Entry) -> str:
    """What is wrong with a value where a section of keys stands."""
    dotted, text = ".".join(entry.path), default_text(value_of(entry.node, None))
    what = f"{dotted} {entry.place} is {text!r}, but {dotted} is a section of keys."
    if dotted in GROUPS:
        return f"{what} To pick configs/{dotted}/{text}.yaml write use: {{{dotted}: {text}}}."
    example = f"{dotted}.msmarco.format" if dotted == "data.tasks" else keys_of_section(entry.path)[0]
    return f"{what} Type {example}=<value>."


def wrong_type(entry: Entry, key: Key, value: Any) -> str:
    """What is wrong with a value that cannot be converted to the type of its key."""
    dotted = ".".join(entry.path)
    fitting = default_text(key.default)
    if key.kind == "list" and isinstance(value, str):
        fitting = f"[{value}]"
    elif key.kind == "str" and isinstance(value, list):
        fitting = ",".join(map(str, value))
    elif key.kind == "int":
        try:
            fitting = str(int(float(typing.cast(str, value))))
        except (TypeError, ValueError, OverflowError):
            pass
    got = "empty" if value is None else repr(value)
    null = " or null" if key.optional else ""
    return f"{dotted} {entry.place} is {got}; it must be {_KIND_WORDS[key.kind]}{null}. Type {dotted}={fitting}."
