"""Signals in, one flag out. Handlers only set the flag: a save or a collective is never interrupted.

Slurm sends SIGUSR2 to every process of a job step. Those that a rank starts by exec, such as compilers, know nothing of
it and would die. They inherit what is blocked: run.py blocks SIGUSR2 before anything else is started, and it is looked
for here where it waits.
"""

import signal
from collections.abc import Iterable
from types import FrameType

from tdro_hpc.parallel.process import any_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
BLOCKED_SIGNAL = signal.SIGUSR2


class Stopped(Exception):
    """The stage was asked to stop, has saved, and continues with the same line."""

    def __init__(self, stage: str, step: int, steps: int, reason: str) -> None:
        super().__init__(f"{stage} stopped at step {step} of {steps} ({reason}); the same line continues it.")
        self.stage, self.step, self.steps, self.reason = stage, step, steps, reason


class StopFlag:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.reason = ""

    @property
    def requested(self) -> bool:
        """This process has had one of STOP_SIGNALS."""
        if not self.reason and BLOCKED_SIGNAL in signal.sigpending():
            self.request(BLOCKED_SIGNAL)
        return bool(self.reason)

    def request(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: notes the signal's name."""
        self.reason = signal.Signals(number).name

    def agreed(self) -> bool:
        """Any rank was asked to stop. A collective: all ranks call it at the same step boundary."""
        # All ranks must leave at the same step, otherwise the next all-gather waits for ever.
        return any_rank(self.requested)


_FLAG = StopFlag()


def stop_flag() -> StopFlag:
    """The flag of this process."""
    return _FLAG


def install_stop_handlers(early: Iterable[int] = ()) -> StopFlag:
    """Let STOP_SIGNALS set the flag instead of ending the process; takes the place of handlers set before.

    early   signals that those handlers have noted
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _FLAG.request)
    for noted in early:
        _FLAG.request(noted)
    return _FLAG
