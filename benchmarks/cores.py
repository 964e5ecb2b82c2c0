"""How much the cores of this machine do together, tenth by tenth of a second, beside what one does alone.

    python benchmarks/cores.py [seconds=20]

Each core multiplies small matrices in a process of its own: no threads, no waiting. A virtual machine of two cores may
get two cores of its host in one moment and two threads of one core in the next; times on two threads then have two
values, which no program inside can tell from its own doing.
"""

import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.queues import Queue

OPTIONS = {"seconds": "20"}
PIECE_SECONDS = 0.1
SHAPE = 128, 384, 128


def main(words: list[str]) -> None:
    """Print what one core reaches alone, and the rates of all in each piece of time."""
    options = OPTIONS | dict(word.partition("=")[::2] for word in words)
    if unknown := sorted(set(options) - set(OPTIONS)):
        print(f"There is no option {', '.join(unknown)}; there is seconds, as seconds=5.", file=sys.stderr)
        sys.exit(2)
    try:
        seconds = float(options["seconds"])
    except ValueError:
        print(f"seconds is {options['seconds']!r}; it must be a number, as seconds=5.", file=sys.stderr)
        sys.exit(2)
    cores = sorted(os.sched_getaffinity(0))
    alone = statistics.median(_rates(cores[:1], 2.0)[0])
    rates = _rates(cores, seconds)
    sums = [sum(piece) / alone for piece in zip(*rates, strict=False)]
    print(f"One core alone: {alone:.0f} GFLOP/s. {len(cores)} cores together, as multiples of that:")
    print(" ".join(f"{each:.2f}" for each in sums))
    print(f"From {min(sums):.2f} to {max(sums):.2f}, median {statistics.median(sums):.2f}.")


def _rates(cores: list[int], seconds: float) -> list[list[float]]:
    """GFLOP/s of each core in each piece of the time."""
    context = multiprocessing.get_context("spawn")
    results: Queue[tuple[int, list[float]]] = context.Queue()
    begin = context.Barrier(len(cores))
    workers = [context.Process(target=_work, args=(core, seconds, begin, results)) for core in cores]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=seconds + 120) for _ in workers)
    for worker in workers:
        worker.join()
    return [found[core] for core in cores]


def _work(core: int, seconds: float, begin, results) -> None:
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    rows, inner, columns = SHAPE
    left, right, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    torch.mm(left, right, out=out)
    begin.wait()
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < PIECE_SECONDS:
            torch.mm(left, right, out=out)
            count += 1
        rates.append(2e-9 * rows * inner * columns * count / passed)
    results.put((core, rates))


if __name__ == "__main__":
    main(sys.argv[1:])
