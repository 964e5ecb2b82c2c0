"""Run directories in, words about them out. Own files first, then one squeue for all runs, then one sacct if needed."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdro_hpc.launch.jobs import JOBS, newest_metrics, read_jsonl, running_job
from tdro_hpc.launch.look.printout import columns, short_duration
from tdro_hpc.launch.look.reasons import SeenStage, Stages, begun_rows, reason, state_word, unexplained_job
from tdro_hpc.launch.queue import Queue, ask_accounting, ask_queue
from tdro_hpc.launch.record import read_json, read_state

_HEADER = ["stage", "state", "job", "attempt", "step", "loss", "eta", "reason"]
_SLURM_MARK = b'"executor": "slurm"'
_AT_WORK = ("running", "queued", "unknown")


def runs_in(runs_dir: Path) -> list[Path]:
    """Run directories, oldest plan first."""
    plans = [path for path in runs_dir.glob("*/plan.json")]
    return [path.parent for path in sorted(plans, key=lambda path: (path.stat().st_mtime, path))]


def planned_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of plan.json: name, kind, needs, action.

    raises ValueError when there is no such run
    """
    return list(_plan_of(run_dir)["stages"])


def _plan_of(run_dir: Path) -> dict[str, Any]:
    plan = read_json(run_dir / "plan.json")
    if plan is None:
        others = ", ".join(path.name for path in runs_in(run_dir.parent)) or "none yet"
        raise ValueError(f"There is no run {run_dir}. Runs in {run_dir.parent}: {others}. Type name=<one of them>.")
    return plan


def has_slurm_jobs(run_dir: Path) -> bool:
    """Whether any stage of the run was ever a job of Slurm."""
    return any(_SLURM_MARK in path.read_bytes() for path in run_dir.glob(f"*/{JOBS}"))


def queue_of(run_dirs: Sequence[Path]) -> Queue | None:
    """What Slurm has queued now, by one squeue for all runs; None, without asking, when they never met Slurm."""
    return ask_queue() if any(has_slurm_jobs(run_dir) for run_dir in run_dirs) else None


def see_run(run_dir: Path, queue: Queue | None) -> dict[str, SeenStage]:
    """All that is known of every stage that the newest plan of a run names, by name."""
    seen = {}
    for row in planned_stages(run_dir):
        folder = run_dir / row["name"]
        seen[row["name"]] = SeenStage(
            folder=folder,
            needs=tuple(row["needs"]),
            state=read_state(folder, queue=queue),
            rows=tuple(read_jsonl(folder / JOBS)),
            metrics=newest_metrics(folder),
            planned=bool(row["action"]),
        )
    return seen


def at_work(stages: Stages) -> bool:
    """Whether anything of a run runs or waits in a queue."""
    return any(stage.state.status in _AT_WORK for stage in stages.values())


def status_text(run_dirs: Sequence[Path], queue: Queue | None = None) -> str:
    """A table for each run: the stages that were planned or have been begun, and what to type where one is stuck.

    queue   None = ask Slurm, once, if any of the runs has jobs there
    """
    queue = queue_of(run_dirs) if queue is None else queue
    return tables_text({run_dir: see_run(run_dir, queue) for run_dir in run_dirs}, queue)


def tables_text(runs: Mapping[Path, Stages], queue: Queue | None) -> str:
    """The tables of runs that have been looked at."""
    lost = [unexplained_job(stage) for stages in runs.values() for stage in stages.values()]
    ids = [job for job in lost if job]
    # A queue that could not be asked explains nothing: what it does not list may well be there.
    accounting = ask_accounting(ids) if ids and not (queue and queue.problem) else {}
    tables = [_table(run_dir, stages, accounting) for run_dir, stages in runs.items()]
    if queue is not None and queue.problem:
        tables.append(f"What waits or runs on the cluster is not known: {queue.problem}")
    return "\n\n".join(tables)


def _table(run_dir: Path, stages: Stages, accounting: Mapping[str, str]) -> str:
    shown = [stage for stage in stages.values() if stage.planned or stage.state.status != "new"]
    cells = [_row(stage, stages, accounting) for stage in shown]
    text = f"run {run_dir}\n{columns([_HEADER, *cells])}"
    words = {row[1] for row in cells}
    if words & {"failed", "dead"} or ("stopped" in words and not at_work(stages)):
        text += f"\nTo continue type: {_plan_of(run_dir)['line']}"
    return text


def _row(stage: SeenStage, stages: Stages, accounting: Mapping[str, str]) -> list[str]:
    state, newest = stage.state, stage.metrics
    return [
        stage.name,
        state_word(stage, stages),
        state.job or "-",
        _attempt(stage),
        f"{newest['step']}/{newest['steps']}" if newest.get("steps") else "-",
        f"{newest['loss']:.4f}" if "loss" in newest else "-",
        _eta(newest) if state.status == "running" else "-",
        reason(stage, stages, accounting),
    ]


def _attempt(stage: SeenStage) -> str:
    """2/21 for the second of at most 21 attempts of a job of Slurm, which come by themselves; 3 for the third here."""
    state = stage.state
    if state.executor == "slurm":
        begun = any(row["event"] == "start" for row in begun_rows(stage))
        return f"{state.restarts + 1}/{state.max_restarts + 1}" if begun else "-"
    return str(state.attempt or "-")


def _eta(newest: Mapping[str, Any]) -> str:
    clock = newest.get("clock", {})
    if clock.get("eta_seconds") is None:
        return "-"
    return short_duration(max(0.0, clock["eta_seconds"] - (time.time() - clock["time"])))


def running_stages(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """(stage, start row of its job) of everything that runs on this machine in this run directory."""
    found = [(row["name"], running_job(run_dir / row["name"])) for row in planned_stages(run_dir)]
    return [(name, row) for name, row in found if row is not None and row.get("executor", "local") == "local"]
