"""What the batch shell of a Slurm job runs when srun is over: notes how it ended, and gives the job its exit code.

    python -m tdro_hpc.launch.job.aftermath <stage folder> <exit code of srun> [<job id> <restart>]

Ends with 0 = DONE.json is there, 75 = stopped (or back in the queue), 1 = failed, 2 = a mistake in a call by hand.
Dependents start after 0 only. Reads files and srun's own lines, which are in the standard error of the batch shell.
"""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.atomic import write_json
from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.drawing import draw_report
from tdro_hpc.launch.job.first_cause import Cause, cause_in, ended_by_slurm, is_second_hand
from tdro_hpc.launch.job.hold import HOLDER
from tdro_hpc.launch.job.last_words import free_room
from tdro_hpc.launch.job.place import SLURM, Place
from tdro_hpc.launch.job.rank_log import ATTEMPT
from tdro_hpc.launch.job.requeue import STOPPED_CODE, after_stop, submit_row
from tdro_hpc.launch.jobs import JOBS, append_event, newest_metrics, read_jsonl
from tdro_hpc.launch.record import DONE, FAILED, progress_of, read_json
from tdro_hpc.launch.slurm.sbatch import SETUP_FAILED

DONE_CODE, FAILED_CODE, MISTAKE_CODE = 0, 1, 2
_TAIL_LINES = 15
_MISTAKE = f"Exited with exit code {MISTAKE_CODE}"  # as srun says it; its own code is another when it ends the others
_READ_BYTES = 1 << 20  # of the end of srun's lines
_LIMIT_WORDS = (
    "the time limit of the job came before a step was over and saved. "
    "Raise cluster.stop_lead_seconds, or save in less time; the same line continues after the last checkpoint"
)


@dataclass(frozen=True)
class Attempt:
    """One run of a batch script, when srun is over."""

    stage_dir: Path
    job: str
    restart: int
    code: int  # of srun
    words: str  # what srun wrote during this attempt
    log: Path  # where that is
    rows: list[dict[str, Any]]  # of jobs.jsonl

    @property
    def begun(self) -> int | None:
        """Index of the row with which rank 0 began this attempt; None when it never came so far."""
        indices = range(len(self.rows))
        return next((index for index in indices if self.is_mine(self.rows[index])), None)

    def is_mine(self, row: dict[str, Any]) -> bool:
        """Whether a row is the start of this attempt."""
        return row["event"] == "start" and (row["job"], row.get("restart", 0)) == (self.job, self.restart)

    @property
    def stopped(self) -> bool:
        """Rank 0 has noted a stop in this attempt."""
        since = self.rows[self.begun :] if self.begun is not None else []
        return any(row["event"] == "stopped" and row["job"] == self.job for row in since)

    @property
    def taken_over(self) -> bool:
        """Another attempt has begun since: this is the batch shell of a node that Slurm had given up."""
        owner = read_json(self.stage_dir / "log" / HOLDER)
        is_other = owner is not None and (owner["job"], owner["restart"]) != (self.job, self.restart)
        return is_other and self.begun is not None


def settle(attempt: Attempt) -> int:
    """Note how the attempt ended in the stage's folder; the exit code of the job."""
    stage_dir = attempt.stage_dir
    if attempt.taken_over:
        print(f"{stage_dir.name} has another owner by now; nothing is noted.")
        return STOPPED_CODE
    free_room(stage_dir)
    append_event(stage_dir, "end", job=attempt.job, exit_codes=[attempt.code])
    if (stage_dir / DONE).exists():
        return DONE_CODE
    if attempt.stopped:
        return STOPPED_CODE
    failed = _failed_of(attempt)
    if failed is not None and not is_second_hand(str(failed["error"])):
        return _end_failed(attempt)
    cause = cause_in(attempt.words)
    ended = ended_by_slurm(attempt.words)
    if ended == "TIME LIMIT":
        cause = Cause(_LIMIT_WORDS, host=cause.host if cause else "")
    elif ended is not None or (cause is not None and cause.signal and failed is None):
        return _stopped_early(attempt, ended)
    if attempt.begun is None and submit_row(attempt.rows, attempt.job) is None:
        # A job by hand that was not let in: the ranks have said why. The stage may be at work in another job.
        return MISTAKE_CODE if attempt.code == MISTAKE_CODE or _MISTAKE in attempt.words else FAILED_CODE
    if cause is not None:
        _write_failed(attempt, cause)
    elif failed is None:
        tail = [line for line in attempt.words.splitlines() if line.strip()][-_TAIL_LINES:]
        how = f"srun left with exit code {attempt.code}" if attempt.code else "srun left well, but without DONE.json,"
        setup = next((line for line in tail if line.startswith(SETUP_FAILED)), "")
        _write_failed(attempt, Cause("\n".join([setup or f"{how} before a rank could say why", *tail])))
    return _end_failed(attempt)


def _failed_of(attempt: Attempt) -> dict[str, Any] | None:
    """FAILED.json of this attempt, or of the link before it; one of an earlier submission does not count."""
    path = attempt.stage_dir / FAILED
    submitted = submit_row(attempt.rows, attempt.job)
    if attempt.begun is None and submitted is not None and submitted["link"] == 1:
        # No rank has come so far as to remove an older one.
        if not path.exists() or path.stat().st_mtime < submitted["time"]:
            return None
    return read_json(path)


def _write_failed(attempt: Attempt, cause: Cause) -> None:
    log = attempt.stage_dir / "log" / f"rank{cause.rank}.log" if cause.host else attempt.log
    write_json(
        attempt.stage_dir / FAILED,
        {
            "stage": attempt.stage_dir.name,
            "step": newest_metrics(attempt.stage_dir).get("step", 0) if attempt.begun is not None else 0,
            "rank": cause.rank,
            "host": cause.host or socket.gethostname(),
            "error": cause.words,
            "log": str(log if log.is_file() else attempt.log),
        },
    )


def _stopped_early(attempt: Attempt, ended: str | None) -> int:
    """A stop that no rank could note: Slurm ended the job, or its signal came before Python was there."""
    stage_dir = attempt.stage_dir
    step, steps = progress_of(stage_dir)
    if ended is None:
        place = Place(job=attempt.job, executor=SLURM, restart=attempt.restart)
        reason = "a stop signal came before the ranks could listen"
        code, then = after_stop(stage_dir, _config(stage_dir).cluster, place, step=step, steps=steps, reason=reason)
        print(then)
        # The batch shell leaves with 75 in any case: a job that is back in the queue does not ask.
        return code or STOPPED_CODE
    reason = f"Slurm ended the job: {ended.lower() if ended else 'cancelled'}"
    then = "Slurm puts it back where the site allows that" if ended else "the same line continues"
    append_event(stage_dir, "stopped", job=attempt.job, step=step, steps=steps, reason=reason, then=then)
    return STOPPED_CODE


def _end_failed(attempt: Attempt) -> int:
    failed = read_json(attempt.stage_dir / FAILED) or {}
    first_line = str(failed.get("error", "")).split("\n")[0]
    print(f"{attempt.stage_dir.name} failed: rank {failed.get('rank')} on {failed.get('host')}: {first_line}")
    if (attempt.stage_dir / "config.yaml").is_file() and _config(attempt.stage_dir).logging.plots:
        draw_report(attempt.stage_dir.parent)
    return FAILED_CODE


def _config(stage_dir: Path) -> Config:
    return load_config([f"config={stage_dir / 'config.yaml'}"]).config


def words_of_attempt(text: str, job: str, restart: int) -> str:
    """The part of srun's lines that is of this attempt: files are appended to when a job is put back."""
    mark = ATTEMPT.format(job=job, restart=restart)
    before, found, after = text.rpartition(mark)
    if found:
        return after
    # No rank has come so far. Whatever an earlier attempt said ended with the words by which Slurm put it back.
    lines = text.splitlines()
    earlier = [index for index, line in enumerate(lines) if line.startswith(ATTEMPT.split("{")[0])]
    ends = [index for index, line in enumerate(lines) if "*** JOB " in line and "DUE TO" in line]
    return "\n".join(lines[max([*earlier, *ends], default=-1) + 1 :])


def _log_of(stage_dir: Path, job: str) -> Path:
    """The file that srun has written its lines to: our own standard error, or what submitit calls it."""
    here = Path("/proc/self/fd/2")
    if here.exists() and here.is_file():
        return Path(os.readlink(here))
    return stage_dir / "log" / "slurm" / f"{job}_0_log.err"


def attempt_of(words: list[str]) -> Attempt:
    """The attempt that the words of the call name; id and restart of the newest start when they are left out."""
    stage_dir = Path(words[0]).resolve()
    rows = read_jsonl(stage_dir / JOBS)
    job, restart = _job_of(words, rows)
    log = _log_of(stage_dir, job)
    text = ""
    if log.is_file():
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _READ_BYTES))
            text = file.read().decode(errors="replace")
    return Attempt(stage_dir, job, restart, int(words[1]), words_of_attempt(text, job, restart), log, rows)


def _job_of(words: list[str], rows: list[dict[str, Any]]) -> tuple[str, int]:
    if len(words) == 4:
        return words[2], int(words[3])
    from submitit.slurm.slurm import SlurmJobEnvironment

    try:
        job = SlurmJobEnvironment().raw_job_id
    except KeyError:
        job = next((row["job"] for row in reversed(rows) if row["event"] == "start"), "")
    restarts = [row.get("restart", 0) for row in rows if row["event"] == "start" and row["job"] == job]
    return job, max(restarts, default=0)


def main(words: list[str]) -> int:
    """The exit code of the job."""
    if len(words) not in (2, 4) or not words[1].lstrip("-").isdigit():
        print(__doc__)
        return MISTAKE_CODE
    return settle(attempt_of(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
