"""Durations of steps and saves in, one warning out when a stop could not be obeyed before the time limit."""

import math
import time
from collections.abc import Callable


class LeadWatch:
    """Whether the warning before the time limit comes early enough: a step ends and is saved, with as much to spare."""

    def __init__(self, lead_seconds: float, say: Callable[[str], None] | None) -> None:
        """lead_seconds: 0 = there is no limit to compare with. say: None on the ranks that keep silent."""
        self.lead_seconds = lead_seconds
        self._say = say
        self.longest_step = 0.0  # s
        self.longest_save = 0.0  # s
        self._warned = False
        self._since = time.monotonic()
        self._step: int | None = None

    def end_step(self, done: int) -> None:
        """Note that `done` steps are over. Called where the host has waited for the device."""
        now = time.monotonic()
        if self._step is None:
            # The first call: compiling, and the first batches, come once and are no measure of a later step.
            pass
        elif done > self._step:
            self.longest_step = max(self.longest_step, (now - self._since) / (done - self._step))
        self._since, self._step = now, done
        self._warn()

    def end_save(self, seconds: float) -> None:
        """Note a save."""
        self.longest_save = max(self.longest_save, seconds)
        self._since = time.monotonic()
        self._warn()

    @property
    def needed_seconds(self) -> int:
        """Lead time that a stop needs: twice the longest step and save, rounded up."""
        return math.ceil(2 * (self.longest_step + self.longest_save))

    def _warn(self) -> None:
        if self._warned or not self.lead_seconds or self.lead_seconds >= self.needed_seconds:
            return
        self._warned = True
        if self._say is not None:
            self._say(
                f"A step took {self.longest_step:.1f} s and a save {self.longest_save:.1f} s: a stop "
                f"{self.lead_seconds:.0f} s before the time limit may come too late. "
                f"Type cluster.stop_lead_seconds={self.needed_seconds} when the job is submitted again."
            )

    def summarise(self, stage: str) -> None:
        """Say both figures, at the end of a stage with a time limit."""
        if self.lead_seconds and self._say is not None:
            self._say(
                f"{stage} longest step {self.longest_step:.1f} s, longest save {self.longest_save:.1f} s "
                f"(cluster.stop_lead_seconds={self.lead_seconds:.0f}, needed {self.needed_seconds})"
            )
