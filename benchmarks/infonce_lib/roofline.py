"""What this machine can do at most, and which share of it each loss reaches."""

import ctypes
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from infonce_lib.report import STAR, Report
from infonce_lib.tables import Session, shapes_of
from infonce_lib.worker import Job

LABELS = ("naive", "torch chunked 256", "tiled probe", "rows", "mean", "tiled probe bf16", "rows bf16", "mean bf16")
SHAPES = shapes_of((4096,), (0, 7), (384, 1024))
PRODUCTS = ((1024, 1024), (256, 4096), (2048, 8192))  # rows and columns of the score matrix
SOURCE = Path(__file__).with_name("peak.c")
RATES = {
    "multiply-add loop, float32": "float32",
    "torch.mm, float32": "float32",
    "oneDNN linear, float32": "float32",
    "multiply-add loop, bfloat16": "bfloat16",
    "torch.mm, bfloat16": "bfloat16",
}


class RateWorkload:
    """The fastest rates of this machine in GFLOP/s; nothing is timed beside them."""

    gradient_bytes = 0

    def __init__(self, widths: tuple[int, ...], threads: int, seconds: float) -> None:
        self.widths, self.threads, self.seconds = widths, threads, seconds

    def check(self) -> dict[str, float]:
        """GFLOP/s by the names of RATES; 0 for what cannot be measured here."""
        rates = dict.fromkeys(RATES, 0.0) | loop_rates(self.threads, self.seconds)
        for width in self.widths:
            for rows, columns in PRODUCTS:
                for name, product in _products(rows, columns, width).items():
                    best = _best_seconds(product, self.seconds / 10)
                    rates[name] = max(rates[name], 2e-9 * rows * columns * width / best)
        return rates

    def run(self) -> None:
        """Nothing: the rates are all that is asked for."""


def _products(rows: int, columns: int, width: int) -> dict[str, Callable[[], object]]:
    """Scores of a panel, by each way that torch has."""
    left, right = torch.randn(rows, width), torch.randn(columns, width)
    left_half, right_half = left.bfloat16(), right.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "torch.mm, float32": lambda: torch.mm(left, right.T),
        "torch.mm, bfloat16": lambda: torch.mm(left_half, right_half.T),
    }
    if torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        found["oneDNN linear, float32"] = lambda: linear(left, right, None, "none", [], "")
    return found


def _best_seconds(run: Callable[[], object], seconds: float) -> float:
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= end:
            return best


def loop_rates(threads: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of multiply-adds on registers alone over all threads; empty without a C compiler."""
    loops = loop_functions()
    return {f"multiply-add loop, {name}": _loop_rate(loop, threads, seconds) for name, loop in loops.items()}


def loop_functions() -> dict[str, "ctypes._NamedFuncPointer"]:
    """By type: function(rounds, factor, sink) of peak.c, which gives the operations it has done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(path), str(SOURCE)]
        if subprocess.run(command, capture_output=True).returncode:
            return {}
        library = ctypes.CDLL(str(path))
    functions = {name: library[f"{name}_operations"] for name in ("float32", "bfloat16")}
    for function in functions.values():
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_float, ctypes.c_void_p]
    return functions


def rate_now(function: "ctypes._NamedFuncPointer", threads: int) -> float:
    """GFLOP/s of the threads together in about this millisecond."""
    rates: list[float] = []

    def work() -> None:
        began = time.perf_counter()
        operations = function(300_000, 0.5, ctypes.byref(ctypes.c_float()))
        rates.append(1e-9 * operations / (time.perf_counter() - began))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def _loop_rate(function: "ctypes._NamedFuncPointer", threads: int, seconds: float) -> float:
    """GFLOP/s of the fastest of a few runs; ctypes lets go of Python's lock, so that threads run side by side."""
    rounds, best, end = 2_000_000, 0.0, time.perf_counter() + seconds
    while True:
        operations: list[float] = []

        def work(operations: list[float] = operations) -> None:
            operations.append(function(rounds, 0.5, ctypes.byref(ctypes.c_float())))

        workers = [threading.Thread(target=work) for _ in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        now = time.perf_counter()
        best = max(best, 1e-9 * sum(operations) / (now - began))
        if now >= end:
            return best


def roofline_table(session: Session) -> Report:
    """GFLOP/s on the three products, and their share of the machine's peak in the same type."""
    labels, shapes = session.labels(LABELS), session.shapes(SHAPES)
    widths = tuple(dict.fromkeys(shape.width for shape in shapes))
    arguments = {"widths": widths, "threads": session.options.threads, "seconds": session.options.seconds}
    job = Job("rates", "infonce_lib.roofline", "RateWorkload", arguments, timed=False)
    figure = session.rounds.measure([job])["rates"]
    session.keep("roofline", "machine", "rates", figure)
    rates = figure.first.figures
    report = Report("Share of the machine's peak", ["B, n, d", *labels])
    if figure.failed:
        report.notes.append(f"The peak is not known: {figure.failed}")
        return report
    peaks = {dtype: max(rates[name] for name in RATES if RATES[name] == dtype) for dtype in ("float32", "bfloat16")}
    for shape in shapes:
        figures = session.measure("roofline", shape, labels)
        cells = []
        for label in labels:
            figure = figures[label]
            if not figure.samples:
                cells.append(figure.failed or "-")
                continue
            rate = 1e-9 * shape.flops / figure.seconds
            peak = peaks["bfloat16" if label.endswith(" bf16") else "float32"]
            cells.append(f"{rate:.0f} = {rate / peak:.0%}" + ("*" if figure.disturbed else ""))
        report.rows.append([str(shape), *cells])
    report.notes += [
        "Cells: GFLOP/s on the three products that nobody can avoid, 6 B M d, and their share of the peak.",
        f"Peak: {peaks['float32']:.0f} in float32, {peaks['bfloat16']:.0f} in bfloat16, the fastest of these. {STAR}",
        "",
        *(f"- {name}: {rate:.0f} GFLOP/s" for name, rate in rates.items() if rate),
        "",
    ]
    report.labels += labels
    return report
