"""Rows encoded so far in, a line for the log and a row of metrics.jsonl out, every few seconds."""

import time
from collections.abc import Callable
from pathlib import Path

from tdro_hpc.training.metrics import append_rows, duration_of

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """How far the encoding of several lists of texts has come. Only the first rank writes."""

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        rows: int,
        first_rank: bool,
        seconds: float = SECONDS_BETWEEN_LINES,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        path     metrics.jsonl of the stage
        rows     texts of all lists together
        seconds  between two lines
        """
        self.path, self.stage, self.rows = path, stage, rows
        self.rows_before = 0  # of the lists that are finished
        self.label = ""  # what is being encoded
        self._first_rank, self._seconds, self._say = first_rank, seconds, say
        self._began = self._written = time.monotonic()
        self._rows_at_begin: int | None = None

    def say(self, line: str) -> None:
        """A line in the log, once for all ranks."""
        if self._first_rank:
            self._say(line)

    def due(self) -> bool:
        """Whether it is time for the next line."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, rows_of_list: int) -> None:
        """Report `rows_of_list` rows of the present list, over all ranks."""
        self._written = time.monotonic()
        if not self._first_rank:
            return
        done = self.rows_before + rows_of_list
        if self._rows_at_begin is None:  # what an earlier run left is no measure of this run's speed
            self._rows_at_begin, self._began = done, self._written
        seconds = self._written - self._began
        rate = (done - self._rows_at_begin) / seconds if seconds > 0 else 0.0
        clock = {"time": time.time(), "rows_per_second": rate}
        append_rows(self.path, [{"stage": self.stage, "step": done, "steps": self.rows, "clock": clock}])
        parts = [f"{self.stage} rows {done}/{self.rows} {100 * done // max(1, self.rows)}%", self.label]
        if rate > 0:
            parts += [f"{rate:.0f} rows/s", f"eta {duration_of((self.rows - done) / rate)}"]
        self.say(" | ".join(part for part in parts if part))

    def finish_texts(self, rows: int) -> None:
        """A list of `rows` texts is whole."""
        self.rows_before += rows
        if self.due() or self.rows_before >= self.rows:
            self.write(0)
