"""What the rows of jobs.jsonl and squeue together tell of the Slurm jobs of one stage. Plain data in and out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.launch.queue import Queue, QueueJob

Rows = Sequence[dict[str, Any]]
_ENDS = ("DONE.json", "FAILED.json")  # written in record.py, which reads rows through this file


@dataclass(frozen=True)
class SlurmWork:
    """The newest submission of a stage, and which of its jobs Slurm still has."""

    jobs: tuple[str, ...] = ()  # its ids in the order of its links; empty = a local job came after it, or there is none
    submits: tuple[dict[str, Any], ...] = ()  # the rows of those that the front door submitted
    starts: tuple[dict[str, Any], ...] = ()  # a row for each start of one of them
    last: dict[str, Any] | None = None  # newest row of a start, stop, end or cancellation of one of them
    begun: bool = False  # one of them has left a sign of life
    cancelled: str = ""  # reason, when all of them were cancelled
    alive: tuple[QueueJob, ...] = ()  # in the queue, in the order of the links
    dead: tuple[QueueJob, ...] = ()  # in the queue, but they will never do anything

    @property
    def current(self) -> QueueJob | None:
        """The job that runs, or else the one that is to run next."""
        return next((job for job in self.alive if not job.waits), self.alive[0] if self.alive else None)

    @property
    def has_more(self) -> bool:
        """Whether links were submitted that have not begun yet."""
        return not set(self.jobs) <= {row["job"] for row in self.starts}

    @property
    def restarts(self) -> int:
        """Times that it has gone on after a stop: Slurm counts those of one job, each link is one more."""
        counted = max((row.get("restart", 0) for row in self.starts), default=0)
        return max(counted, len(self.starts) - 1)


def is_slurm(row: dict[str, Any]) -> bool:
    """Whether a row of a submission or of a start is about a Slurm job; those of earlier versions are not."""
    return row.get("executor", "local") == "slurm"


def slurm_work(stage_dir: Path, rows: Rows, queue: Queue | None) -> SlurmWork:
    """The newest submission of the stage. queue = None: nothing is known to be in the queue."""
    submits = _newest_submission(rows)
    begun_by = next((row for row in reversed(rows) if row["event"] in ("submit", "start")), None)
    if begun_by is None or not is_slurm(begun_by):
        jobs: tuple[str, ...] = ()
        submits = ()
    elif begun_by["job"] in [row["job"] for row in submits]:
        jobs = tuple(row["job"] for row in submits)
    else:
        # Submitted by hand: it is noted when it starts.
        jobs, submits = (begun_by["job"],), ()
    signs = [row for row in rows if row["event"] != "submit" and row.get("job") in jobs]
    reasons = {row["job"]: row["reason"] for row in signs if row["event"] == "cancelled"}
    begun = any(row["event"] in ("start", "stopped", "end") for row in signs)
    alive, dead = _in_queue(stage_dir, jobs, queue, begun=any(row["event"] == "start" for row in signs))
    return SlurmWork(
        jobs=jobs,
        submits=submits,
        starts=tuple(row for row in signs if row["event"] == "start"),
        last=signs[-1] if signs else None,
        begun=begun,
        cancelled=reasons[jobs[-1]] if jobs and set(reasons) == set(jobs) else "",
        alive=alive,
        dead=dead,
    )


def _newest_submission(rows: Rows) -> tuple[dict[str, Any], ...]:
    """Submit rows of the newest submission: its links are noted one after the other, from 1."""
    links: list[dict[str, Any]] = []
    for row in reversed([row for row in rows if row["event"] == "submit"]):
        if links and (row["links"] != links[0]["links"] or row["link"] != links[0]["link"] - 1):
            break
        links.insert(0, row)
    return tuple(links)


def _in_queue(
    stage_dir: Path, jobs: Sequence[str], queue: Queue | None, *, begun: bool
) -> tuple[tuple[QueueJob, ...], tuple[QueueJob, ...]]:
    """(jobs of the stage in the queue that count, those that will never do anything)."""
    if queue is None:
        return (), ()
    found = queue.jobs_of(stage_dir, jobs)
    # A link whose stage is done or has failed leaves at once when its turn comes, which may be hours away.
    over = begun and len(jobs) > 1 and any((stage_dir / name).exists() for name in _ENDS)
    alive = tuple(job for job in found if not queue.never_starts(job) and not (over and job.waits))
    return alive, tuple(job for job in found if job not in alive)


def row_in_queue(stage_dir: Path, rows: Rows, queue: Queue | None) -> dict[str, Any] | None:
    """The newest row of the Slurm job that works on a stage or waits to do so; None when there is none.

    A job that the front door could not note gets a row as if it had.
    """
    current = slurm_work(stage_dir, rows, queue).current
    if current is None:
        return None
    of_job = [row for row in rows if row["event"] in ("submit", "start") and row["job"] == current.job]
    unnoted = {
        "event": "submit",
        "job": current.job,
        "executor": "slurm",
        "keys": {},
        "fresh": False,
        "after": [],
        "link": 1,
        "links": 1,
        "max_restarts": 0,
        "code": "",
    }
    return of_job[-1] if of_job else unnoted


def status_by_rows(work: SlurmWork) -> str:
    """Status of a stage where nobody can ask Slurm: on the nodes, in the report. Neither done nor failed is meant."""
    if work.last is None:
        return "queued"
    if work.last["event"] == "start":
        return "running"
    if work.cancelled or not work.begun:
        return "stopped" if work.begun else "new"
    return "queued" if work.has_more else "stopped"


def lost_words(stage_dir: Path, work: SlurmWork) -> str:
    """Why a submission came to nothing before it began, in words; empty when it began. The queue has answered."""
    if work.dead and not work.begun:
        return f"job {work.dead[0].job} could never start: what it waited for has failed"
    if work.begun or not work.jobs:
        return ""
    if work.cancelled:
        return f"job {work.jobs[0]} was cancelled before it began: {work.cancelled}"
    # Not even our Python ran, or what is told here would stand in FAILED.json.
    log = stage_dir / "log" / "slurm" / f"{work.jobs[0]}_0_log.err"
    said = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return f"job {work.jobs[0]} left the queue before it began" + (f"; it said: {last} (log {log})" if last else "")
