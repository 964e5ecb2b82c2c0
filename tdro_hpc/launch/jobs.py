"""Jobs of one stage: rows of jobs.jsonl, which of them is alive, and the lock that keeps a second copy away.

{"event": "submit", "job", "executor": "slurm", "keys", "fresh", "after", "link", "links", "max_restarts", "code"}
{"event": "start", "job", "executor", "pid", "started", "host", "attempt", "restart", "ranks", "keys", "inputs",
 "fresh"}
{"event": "stopped", "job", "step", "steps", "reason", "then"}
{"event": "end", "job", "exit_codes"}
{"event": "cancelled", "job", "reason"}

Each has a "time" besides. The front door writes `submit`, `cancelled` and the `start` of a local job, rank 0 writes
`stopped` and the `start` of a Slurm job, what supervises the ranks writes `end`.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tdro_hpc.launch.queue import Queue
from tdro_hpc.launch.slurm_rows import is_slurm, row_in_queue

logger = logging.getLogger(__name__)

JOBS = "jobs.jsonl"
HEARTBEAT = "alive"  # log/alive: touched by the supervisor of a local job
HEARTBEAT_SECONDS = 10.0
_SILENT_SECONDS = 120.0  # a job on another machine that has been silent for longer is over
_TAIL_BYTES = 1 << 16  # a row of metrics with the weights of many tasks has a few thousand
_CLOCK_SLACK_SECONDS = 2.0  # the start time of a process is derived from the boot time, which may be adjusted


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; [] when it is missing. A last line that is being written is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.strip()]


def newest_metrics(stage_dir: Path) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, from the end of the file; {} when there is none."""
    lines = tail_of(stage_dir / "metrics.jsonl").split("\n")[1:-1]
    return json.loads(lines[-1]) if lines else {}


def tail_of(path: Path) -> str:
    """The end of a text file, after a line end that stands before it; empty when it is missing."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return "\n" + file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def append_event(stage_dir: Path, event: str, **values: Any) -> None:
    """Add a row to jobs.jsonl in one write."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    row = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
    with open(stage_dir / JOBS, "ab", buffering=0) as file:
        file.write(row.encode())
        os.fsync(file.fileno())


def append_start(
    stage_dir: Path,
    *,
    job: str,
    pid: int,
    ranks: int,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    fresh: bool,
    restart: int = 0,
    executor: str = "local",
) -> None:
    """Note a job that has just been started on this machine.

    fresh    it does not continue an earlier one
    restart  times that Slurm has put this very job back before
    """
    append_event(
        stage_dir,
        "start",
        job=job,
        executor=executor,
        pid=pid,
        started=started_at(pid),
        host=socket.gethostname(),
        attempt=next_attempt(stage_dir),
        restart=restart,
        ranks=ranks,
        keys=dict(keys),
        inputs=dict(inputs),
        fresh=fresh,
    )


def append_submit(
    stage_dir: Path,
    *,
    job: str,
    keys: Mapping[str, Any],
    fresh: bool,
    after: Sequence[str],
    link: int,
    links: int,
    max_restarts: int,
    code: str,
) -> None:
    """Note a job that sbatch has just taken.

    after   ids of the jobs that it waits for
    link    its place from 1 among the `links` jobs in a row that the stage got
    code    absolute path of the copy of the code that it runs from; empty = the code as it is then
    """
    append_event(
        stage_dir,
        "submit",
        job=job,
        executor="slurm",
        keys=dict(keys),
        fresh=fresh,
        after=list(after),
        link=link,
        links=links,
        max_restarts=max_restarts,
        code=code,
    )


def next_attempt(stage_dir: Path) -> int:
    """Number of the attempt that comes next, from 1."""
    return 1 + len([row for row in read_jsonl(stage_dir / JOBS) if row["event"] == "start"])


def last_row(rows: list[dict[str, Any]], event: str) -> dict[str, Any] | None:
    """The newest row of a kind."""
    return next((row for row in reversed(rows) if row["event"] == event), None)


def rows_of_this_making(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows since the stage was last begun anew."""
    begun = max((index for index, row in enumerate(rows) if row["event"] == "start" and row["fresh"]), default=0)
    return rows[begun:]


def seconds_spent(rows: list[dict[str, Any]]) -> float:
    """Wall time of the attempts that have ended: from each start to the last row by which that attempt has ended.

    A job that Slurm puts back has several starts under one id. An attempt that was killed before it could leave a row
    counts as nothing, and so does the one that is running.
    """
    began: dict[str, float] = {}
    spent: dict[tuple[str, float], float] = {}
    for row in rows:
        job = row.get("job", "")
        if row["event"] == "start":
            began[job] = row["time"]
        elif row["event"] in ("stopped", "end") and job in began:
            spent[job, began[job]] = row["time"] - began[job]
    return sum(spent.values())


def has_slurm_rows(stage_dir: Path) -> bool:
    """Whether Slurm may have a job of this stage: only then squeue has to be asked."""
    return any(is_slurm(row) for row in read_jsonl(stage_dir / JOBS))


def running_job(stage_dir: Path, queue: Queue | None = None) -> dict[str, Any] | None:
    """The row of the job that works on this stage now or waits in Slurm's queue to do so; None when there is none.

    queue   None = only jobs on this machine and on others without Slurm are known
    returns its start row, or its submit row before it has begun; a row of executor slurm has no pid that means
            anything on this machine
    """
    rows = read_jsonl(stage_dir / JOBS)
    return local_job(stage_dir, rows) or row_in_queue(stage_dir, rows, queue)


def local_job(stage_dir: Path, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The start row of the local job that works on this stage now; None when there is none, or Slurm has it."""
    start = last_row(rows, "start")
    if start is None or is_slurm(start) or any(row["event"] == "end" and row["job"] == start["job"] for row in rows):
        return None
    if start["host"] == socket.gethostname():
        return start if is_alive(start["pid"], start["started"]) else None
    heartbeat = stage_dir / "log" / HEARTBEAT
    silent = time.time() - max(start["time"], heartbeat.stat().st_mtime if heartbeat.exists() else 0.0)
    return start if silent < _SILENT_SECONDS else None


def started_at(pid: int) -> float:
    """Start time of a process (s since 1970); 0 when it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def is_alive(pid: int, started: float) -> bool:
    """Whether this very process runs: process ids are used again, therefore its start time has to fit."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - started) < _CLOCK_SLACK_SECONDS
    except psutil.NoSuchProcess:
        return False


def end_group(leader: int) -> None:
    """End every process of a process group but its leader."""
    for process in psutil.process_iter():
        try:
            if process.pid != leader and os.getpgid(process.pid) == leader:
                process.kill()
        except (OSError, psutil.Error):
            pass  # it ended by itself, or is none of ours


def end_orphans(stage_dir: Path) -> None:
    """End what the newest job has left behind if its supervisor was killed: it could not do so itself."""
    start = last_row(read_jsonl(stage_dir / JOBS), "start")
    # A supervisor leads a group of its own, whose number stays taken as long as one process is in it. A process with
    # that number now is another one, and so is its group.
    if start is None or is_slurm(start):
        return
    is_ours = start["job"] == str(start["pid"]) and start["host"] == socket.gethostname()
    if is_ours and not psutil.pid_exists(start["pid"]):
        end_group(start["pid"])


@contextmanager
def stage_lock(stage_dir: Path) -> Iterator[None]:
    """Hold the stage while looking whether it runs and starting it. A killed process lets go of it."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    with open(stage_dir / JOBS, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some cluster file systems are mounted without locks. The list of jobs alone still tells what runs.
            logger.warning(
                "%s cannot be locked (%s): do not start the same run twice at the same moment", file.name, error
            )
        yield
