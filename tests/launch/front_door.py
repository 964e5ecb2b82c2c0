"""Starts the front door over the counting stages as a person would, in a process group of its own, and watches it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 90.0  # importing torch takes many seconds on a machine that does other things


def line(runs_dir: Path, *words: str, program: str = "submit") -> list[str]:
    """The command, with a short run and, unless a word asks for them, without plots."""
    keys = [f"runs_dir={runs_dir}", "name=demo", "s0.warmup_steps=0"]
    if "logging.plots=true" not in words:
        keys.append("logging.plots=false")
    first = [word for word in words if "=" not in word]
    rest = [word for word in words if "=" in word]
    return [sys.executable, "-m", "tests.launch.counting", program, *first, *rest, *keys]


@contextmanager
def front_door(runs_dir: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """The front door at work; every process of it and of its jobs is ended with the block."""
    command = line(runs_dir, *words)
    door = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield door
    finally:
        for pid in [door.pid, *pids_of_jobs(runs_dir)]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        door.wait()
        if door.stdout:
            door.stdout.close()


def finish(door: "subprocess.Popen[str]") -> tuple[int, str]:
    """(exit code, all that it said)."""
    said, _ = door.communicate(timeout=PATIENCE_SECONDS)
    return door.returncode, said


def submit(runs_dir: Path, *words: str) -> tuple[int, str]:
    """Run the front door to its end: (exit code, all that it said)."""
    with front_door(runs_dir, *words) as door:
        return finish(door)


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def steps_done(runs_dir: Path, stage: str) -> int:
    """Rows of metrics.jsonl so far."""
    path = runs_dir / "demo" / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def job_rows(runs_dir: Path, stage: str, event: str = "start") -> list[dict[str, Any]]:
    """Rows of jobs.jsonl of one kind."""
    path = runs_dir / "demo" / stage / "jobs.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["event"] == event]


def pids_of_jobs(runs_dir: Path) -> list[int]:
    """Supervisors and ranks of this runs_dir that are alive; theirs alone, by the folder in their command line."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = any(word.startswith(f"{runs_dir}/") for word in words)
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def rank_pid(runs_dir: Path, rank: int) -> int:
    """Process id of one rank: submitit starts them in order."""
    ranks = [psutil.Process(pid) for pid in pids_of_jobs(runs_dir)]
    ranks = [process for process in ranks if "submitit.core._submit" in process.cmdline()]
    return sorted(ranks, key=lambda process: (process.create_time(), process.pid))[rank].pid
