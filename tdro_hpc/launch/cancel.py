"""Takes the jobs of a run back: what waits, from the end of the chain, then what runs, which saves before it leaves."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdro_hpc.config.load import load_config
from tdro_hpc.launch.job.requeue import cancel_mark
from tdro_hpc.launch.jobs import JOBS, append_event, read_jsonl
from tdro_hpc.launch.local.executor import ask_to_stop, wait_until_over
from tdro_hpc.launch.look.status import planned_stages, queue_of, running_stages, status_text
from tdro_hpc.launch.queue import Queue, QueueJob, ask_queue
from tdro_hpc.launch.slurm.executor import cancel_jobs
from tdro_hpc.launch.slurm_rows import slurm_work

_LOCAL_SECONDS = 120.0
_POLL_SECONDS = 2.0
_KILL_SECONDS = 60.0  # Slurm ends a cancelled job within its KillWait, 30 s by default


@dataclass(frozen=True)
class Held:
    """A job that Slurm has of a stage."""

    folder: Path  # of the stage
    job: QueueJob


def slurm_jobs(stage_dir: Path, queue: Queue) -> tuple[QueueJob, ...]:
    """Jobs of the newest submission of a stage that Slurm has, and of ones that were never noted; links in order."""
    work = slurm_work(stage_dir, read_jsonl(stage_dir / JOBS), queue)
    return tuple(dict.fromkeys((*work.alive, *work.dead)))


def cancel_order(stages: Mapping[Path, Sequence[QueueJob]]) -> tuple[list[Held], list[Held]]:
    """(jobs that wait, from the end of the chain; jobs that run), so that no job starts because another is cancelled.

    stages  jobs of each stage in the order of its links, stages in the order of the chain
    """
    held = [Held(folder, job) for folder, jobs in stages.items() for job in jobs]
    return [entry for entry in reversed(held) if entry.job.waits], [entry for entry in held if not entry.job.waits]


def cancel(run_dir: Path) -> str:
    """Ask the jobs of a run to save and leave, wait for that, and say how it went.

    raises ValueError when Slurm does not answer: then nothing has been changed
    """
    queue = queue_of([run_dir])
    if queue is not None and queue.problem:
        raise ValueError(
            f"Slurm does not say which jobs there are: {queue.problem}. Nothing was cancelled; type it again later."
        )
    local = running_stages(run_dir)
    folders = [run_dir / row["name"] for row in planned_stages(run_dir)]
    waiting, running = cancel_order({folder: slurm_jobs(folder, queue) for folder in folders} if queue else {})
    if not local and not waiting and not running:
        return f"Nothing of {run_dir} is running."
    lines = _cancel_slurm(waiting, running)
    for name, row in local:
        ask_to_stop(row)
        print(f"{name}: asked job {row['job']} (pid {row['pid']}) to save and leave", flush=True)
        if not wait_until_over(run_dir / name, seconds=_LOCAL_SECONDS):
            lines.append(f"{name} is still busy after {_LOCAL_SECONDS:.0f} s; it leaves after this step.")
    return "\n".join([*lines, status_text([run_dir])])


def _cancel_slurm(waiting: Sequence[Held], running: Sequence[Held]) -> list[str]:
    """Words about what did not go as it should."""
    words = []
    # The marks first: a rank that is told to stop and does not find its mark puts its job back into the queue.
    for entry in (*waiting, *running):
        mark_cancelled(entry.folder, entry.job.job)
    if waiting:
        answer = cancel_jobs([entry.job.job for entry in waiting])
        if answer.code:
            words.append(f"scancel: {answer.err.strip() or answer.out.strip()}")
        for entry in waiting:
            append_event(entry.folder, "cancelled", job=entry.job.job, reason="cancelled by submit cancel")
            print(f"{entry.folder.name}: took job {entry.job.job} out of the queue", flush=True)
    for entry in running:
        answer = cancel_jobs([entry.job.job], signal="USR2")
        append_event(entry.folder, "cancelled", job=entry.job.job, reason="cancelled by submit cancel")
        print(f"{entry.folder.name}: asked job {entry.job.job} to save and leave", flush=True)
        if answer.code:
            words.append(f"scancel: {answer.err.strip() or answer.out.strip()}")
    if running:
        words += _wait_and_end(running)
    return words


def mark_cancelled(stage_dir: Path, job: str) -> None:
    """Leave the word that this job is not to be put back into the queue."""
    path = cancel_mark(stage_dir, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _wait_and_end(running: Sequence[Held]) -> list[str]:
    """Wait until jobs have left the queue, end those that take too long, and say which are still there."""
    seconds = max(60.0, *(_lead_seconds(entry.folder) for entry in running))
    left = _still_there(running, seconds)
    if not left:
        return []
    print(f"job {_ids(left)} did not leave within {seconds:.0f} s and is ended; what it saved last counts", flush=True)
    cancel_jobs([entry.job.job for entry in left])
    left = _still_there(left, _KILL_SECONDS)
    return [f"Slurm still lists job {_ids(left)}. Look again with squeue."] if left else []


def _still_there(entries: Sequence[Held], seconds: float) -> list[Held]:
    """Those whose jobs are in the queue after at most `seconds`."""
    deadline = time.monotonic() + seconds
    left = list(entries)
    while True:
        queue = ask_queue()
        # A controller that is busy for a moment says nothing about the jobs.
        if not queue.problem:
            left = [entry for entry in left if entry.job.job in queue.jobs]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)


def _ids(entries: Sequence[Held]) -> str:
    return ", ".join(entry.job.job for entry in entries)


def _lead_seconds(stage_dir: Path) -> float:
    """Time that the job of a stage was promised for its last save."""
    config = load_config([f"config={stage_dir / 'config.yaml'}"]).config
    return float(config.cluster.stop_lead_seconds)
