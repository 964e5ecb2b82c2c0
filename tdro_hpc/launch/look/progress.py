"""Shows a running stage: one bar on a terminal, the lines of rank 0's log where the output is a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from tdro_hpc.launch.jobs import newest_metrics, tail_of

FIRST_LOG = "rank0.log"


class View(Protocol):
    """What the chain needs of either."""

    def begin(self, stage_dir: Path, name: str) -> None:
        """A stage is about to start or is running."""

    def update(self) -> None:
        """Show what is new."""

    def end(self) -> None:
        """The job of the stage is over."""

    def say(self, words: str) -> None:
        """Print a line of the front door's own."""


class LogTail:
    """New text of a log that is being written, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> str:
        """Lines written since the last call, with their line ends."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0  # another file under this name
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return ""
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode(errors="replace")


class LineView:
    """Passes the lines of rank 0 through."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.tail: LogTail | None = None

    def begin(self, stage_dir: Path, name: str) -> None:
        """See View."""
        self.tail = LogTail(stage_dir / "log" / FIRST_LOG)

    def update(self) -> None:
        """See View."""
        text = self.tail.read() if self.tail else ""
        if text:
            self.out.write(text)
            self.out.flush()

    def end(self) -> None:
        """See View."""
        self.update()

    def say(self, words: str) -> None:
        """See View."""
        self.out.write(words + "\n")
        self.out.flush()


class BarView:
    """One bar a stage, from the newest row of metrics, with the newest line of the log under it."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task: Any = None
        self.stage_dir = Path()

    def begin(self, stage_dir: Path, name: str) -> None:
        """See View."""
        self.stage_dir = stage_dir
        self.task = self.progress.add_task(name, total=None, words="starting")

    def update(self) -> None:
        """See View."""
        row = newest_metrics(self.stage_dir)
        if row.get("steps"):
            self.progress.update(self.task, completed=row["step"], total=row["steps"])
        lines = tail_of(self.stage_dir / "log" / FIRST_LOG).strip().split("\n")
        self.progress.update(self.task, words=lines[-1])

    def end(self) -> None:
        """See View."""
        self.update()
        self.progress.stop_task(self.task)

    def say(self, words: str) -> None:
        """See View."""
        self.progress.console.print(words, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def view_for(out: TextIO) -> Iterator[View]:
    """Bars on a terminal, lines elsewhere."""
    if not out.isatty():
        yield LineView(out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=Console(file=out),
        refresh_per_second=4,
    )
    with bars:
        yield BarView(bars)
