"""The status table again and again, until nothing is at work any more: in place on a terminal, else when it changes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from tdro_hpc.launch.look.status import at_work, queue_of, see_run, tables_text
from tdro_hpc.launch.queue import Queue

SLURM_SECONDS = 10.0  # the queue is asked no more often: its controller serves a whole site
_FILES_SECONDS = 2.0


class Watched:
    """Runs that are looked at again and again."""

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        self.run_dirs = list(run_dirs)
        self.queue: Queue | None = None
        self.asked = -SLURM_SECONDS
        self.busy = True  # something ran or waited when it was last looked at

    def text(self) -> str:
        """The table as it is now; the queue in it is at most SLURM_SECONDS old."""
        if time.monotonic() - self.asked >= SLURM_SECONDS:
            self.queue = queue_of(self.run_dirs)
            self.asked = time.monotonic()
        runs = {run_dir: see_run(run_dir, self.queue) for run_dir in self.run_dirs}
        self.busy = any(at_work(stages) for stages in runs.values())
        return tables_text(runs, self.queue)


def watch(run_dirs: Sequence[Path], out: TextIO, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show the runs until nothing of them runs or waits, or a person presses Ctrl-C."""
    watched = Watched(run_dirs)
    try:
        if out.isatty():
            _watch_in_place(watched, out, sleep)
        else:
            _watch_by_lines(watched, out, sleep)
    except KeyboardInterrupt:
        out.write("\n")


def _watch_by_lines(watched: Watched, out: TextIO, sleep: Callable[[float], None]) -> None:
    shown = ""
    while True:
        text = watched.text()
        if text != shown:
            out.write(f"{'' if not shown else time.strftime('%H:%M:%S') + chr(10)}{text}\n\n")
            out.flush()
            shown = text
        if not watched.busy:
            return
        sleep(SLURM_SECONDS)


def _watch_in_place(watched: Watched, out: TextIO, sleep: Callable[[float], None]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=out), auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            text = f"{watched.text()}\n\n{time.strftime('%H:%M:%S')}  Ctrl-C ends the watching, not the jobs"
            live.update(Text(text), refresh=True)
            if not watched.busy:
                return
            sleep(_FILES_SECONDS)
