"""Runs the ranks of one local job: submitit's controller, made to pass on every stop signal and to end what is left
when a rank dies. Started by executor.py as a program of its own, which outlives the front door.

    python -m tdro_hpc.launch.local.supervisor <stage>/log/attempt-<n>
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import Controller

from tdro_hpc.launch.jobs import HEARTBEAT, HEARTBEAT_SECONDS, append_event, end_group
from tdro_hpc.launch.local.executor import rendezvous_file
from tdro_hpc.launch.record import DONE, FAILED, write_failed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_GRACE_SECONDS = 3.0  # for the other ranks after one has died: enough to write down the first cause
_POLL_SECONDS = 0.05
_TAIL_LINES = 15


class Supervisor(Controller):
    """The ranks of one job, from start to end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stage_dir = folder.parent.parent
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _pass_on(self, number: int, frame: object) -> None:
        """Hand a stop signal to the ranks, which save at the next step boundary and leave together."""
        for task in self.tasks:
            if task.poll() is None:
                task.send_signal(number)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Exit codes of the ranks in their order, when all have ended; negative = ended by that signal."""
        died = 0.0  # when the first rank ended badly
        beat = 0.0
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            if now - beat > HEARTBEAT_SECONDS:
                (self.stage_dir / "log" / HEARTBEAT).touch()
                beat = now
            if not died and any(codes):
                died = now
                self._note_death(codes)
            if all(code is not None for code in codes):
                return codes
            # A rank whose partner is gone waits in a collective, where it looks at no flag: only SIGKILL ends it.
            if died and now - died > _GRACE_SECONDS:
                for task in self.tasks:
                    task.kill()
            time.sleep(_POLL_SECONDS)

    def _note_death(self, codes: Sequence[int | None]) -> None:
        """Write FAILED.json for a rank that could not do it itself: it was killed, or it never came to life."""
        rank = next(index for index, code in enumerate(codes) if code)
        code = codes[rank]
        assert code is not None, "the rank that died has a code"
        if code in [-number for number in STOP_SIGNALS]:
            return  # asked to stop before it could listen: nothing has failed
        log = self.stage_dir / "log" / f"rank{rank}.log"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel does that when memory runs out)" if code == -signal.SIGKILL else ""
            # What the others say of it, a connection lost, is not the cause: it is replaced.
            write_failed(self.stage_dir, rank=rank, error=f"ended by {name}{hint}", log=log, replace=True)
            return
        start_log = self.folder / f"{self.pid}_{rank}_log.err"
        lines = start_log.read_text(errors="replace").strip().split("\n")[-_TAIL_LINES:] if start_log.exists() else []
        error = "\n".join([f"left with exit code {code} before it could say why", *lines])
        write_failed(self.stage_dir, rank=rank, error=error, log=start_log)

    def supervise(self) -> int:
        """Run the job to its end, note that in jobs.jsonl; 0 when all ranks left well."""
        self.start_tasks()
        codes = self.wait()
        # Loader processes of a rank that was killed notice it late, or never.
        end_group(os.getpid())
        pickle = self.folder / f"{self.pid}_submitted.pkl"
        if pickle.exists():
            rendezvous_file(pickle).unlink(missing_ok=True)
        for file in [*self.stdouts, *self.stderrs]:
            file.close()
        append_event(self.stage_dir, "end", job=self.pid, exit_codes=list(codes))
        return 1 if (self.stage_dir / FAILED).exists() and not (self.stage_dir / DONE).exists() else 0


if __name__ == "__main__":
    sys.exit(Supervisor(Path(sys.argv[1])).supervise())
