"""A run directory in, words about it out: status table, logs, cancel. Reads the run's own files and nothing else."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdro_hpc.launch.executor import ask_to_stop, wait_until_over
from tdro_hpc.launch.jobs import last_row, newest_metrics, read_jsonl, running_job
from tdro_hpc.launch.printout import columns, short_duration
from tdro_hpc.launch.progress import FIRST_LOG, LogTail
from tdro_hpc.launch.record import StageState, read_json, read_state

_CANCEL_SECONDS = 120.0
_HEADER = ["stage", "state", "attempt", "step", "loss", "eta", "reason"]


def runs_in(runs_dir: Path) -> list[Path]:
    """Run directories, oldest plan first."""
    plans = [path for path in runs_dir.glob("*/plan.json")]
    return [path.parent for path in sorted(plans, key=lambda path: (path.stat().st_mtime, path))]


def planned_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of plan.json: name, kind, needs, action.

    raises ValueError when there is no such run
    """
    plan = read_json(run_dir / "plan.json")
    if plan is None:
        others = ", ".join(path.name for path in runs_in(run_dir.parent)) or "none yet"
        raise ValueError(f"There is no run {run_dir}. Runs in {run_dir.parent}: {others}. Type name=<one of them>.")
    return list(plan["stages"])


def status_text(run_dir: Path) -> str:
    """Table of the stages of one run that were planned or have been begun."""
    rows = planned_stages(run_dir)
    states = {row["name"]: read_state(run_dir / row["name"]) for row in rows}
    shown = [row for row in rows if row["action"] or states[row["name"]].status != "new"]
    cells = [_row(run_dir / row["name"], row["needs"], states) for row in shown]
    return f"run {run_dir}\n{columns([_HEADER, *cells])}"


def _row(stage_dir: Path, needs: list[str], states: Mapping[str, StageState]) -> list[str]:
    state = states[stage_dir.name]
    newest = newest_metrics(stage_dir)
    step = f"{newest['step']}/{newest['steps']}" if newest.get("steps") else "-"
    loss = f"{newest['loss']:.4f}" if "loss" in newest else "-"
    words = "to be made again" if state.status == "stale" else "waiting" if state.status == "new" else state.status
    return [
        stage_dir.name,
        words,
        str(state.attempt or "-"),
        step,
        loss,
        _eta(newest) if state.status == "running" else "-",
        _reason(stage_dir, state, needs, states),
    ]


def _eta(newest: Mapping[str, Any]) -> str:
    clock = newest.get("clock", {})
    if clock.get("eta_seconds") is None:
        return "-"
    return short_duration(max(0.0, clock["eta_seconds"] - (time.time() - clock["time"])))


def _reason(stage_dir: Path, state: StageState, needs: list[str], states: Mapping[str, StageState]) -> str:
    if state.status == "done":
        return f"took {short_duration(state.seconds)}, code {state.code}"
    if state.status == "running":
        return f"job {state.job}, pid {state.pid} on {state.host}"
    if state.status in ("failed", "stale"):
        return state.problem
    waiting = [need for need in needs if states[need].status != "done"]
    if state.status == "stopped":
        stopped = last_row(read_jsonl(stage_dir / "jobs.jsonl"), "stopped")
        why = stopped["reason"] if stopped and stopped["job"] == state.job else "interrupted"
        return f"{why}; the same line continues after step {state.step}"
    return f"waiting for {', '.join(waiting)}" if waiting else "not started yet"


def running_stages(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """(stage, start row of its job) of everything that runs in this run directory."""
    found = [(row["name"], running_job(run_dir / row["name"])) for row in planned_stages(run_dir)]
    return [(name, row) for name, row in found if row is not None]


def cancel(run_dir: Path) -> str:
    """Ask the jobs of a run to save and leave, wait for that, and say how it went."""
    running = running_stages(run_dir)
    if not running:
        return f"Nothing of {run_dir} is running."
    lines = []
    for name, row in running:
        ask_to_stop(row)
        print(f"{name}: asked job {row['job']} (pid {row['pid']}) to save and leave", flush=True)
        over = wait_until_over(run_dir / name, seconds=_CANCEL_SECONDS)
        lines.append("" if over else f"{name} is still busy after {_CANCEL_SECONDS:.0f} s; it leaves after this step.")
    return "\n".join([*filter(None, lines), status_text(run_dir)])


def stage_to_read(run_dir: Path, wanted: str) -> str:
    """Name of the stage whose log is meant: the wanted one, else what runs, else what ran last.

    raises ValueError when there is no log
    """
    names = [row["name"] for row in planned_stages(run_dir)]
    logs = {name: run_dir / name / "log" / FIRST_LOG for name in names}
    if wanted and wanted not in logs:
        raise ValueError(f"{run_dir} has no stage {wanted}; it has {', '.join(names)}.")
    written = [name for name in names if logs[name].exists() and wanted in ("", name)]
    if not written:
        raise ValueError(f"{run_dir} has no log of {wanted or 'any stage'} yet.")
    return max(written, key=lambda name: logs[name].stat().st_mtime)


def print_log(run_dir: Path, wanted: str, *, follow: bool) -> None:
    """Print the log of rank 0, and with `follow` what is added until the job is over."""
    stage_dir = run_dir / stage_to_read(run_dir, wanted)
    tail = LogTail(stage_dir / "log" / FIRST_LOG)
    tail.offset = 0
    while True:
        # Looked at first: what a job writes before it ends is read after that.
        over = running_job(stage_dir) is None
        sys.stdout.write(tail.read())
        sys.stdout.flush()
        if over or not follow:
            return
        time.sleep(0.2)
