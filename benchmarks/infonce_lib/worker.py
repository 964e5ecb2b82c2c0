"""A process of its own for one workload: it reports once, then times what it is told to, round by round."""

import ctypes
import gc
import importlib
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from infonce_lib import machine
from infonce_lib.options import Options

SAMPLE_SECONDS = 0.2  # calls that are shorter are timed several at once: others' use is known in hundredths of a second
LONG_CALL_SECONDS = 2.0  # the first call counts as a repetition where it took longer: what it warms up no longer shows


@dataclass(frozen=True)
class Job:
    """What to build in the process: `module`.`name`(**arguments) gives a Workload."""

    label: str
    module: str
    name: str
    arguments: dict[str, Any]
    timed: bool = True  # false = no rounds: only what the first call and the check say


@dataclass
class First:
    """What a process says of its first call."""

    figures: dict[str, float] = field(default_factory=dict)  # from Workload.check
    workspace: int = 0  # peak bytes beyond what was resident before the call and the gradients that it returns
    gradients: int = 0  # bytes
    seconds: float = 0.0  # of the first call
    foreign: float = 0.0  # share of the machine that others used meanwhile
    failed: str = ""  # why there is nothing


@dataclass(frozen=True)
class Sample:
    """One timing."""

    seconds: float  # a call
    calls: int
    foreign: float  # share of the machine that others used meanwhile


def serve(connection: Connection, job: Job, options: Options) -> None:
    """Build the workload, send First, then a list of Sample at every message that is not None."""
    sys.stdout = sys.stderr  # what packages say is not part of the tables
    import torch

    torch.set_num_threads(options.threads)
    try:
        _limit_memory(options.max_gib)
        workload = getattr(importlib.import_module(job.module), job.name)(**job.arguments)
        figures = workload.check()
        first = _first_call(workload, options) if job.timed or workload.gradient_bytes else First()
        first.figures = figures
        connection.send(first)
        patience, per_call = options.patience, first.seconds
        while connection.recv() is not None:
            samples, waited = _samples(workload.run, per_call, options, patience)
            patience -= waited
            per_call = min(sample.seconds for sample in samples)
            connection.send(samples)
    except EOFError:  # the parent has gone
        return
    except (MemoryError, RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        connection.send(First(failed=_reason(error)))


def _reason(error: Exception) -> str:
    """One line for a cell of a table."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "does not fit"
    return f"{type(error).__name__}: {text}"[:160]


def _limit_memory(max_gib: float) -> None:
    """Let an allocation fail that the machine cannot serve, instead of having the kernel end some process."""
    allowed = min(max_gib * 2**30, 0.9 * machine.free_memory())
    limit = machine.memory_of_process("VmData") + int(allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _first_call(workload: Any, options: Options) -> First:
    """Memory and time of the first call; the libraries are loaded by then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the call could take what earlier ones gave back
    machine.reset_peak()
    before = machine.memory_of_process("VmRSS")
    use, began = machine.ForeignUse(), _clock(options)()
    outcome = workload.run()
    seconds = _clock(options)() - began
    extra = machine.memory_of_process("VmHWM") - before
    del outcome
    gradients = workload.gradient_bytes
    return First({}, extra - gradients, gradients, seconds, use.share())


def _samples(run: Callable[[], Any], per_call: float, options: Options, patience: float) -> tuple[list[Sample], float]:
    """Timings of one round, and the seconds waited for a quiet machine. per_call is what a call takes, about."""
    clock = _clock(options)
    samples: list[Sample] = []
    spent = waited = 0.0
    while not samples or spent < options.seconds:
        if options.clock == "wall":  # CPU seconds do not count what others take
            waited += machine.wait_for_quiet(options.foreign, patience - waited)
        wanted = min(SAMPLE_SECONDS, options.seconds)
        calls = max(1, math.ceil(wanted / max(per_call, 1e-6)))
        use, began, wall = machine.ForeignUse(), clock(), time.perf_counter()
        for _ in range(calls):
            run()
        seconds, foreign = clock() - began, use.share()
        spent += time.perf_counter() - wall
        per_call = seconds / calls
        samples.append(Sample(per_call, calls, foreign))
    return samples, waited


def _clock(options: Options) -> Callable[[], float]:
    return time.perf_counter if options.clock == "wall" else time.process_time
