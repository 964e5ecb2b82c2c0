"""Starts the job of one stage through submitit, says which lines would do the same, and asks a job to stop."""

import hashlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdro_hpc.launch.commands import start_detached
from tdro_hpc.launch.jobs import append_start, is_alive, next_attempt, running_job

if TYPE_CHECKING:
    from submitit import LocalExecutor

# (stage folder, kind) -> what a rank calls; it is pickled, therefore it carries nothing but these two.
JobOf = Callable[[Path, str], Callable[[], str]]
# Exit code 3 = stopped and saved. A rank that failed is waited for in vain by the others.
_WAIT_FOR_RANKS = """\
trap 'kill -TERM "${ranks[@]}" 2>/dev/null || true' TERM INT USR2
status=0
while [ "${#ranks[@]}" -gt 0 ]; do
  sleep 0.5
  left=()
  for rank in "${ranks[@]}"; do
    if kill -0 "$rank" 2>/dev/null; then left+=("$rank"); continue; fi
    code=0
    wait "$rank" || code=$?
    if [ "$status" -eq 0 ]; then status=$code; fi
    if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then kill -KILL "${ranks[@]}" 2>/dev/null || true; fi
  done
  ranks=(${left[@]+"${left[@]}"})
done
exit "$status\""""
_NO_LIMIT_MINUTES = 60 * 24 * 365


def job_script(stage_dir: Path, *, ranks: int, threads: int) -> str:
    """Lines for a shell that run the stage as its job does, without submitit; the plan has to be on disk.

    threads  CPU threads of one rank; 0 = decided on the machine: its cores divided by its ranks
    """
    lines = ["#!/bin/bash", "set -eu", f"cd {shlex.quote(os.getcwd())}", "export PYTHONUNBUFFERED=1"]
    if threads:
        lines.append(f"export OMP_NUM_THREADS={threads}")
    run = f"{shlex.quote(sys.executable)} -m tdro_hpc.run {shlex.quote(str(stage_dir))}"
    if ranks == 1:
        return "\n".join([*lines, f"exec {run}"])
    lines += [
        f"export WORLD_SIZE={ranks} MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 10000))",
        "ranks=()",
        f"for rank in $(seq 0 {ranks - 1}); do",
        f"  RANK=$rank LOCAL_RANK=$rank {run} &",
        "  ranks+=($!)",
        "done",
    ]
    return "\n".join([*lines, _WAIT_FOR_RANKS])


def rendezvous_file(pickle: Path) -> Path:
    """Where the ranks of a job on one machine find each other; `pickle` is what submitit pickled for it.

    Not in the run directory, whose file system may have no locks. Unique: process ids and paths come again.
    """
    unique = hashlib.sha256(f"{pickle} {pickle.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"tdro-hpc-{unique}")


def submit_stage(
    stage_dir: Path,
    kind: str,
    *,
    ranks: int,
    job_of: JobOf,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    fresh: bool,
) -> Any:
    """Start the ranks of a stage on this machine and note them in jobs.jsonl; returns submitit's job.

    The caller holds `stage_lock`. stage_dir is absolute; config.yaml is in it.
    """
    folder = stage_dir / "log" / f"attempt-{next_attempt(stage_dir)}"
    # The folder of an attempt that was killed before it was noted: its files must not be taken for ours.
    while folder.exists():
        folder = folder.with_name(f"{folder.name}a")
    executor = _local_executor(folder)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=_NO_LIMIT_MINUTES)
    job = executor.submit(job_of(stage_dir, kind))
    append_start(stage_dir, job=job.job_id, pid=int(job.job_id), ranks=ranks, keys=keys, inputs=inputs, fresh=fresh)
    return job


def _local_executor(folder: Path) -> "LocalExecutor":
    # submitit takes a sixth of a second to import: only where a job is really started.
    from submitit import LocalExecutor
    from submitit.local.local import LocalJob

    class DetachedExecutor(LocalExecutor):
        """submitit's local executor, with our supervisor in the place of its controller."""

        def _submit_command(self, command: str) -> LocalJob[Any]:
            num_ranks = self.parameters["tasks_per_node"]
            environment = {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_NTASKS": str(num_ranks),
                "SUBMITIT_LOCAL_COMMAND": command,
                "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
                "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_STDERR_TO_STDOUT": "",
                "SUBMITIT_LOCAL_WITH_SHELL": "",
                "PYTHONUNBUFFERED": "1",
            }
            supervisor = [sys.executable, "-m", "tdro_hpc.launch.local.supervisor", str(self.folder)]
            process = start_detached(supervisor, environment=environment, log=self.folder / "supervisor.log")
            return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(num_ranks)))

    return DetachedExecutor(folder)


def ask_to_stop(row: Mapping[str, Any]) -> bool:
    """Ask the job of a start row to save and leave; False when it is over already.

    raises ValueError when it runs on another machine
    """
    if row["host"] != socket.gethostname():
        raise ValueError(f"Job {row['job']} was started on {row['host']}; type the same line there.")
    if not is_alive(row["pid"], row["started"]):
        return False
    os.kill(row["pid"], signal.SIGTERM)
    return True


def wait_until_over(stage_dir: Path, *, seconds: float) -> bool:
    """Whether no job works on the stage any more, after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while running_job(stage_dir) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
