"""Prints what a file of a million rows costs: seconds to index it, to open it again, to read rows, and memory.

    python benchmarks/rowfile.py [rows=1000000] [row_bytes=1000] [folder=<where the file is made>]

Each figure comes from a process of its own; memory is the peak of that process, Python and numpy included.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tdro_hpc.data.formats import JsonRows
from tdro_hpc.data.formats.rows import tdro_record

READS = 20_000


def write_rows(path: Path, rows: int, row_bytes: int) -> None:
    """Write a task in the released layout; `row_bytes` is the length of a row, more or less."""
    filler = "word " * max(1, (row_bytes - 200) // 10)
    with path.open("w") as handle:
        for number in range(rows):
            row = {
                "query_id": str(number),
                "query": f"question {number}",
                "positive_passages": [{"docid": str(number), "title": "", "text": filler}],
                "negative_passages": [{"docid": str(number + 1), "title": "", "text": filler}],
            }
            handle.write(json.dumps(row) + "\n")


def opened(path: Path, check: bool) -> JsonRows:
    variant = "skip-tdro" if check else "raise"
    return JsonRows(path, cache_dir="", check=tdro_record if check else None, variant=variant)


def open_raise(path: Path) -> int:
    return len(opened(path, check=False))


def open_skip(path: Path) -> int:
    return len(opened(path, check=True))


def read_random(path: Path) -> int:
    rows = opened(path, check=False)
    for row in np.random.default_rng(0).integers(len(rows), size=READS).tolist():
        tdro_record(rows.raw(row))
    return READS


def import_only(path: Path) -> int:
    return 0


def _measure(results: "multiprocessing.Queue[tuple[float, float]]", task: Callable[[Path], int], path: Path) -> None:
    start = time.perf_counter()
    task(path)
    seconds = time.perf_counter() - start
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measured(task: Callable[[Path], int], path: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a task in a new process."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    process = context.Process(target=_measure, args=(results, task, path))
    process.start()
    answer = results.get()
    process.join()
    return answer


def main(arguments: list[str]) -> None:
    options = {"rows": "1000000", "row_bytes": "1000", "folder": ""} | dict(text.split("=", 1) for text in arguments)
    with tempfile.TemporaryDirectory(dir=options["folder"] or None) as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, int(options["rows"]), int(options["row_bytes"]))
        print(f"rows {options['rows']}, file {path.stat().st_size / 1e6:.0f} MB")
        steps: list[tuple[str, Callable[[Path], int]]] = [
            ("import only", import_only),
            ("index, on_bad_row=raise", open_raise),
            ("open again", open_raise),
            ("index, on_bad_row=skip", open_skip),
            ("open again", open_skip),
            (f"read {READS} random rows", read_random),
        ]
        for name, task in steps:
            seconds, mebibytes = measured(task, path)
            print(f"{name:28} {seconds:8.3f} s   peak {mebibytes:6.0f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
