"""Several values of one key in, the arguments of one run for each out: `s1.eta=0.01,0.02`. Pure text, no config.

Only keys of numbers and of true or false are swept: commas inside a text or a list are a part of it. Several such keys
make every combination of their values.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tdro_hpc.config.keys import KEYS, PICKS, key_of, path_of

_SWEPT_KINDS = ("int", "float", "bool")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.+=-]+")
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})*,0\d\d(,\d{3})*")


@dataclass(frozen=True)
class Variation:
    """One run of a sweep."""

    arguments: tuple[str, ...]  # those of the line, each key with a single value
    label: str = ""  # eta0.01-seed1: what is added to the run's name; empty = the line is no sweep
    values: tuple[str, ...] = ()  # s1.eta=0.01, seed=1


def is_swept(argument: str) -> bool:
    """Whether an argument `key=value` gives several values to a key that takes one."""
    name, equals, text = argument.partition("=")
    name = name.strip()
    if not equals or "," not in text or text.strip()[:1] in ("[", "{", "'", '"') or name in PICKS:
        return False
    key = key_of(path_of(name))
    return key is not None and key.kind in _SWEPT_KINDS


def variations(arguments: Sequence[str]) -> list[Variation]:
    """One variation for every combination of swept values, in the order of the line; one in all without a sweep.

    raises ValueError with a line for each mistake: an empty value, one that is given twice, two runs of one name
    """
    swept = {index: argument for index, argument in enumerate(arguments) if is_swept(argument)}
    problems = [problem for argument in swept.values() for problem in _problems(argument)]
    if problems:
        raise ValueError("\n".join(problems))
    choices = [[(index, value) for value in _values(argument)] for index, argument in swept.items()]
    found: list[Variation] = []
    for combination in itertools.product(*choices):
        chosen = list(arguments)
        given = []
        for index, value in combination:
            name = swept[index].partition("=")[0].strip()
            chosen[index] = f"{name}={value}"
            given.append((name, value))
        label = "-".join(_label(name, value) for name, value in given)
        found.append(Variation(tuple(chosen), label, tuple(f"{name}={value}" for name, value in given)))
    labels = [variation.label for variation in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"Two runs of this sweep would both be named {twice[0]}. Leave one of their values out.")
    return found


def _values(argument: str) -> list[str]:
    """The values as they go into the config and into names: 0.010 and 1e-2 are 0.01, True is true."""
    name, _, text = argument.partition("=")
    key = key_of(path_of(name.strip()))
    assert key is not None, f"{name} is swept and is therefore a key"
    return [_canonical(value.strip(), key.kind) for value in text.split(",")]


def _canonical(value: str, kind: str) -> str:
    """One spelling of a value, so that a run is found again; what is no value stays as it is, to be reported."""
    try:
        number = float(value)
    except ValueError:
        return value.lower() if kind == "bool" else value
    if kind == "float":
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return str(int(value)) if kind == "int" and re.fullmatch(r"[+-]?\d+", value) else value


def _problems(argument: str) -> list[str]:
    name, _, text = (part.strip() for part in argument.partition("="))
    if _THOUSANDS.fullmatch(text):
        return [f"{name}={text} is read as several values. Type {name}={text.replace(',', '')} for one number."]
    values = _values(argument)
    if "" in values:
        kept = ",".join(value for value in values if value)
        return [f"{name}={text} has an empty value between its commas. Type {name}={kept or '<value>'}."]
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    once = ",".join(dict.fromkeys(values))
    return [f"{name}={text} gives {value} twice. Type {name}={once}." for value in twice]


def _label(name: str, value: str) -> str:
    """eta0.01 for s1.eta=0.01; the whole key where others end like it, so that a name always means one key."""
    last = name.rpartition(".")[2]
    same = [key for key in KEYS if key.rpartition(".")[2] == last]
    word = last if len(same) == 1 else name
    return _NOT_IN_NAMES.sub("_", f"{word}{'-' if value[:1].isalpha() else ''}{value}")
