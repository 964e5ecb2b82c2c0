"""The log of a stage, and with follow=true what is added to it until the stage is over, across requeues."""

import sys
import time
from pathlib import Path

from tdro_hpc.launch.look.progress import FIRST_LOG, LogTail
from tdro_hpc.launch.look.reasons import SeenStage, Stages, reason, unexplained_job
from tdro_hpc.launch.look.status import queue_of, see_run
from tdro_hpc.launch.queue import Queue, ask_queue
from tdro_hpc.launch.record import DONE, FAILED, read_json
from tdro_hpc.launch.slurm.sbatch import slurm_folder

_QUEUE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_SHOWN_BYTES = 8000  # of what the batch script said


def stage_to_read(stages: Stages, run_dir: Path, wanted: str) -> SeenStage:
    """The stage whose log is meant: the wanted one, else what runs, else what ran last, else what is queued.

    raises ValueError when there is no log and none is to come
    """
    if wanted and wanted not in stages:
        raise ValueError(f"{run_dir} has no stage {wanted}; it has {', '.join(stages)}.")
    asked = [stage for stage in stages.values() if wanted in ("", stage.name)]
    written = [stage for stage in asked if _newest_words(stage.folder) is not None]
    running = [stage for stage in written if stage.state.status == "running"]
    if running or written:
        return max(running or written, key=lambda stage: _time_of(stage.folder))
    queued = [stage for stage in asked if stage.state.status in ("queued", "running")]
    if not queued:
        raise ValueError(f"{run_dir} has no log of {wanted or 'any stage'} yet.")
    return queued[0]


def _newest_words(stage_dir: Path) -> Path | None:
    """The newest log that says anything: that of rank 0, or what the batch script of a job left."""
    logs = [stage_dir / "log" / FIRST_LOG, *batch_logs(stage_dir)]
    there = [log for log in logs if log.is_file()]
    return max(there, key=lambda log: log.stat().st_mtime, default=None)


def _time_of(stage_dir: Path) -> float:
    log = _newest_words(stage_dir)
    return log.stat().st_mtime if log else 0.0


def batch_logs(stage_dir: Path) -> list[Path]:
    """Files with words of the batch scripts of a stage, oldest first: of a setup that failed, of srun, of Slurm.

    What they wrote to standard output only counts where there is nothing else.
    """
    for pattern in ("*_log.err", "*_log.out"):
        found = [path for path in slurm_folder(stage_dir).glob(pattern) if path.stat().st_size]
        if found:
            return sorted(found, key=lambda path: (path.stat().st_mtime, path))
    return []


def print_log(run_dir: Path, wanted: str, *, follow: bool) -> None:
    """Print the log of rank 0, and with `follow` what is added until the stage is over.

    Where no rank could say how the job ended, what its batch script said follows.
    """
    queue = queue_of([run_dir])
    stages = see_run(run_dir, queue)
    name = stage_to_read(stages, run_dir, wanted).name
    tail = LogTail(run_dir / name / "log" / FIRST_LOG)
    tail.offset = 0
    asked, said = time.monotonic(), ""
    while True:
        # Looked at first: what a job writes before it ends is read after that.
        stage = stages[name]
        over = stage.state.status not in ("running", "queued", "unknown")
        sys.stdout.write(tail.read())
        if follow and stage.state.status == "queued" and (words := reason(stage, stages, {})) != said:
            print(f"{name}: {words}")
            said = words
        sys.stdout.flush()
        if over or not follow:
            break
        time.sleep(_POLL_SECONDS)
        if queue is not None and time.monotonic() - asked > _QUEUE_SECONDS:
            queue, asked = _asked_again(queue), time.monotonic()
        stages = see_run(run_dir, queue)
    if queue is not None:
        _print_batch_words(stages[name], tail)
        if follow:
            print(f"{name}: {reason(stages[name], stages, {})}")


def _asked_again(before: Queue) -> Queue:
    """The queue as it is now; the one before where Slurm does not answer for a while."""
    now = ask_queue()
    return before if now.problem else now


def _print_batch_words(stage: SeenStage, tail: LogTail) -> None:
    """What the batch script said, where rank 0 said nothing, or where its words do not tell how the job ended."""
    logs = batch_logs(stage.folder)
    failed = read_json(stage.folder / FAILED) or {}
    # A first cause that a rank has told lies in a file of its own.
    is_needed = not tail.offset or unexplained_job(stage) or Path(failed.get("log", "")).parent.name == "slurm"
    if logs and is_needed and not (stage.folder / DONE).exists():
        text = logs[-1].read_text(encoding="utf-8", errors="replace")
        print(f"--- {logs[-1]}\n{text[-_SHOWN_BYTES:].rstrip()}")
