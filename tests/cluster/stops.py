"""For tests that stop a job in the middle: a rank held at a step while Slurm acts, and what a stage has made."""

import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.user import User


@contextmanager
def held(user: User, run: str, stage: str, *, step: int) -> Iterator[psutil.Process]:
    """Rank 0 does not go on after a step: however fast this machine is, the job is in the middle of its work.

    The other ranks wait for it in their next collective. A job that Slurm ends is woken up by its SIGCONT.
    """
    user.wait(lambda: user.steps(run, stage) >= step)
    rank = psutil.Process(user.rows(run, stage, "start")[-1]["pid"])
    rank.suspend()
    try:
        yield rank
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def has_come(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that is held."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    pending = next(line.split()[1] for line in lines if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (number - 1) & 1)


def was_reached(process: psutil.Process, numbers: Iterable[signal.Signals]) -> bool:
    """Whether Slurm has woken up a process that is held, or one of the signals waits for it, or it is gone."""
    try:
        return process.status() != psutil.STATUS_STOPPED or any(has_come(process, number) for number in numbers)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True


def send(user: User, run: str, stage: str, number: signal.Signals, *, step: int) -> str:
    """`scancel --signal` while rank 0 is held after a step; the id of the job."""
    job = str(user.rows(run, stage, "submit")[-1]["job"])
    with held(user, run, stage, step=step) as rank:
        job = str(user.rows(run, stage, "start")[-1]["job"])
        user.cluster.run("scancel", f"--signal={number.name.removeprefix('SIG')}", job)
        user.wait(lambda: has_come(rank, number), seconds=30)
    return job


def results(stage_dir: Path) -> dict[str, Any]:
    """All that a training stage leaves: bytes of the weights and the last state, rows without their clock."""
    files = [*stage_dir.glob("out/model/*.safetensors"), *stage_dir.glob("out/weights/*")]
    last = sorted(stage_dir.glob("checkpoints/step-*/state.json"))[-1].parent
    files += sorted(last.glob("state-*.safetensors"))
    assert files[-1].parent == last, f"no tensors in {last}"
    found: dict[str, Any] = {str(file.relative_to(stage_dir)): file.read_bytes() for file in files}
    for name in ("metrics.jsonl", "trajectory.jsonl"):
        path = stage_dir / name
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found[name] = [{key: value for key, value in row.items() if key != "clock"} for row in rows]
    return found
