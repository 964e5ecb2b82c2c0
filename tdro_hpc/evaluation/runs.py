"""Ranked documents in, a run file in TREC form out: query id, Q0, document id, place, score, name of the model."""

import gzip
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tdro_hpc.evaluation.metrics import Ranking

LINES_OF_A_PLAIN_FILE = 200_000  # longer runs are written as .trec.gz


def write_run(path: Path, run: Mapping[str, Ranking], *, model: str) -> Path:
    """Write `path`, or `path`.gz where the run is long, under a temporary name first; returns the file's path.

    White space inside ids and the model's name becomes an underscore: the columns are separated by spaces. Nine digits
    tell any two float32 scores apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_long = sum(len(ranking) for ranking in run.values()) > LINES_OF_A_PLAIN_FILE
    packed = path.with_name(path.name + ".gz")
    target, other = (packed, path) if is_long else (path, packed)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    if is_long:
        with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=4) as file:
            file.writelines(_lines(run, model))
    else:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_lines(run, model))
    os.replace(temporary, target)
    other.unlink(missing_ok=True)
    return target


def _lines(run: Mapping[str, Ranking], model: str) -> Iterator[str]:
    name = _joined(model)
    for query, ranking in run.items():
        for place, (document, score) in enumerate(ranking, start=1):
            yield f"{_joined(query)} Q0 {_joined(document)} {place} {score:.9g} {name}\n"


def _joined(name: str) -> str:
    return "_".join(name.split())
