"""Jobs in, figures out: a process for each job, all of them timed in turns, round by round."""

import multiprocessing
import os
import signal
import statistics
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from infonce_lib.options import Options
from infonce_lib.worker import LONG_CALL_SECONDS, First, Job, Sample, serve

STARTUP_SECONDS = 120.0  # imports and the check of a process, on a slow machine
PRELOADED = ["torch", "torch._dynamo", "infonce_lib.workloads", "tdro_hpc.losses.infonce"]


@dataclass
class Figure:
    """What is known of a job."""

    first: First
    samples: list[Sample] = field(default_factory=list)
    foreign_limit: float = 1.0

    @property
    def failed(self) -> str:
        return self.first.failed

    @property
    def clean(self) -> list[Sample]:
        """Samples during which others left the machine alone; all of them if there is no such one."""
        return [sample for sample in self.samples if sample.foreign <= self.foreign_limit] or self.samples

    @property
    def disturbed(self) -> bool:
        """Others used the machine during every sample."""
        return min(sample.foreign for sample in self.samples) > self.foreign_limit

    @property
    def seconds(self) -> float:
        """Median of the clean samples."""
        return statistics.median(sample.seconds for sample in self.clean)


class Rounds:
    """Starts processes by forking one that has imported torch and done nothing with it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        library = str(Path(__file__).parents[1])
        os.environ |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH", "")]))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def measure(self, jobs: list[Job]) -> dict[str, Figure]:
        """Figures by label, each job in a process of its own; round by round they take turns."""
        workers = [_Worker(self.context, job, self.options) for job in jobs]
        try:
            for worker in workers:
                worker.start()
            for number in range(self.options.rounds):
                for worker in workers if number % 2 == 0 else reversed(workers):
                    worker.take_turn()
        finally:
            for worker in workers:
                worker.stop()
        return {worker.job.label: worker.figure for worker in workers}


class _Worker:
    """One process, seen from the parent."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, job: Job, options: Options) -> None:
        self.job, self.options, self.context = job, options, context
        self.figure = Figure(First(failed="not started"))
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.spent = 0.0

    def start(self) -> None:
        """Start the process and wait for its first call."""
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs, self.job, self.options), daemon=True)
        self.process.start()
        theirs.close()
        first = self._receive(STARTUP_SECONDS + 2 * self.options.max_seconds)
        self.figure = Figure(first if isinstance(first, First) else First(failed="no answer"))
        self.figure.foreign_limit = self.options.foreign
        if self.job.timed and first.seconds > LONG_CALL_SECONDS:
            self.figure.samples.append(Sample(first.seconds, 1, first.foreign))
        self.spent = first.seconds

    def take_turn(self) -> None:
        """One round, unless the job failed, is not to be timed, or has taken long enough."""
        if self.figure.failed or not self.job.timed or self.connection is None:
            return
        if self.figure.samples and self.spent >= self.options.max_seconds:
            return
        self.connection.send("time")
        answer = self._receive(self.options.seconds + self.options.patience + 3 * self.options.max_seconds)
        if isinstance(answer, First):
            self.figure.first.failed = answer.failed
            return
        self.figure.samples += answer
        self.spent += sum(sample.seconds * sample.calls for sample in answer)

    def stop(self) -> None:
        """End the process."""
        if self.process is None or self.connection is None:
            return
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self, seconds: float) -> First | list[Sample]:
        assert self.connection is not None and self.process is not None, "start comes first"
        if not self.connection.poll(seconds):
            self.process.kill()
            return First(failed=f"> {seconds:.0f} s")
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            killed = self.process.exitcode == -signal.SIGKILL  # by the kernel, when memory runs out
            return First(failed="does not fit" if killed else f"exit code {self.process.exitcode}")
