"""key=value words in, one frozen Options out; every mistake names what to type."""

import difflib
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

TABLES = (
    "float32",
    "small",
    "bf16",
    "memory",
    "options",
    "groups",
    "curve",
    "precision",
    "roofline",
    "cached_step",
)
CHOICES = {"clock": ("wall", "cpu"), "implementation": ("fused", "torch", "auto"), "table": ("all", *TABLES)}


@dataclass(frozen=True)
class Options:
    """What is measured, and how. B, n, d and only are empty for a table's own choice."""

    table: tuple[str, ...] = ("all",)  # names of tables, separated by commas
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    clock: str = (
        "wall"  # wall, or cpu = CPU seconds of the process over all its threads, for a machine that is never quiet
    )
    rounds: int = 5  # every implementation is timed once a round, in turns
    seconds: float = 1.0  # timed in a round, an implementation; at least one call
    max_seconds: float = 150.0  # a call that would take longer is left out; no further rounds after as much
    max_gib: float = 64.0  # memory that a process may ask for; never more than the machine has free
    foreign: float = 0.1  # share of the machine that others may use during a clean repetition
    patience: float = 30.0  # seconds that a measurement may wait for a quiet machine
    implementation: str = "fused"  # which one of this project's loss; fused fails where the library is not built
    only: tuple[str, ...] = ()  # implementations to measure
    B: tuple[int, ...] = ()  # noqa: N815 - rows, as in every paper
    n: tuple[int, ...] = ()  # negatives a row
    d: tuple[int, ...] = ()  # width of the embeddings
    json: Path | None = None  # every repetition
    md: Path | None = None  # the printed tables
    out: Path | None = None  # folder of the plots

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables asked for, in the order of TABLES."""
        return tuple(name for name in TABLES if name in self.table or "all" in self.table)


def parse_options(words: list[str]) -> Options:
    """Options of a command line.

    words   key=value each
    raises  SystemExit with what was expected for an unknown key, a value of the wrong type or out of range
    """
    known = {entry.name: entry for entry in fields(Options)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}=...?" if near else f"Known: {', '.join(known)}."
            raise SystemExit(f"{word!r} is not an option of this benchmark, which takes key=value. {hint}")
        values[key] = _value(key, known[key].default, text)
    options = Options(**values)
    for key, lowest in {"threads": 1, "rounds": 1, "seconds": 0, "max_seconds": 0, "max_gib": 0, "patience": 0}.items():
        if getattr(options, key) < lowest:
            raise SystemExit(f"{key} is {getattr(options, key)}; it must be at least {lowest}.")
    for key, lowest in {"B": 2, "n": 0, "d": 1}.items():
        if any(value < lowest for value in getattr(options, key)):
            raise SystemExit(f"{key} is {getattr(options, key)}; each number must be at least {lowest}.")
    return options


def _value(key: str, default: Any, text: str) -> Any:
    """The text as the type of the option's default."""
    try:
        if key in ("B", "n", "d"):
            return tuple(int(part) for part in text.split(","))
        if key in ("json", "md", "out"):
            return Path(text)
        if default is MISSING or isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except ValueError as error:
        raise SystemExit(f"{key}={text}: {error}. Numbers are separated by commas where several are allowed.") from None
    names = tuple(text.split(",")) if isinstance(default, tuple) else (text,)
    for name in names:
        if key in CHOICES and name not in CHOICES[key]:
            raise SystemExit(f"{key}={text}: {name!r} is none of {', '.join(CHOICES[key])}.")
    return names if isinstance(default, tuple) else text
