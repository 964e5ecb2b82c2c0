"""Prints what the loss costs beside named peers: time, memory, precision, and a whole step with gradient caching.

    python benchmarks/infonce.py [table=float32,memory] [threads=2] [clock=wall] [rounds=5] [md=tables.md] [out=plots]

Tables (`table=all` is all of them): float32, small, bf16 (times at many shapes), memory, options, groups (against the
mean loss without), curve (memory and time as the batch grows, plots under out=), precision (against float64 as the
temperature falls), roofline (share of the machine's peak), cached_step (a whole training step). B=, n= and d= replace
the shapes of a table: rows, negatives of a row, width. only=mean,naive keeps some implementations.

All get the same unit vectors and owe the mean loss and the gradients of queries and documents. Every implementation at
every shape runs in a process of its own, is first compared with float64 at a small shape (one that is wrong is not
timed), gives the memory of its first call, and is then timed in turns with the others, round by round. A figure is the
median of the repetitions during which other programs used at most `foreign` of the machine; a star says that there were
none, and all count. clock=cpu takes CPU seconds instead of wall time, for a machine that is never quiet. Needs Linux.

The other options are explained in infonce_lib/options.py. `make build` makes the compiled loss; implementation=torch
measures without it.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

from infonce_lib.cached_step import cached_step_table
from infonce_lib.machine import processor
from infonce_lib.memory import curve_table, memory_table
from infonce_lib.options import TABLES, Options, parse_options
from infonce_lib.precision import precision_table
from infonce_lib.report import Report, legend
from infonce_lib.roofline import roofline_table
from infonce_lib.rounds import Rounds
from infonce_lib.tables import TIME_TABLES, Session, time_table

OTHERS: dict[str, Callable[[Session], Report]] = {
    "memory": memory_table,
    "curve": curve_table,
    "precision": precision_table,
    "roofline": roofline_table,
    "cached_step": cached_step_table,
}
assert {*TIME_TABLES, *OTHERS} == {*TABLES}, "every table has a function"


def build_report(session: Session, name: str) -> Report:
    """The table of that name, measured now."""
    return OTHERS[name](session) if name in OTHERS else time_table(session, name)


def headline(options: Options) -> str:
    """What the figures were made on and with."""
    versions = [_version(package) for package in ("torch", "sentence-transformers")]
    return (
        f"{processor()}, {', '.join(versions)}, threads={options.threads}, clock={options.clock}, "
        f"rounds={options.rounds}, implementation={options.implementation}"
    )


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def main(words: list[str]) -> None:
    """Print each table when it is done; write json= and md= then too, so that an interrupted run leaves something."""
    options = parse_options(words)
    session, texts = Session(Rounds(options)), [headline(options) + "\n"]
    print(texts[0], flush=True)
    labels: list[str] = []
    for name in options.tables:
        report = build_report(session, name)
        labels += report.labels
        texts.append(report.text())
        print(texts[-1], flush=True)
        if options.md is not None:
            write(options.md, "\n".join([*texts, legend(labels)]))
        if options.json is not None:
            written = {"machine": texts[0].strip(), "words": words, "figures": session.raw}
            write(options.json, json.dumps(written, indent=1) + "\n")
    print(legend(labels))


def write(path: Path, text: str) -> None:
    """The text in the file, its folder made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
