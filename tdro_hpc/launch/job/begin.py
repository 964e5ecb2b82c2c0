"""Rank 0 makes a stage its own before any rank touches its files: may it begin, what is removed, what is noted.

None = go on. A number is the exit code with which all ranks leave at once.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.job.hold import take_hold
from tdro_hpc.launch.job.last_words import keep_room
from tdro_hpc.launch.job.place import SLURM, Place
from tdro_hpc.launch.job.requeue import submit_row
from tdro_hpc.launch.jobs import JOBS, append_start, has_slurm_rows, last_row, read_jsonl, running_job, stage_lock
from tdro_hpc.launch.keys import change_words, changed_keys
from tdro_hpc.launch.queue import ask_queue
from tdro_hpc.launch.record import FAILED, StageState, clear_stage, read_state
from tdro_hpc.launch.stage import Stage

DONE_CODE, FAILED_CODE = 0, 1
KEPT = ("config.yaml", "job.sbatch")  # of a stage that its own job begins anew: it runs from them
_ROW_SECONDS = 30.0  # the front door writes its row after sbatch has answered, and the disk may show it late
Rows = list[dict[str, Any]]


def begin_in_slurm(
    stage_dir: Path,
    place: Place,
    *,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    row_seconds: float = _ROW_SECONDS,
) -> int | None:
    """Begin a job that the front door submitted: it has decided what is to be removed, and says so in its row."""
    # The front door holds the lock from sbatch to its row. Where locks do not work, the row is waited for.
    deadline = time.monotonic() + row_seconds
    while True:
        with stage_lock(stage_dir):
            rows = read_jsonl(stage_dir / JOBS)
            if submit_row(rows, place.job) is not None or time.monotonic() > deadline:
                return _begin_submitted(stage_dir, place, rows, keys=keys, inputs=inputs)
        time.sleep(0.5)


def _begin_submitted(
    stage_dir: Path, place: Place, rows: Rows, *, keys: Mapping[str, Any], inputs: Mapping[str, str]
) -> int | None:
    if read_state(stage_dir).status == "done":
        print(f"{stage_dir.name} is done already: {stage_dir / 'DONE.json'}")
        return DONE_CODE
    of_submission = rows_of_submission(rows, place.job)
    begun = last_row(of_submission, "start")
    # A link that failed is not repeated by the next one. The same job has come back because Slurm put it back.
    if begun is not None and begun["job"] != place.job and (stage_dir / FAILED).exists():
        print(f"{stage_dir.name} failed in job {begun['job']}, a link before this one; nothing is repeated.")
        return FAILED_CODE
    fresh = begun is None and bool(of_submission) and bool(of_submission[0].get("fresh"))
    if fresh:
        clear_stage(stage_dir, keep=KEPT)
    _note_start(stage_dir, place, keys=keys, inputs=inputs, fresh=fresh)
    return None


def rows_of_submission(rows: Rows, job: str) -> Rows:
    """Rows from the submission of the first link of this job's chain on; [] for a job without a submit row."""
    own = next((index for index in reversed(range(len(rows))) if _is_submit(rows[index], job)), None)
    if own is None:
        return []
    first = next((index for index in range(own, -1, -1) if _is_submit(rows[index]) and rows[index]["link"] == 1), own)
    return rows[first:]


def _is_submit(row: Mapping[str, Any], job: str = "") -> bool:
    return row["event"] == "submit" and job in ("", row["job"])


def begin_by_hand(
    stage_dir: Path,
    config: Config,
    stage: Stage,
    place: Place,
    *,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    save: bool,
) -> int | None:
    """Begin a stage that a person started: on this machine, with srun, or in a batch script of his own.

    save    write config.yaml: the keys were typed, and not read from it
    raises  ValueError when the stage runs, is to be made again, which submit prepares, or was begun otherwise
    """
    with stage_lock(stage_dir):
        # A job that Slurm has put back has been let in before.
        queue = ask_queue() if has_slurm_rows(stage_dir) and place.restart == 0 else None
        state = read_state(stage_dir, queue=queue)
        if state.status == "done":
            print(f"{stage.name} is done: {stage_dir / 'DONE.json'}")
            return DONE_CODE
        if place.restart == 0:
            row = running_job(stage_dir, queue)
            if row is not None and row["job"] != place.job:
                where = f", pid {row['pid']} on {row['host']}" if row.get("host") else ""
                raise ValueError(f"{stage.name} is running already: job {row['job']}{where}.")
            if state.status == "unknown":
                raise ValueError(
                    f"{stage.name} may be at work as job {state.job}, but squeue did not answer: {state.problem}. "
                    "A second copy could be started; start it again when squeue answers."
                )
            _refuse(stage_dir, stage, state, keys=keys, inputs=inputs)
        if save:
            save_config(config, stage_dir / "config.yaml")
        fresh = last_row(read_jsonl(stage_dir / JOBS), "start") is None
        _note_start(stage_dir, place, keys=keys, inputs=inputs, fresh=fresh)
    return None


def _refuse(
    stage_dir: Path, stage: Stage, state: StageState, *, keys: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    name, run = stage.name, stage_dir.parent.name
    if state.status == "stale":
        raise ValueError(
            f"{name} has to be made again ({state.problem}), which submit prepares. "
            f"Type: python -m tdro_hpc.submit stage={name} name={run}"
        )
    if not state.step or not state.attempt:
        return  # nothing was saved: it begins anew
    changes = changed_keys(state.keys, keys)
    if changes:
        was, now = change_words(changes)
        raise ValueError(
            f"{name} stopped after step {state.step}; it was begun with {was}, and the config says {now}. "
            f"Put that back to continue, or type: python -m tdro_hpc.submit force={name} name={run} to begin anew."
        )
    others = [need for need in stage.needs if state.inputs.get(need) != inputs[need]]
    if others:
        raise ValueError(
            f"{name} was begun with an earlier {' and '.join(others)}; it has to begin anew, which submit prepares. "
            f"Type: python -m tdro_hpc.submit stage={name} name={run}"
        )


def _note_start(
    stage_dir: Path, place: Place, *, keys: Mapping[str, Any], inputs: Mapping[str, str], fresh: bool
) -> None:
    (stage_dir / FAILED).unlink(missing_ok=True)
    if place.executor == SLURM:
        take_hold(stage_dir, place.job, place.restart)
        keep_room(stage_dir)
    append_start(
        stage_dir,
        job=place.job,
        pid=os.getpid(),
        ranks=place.world,
        keys=keys,
        inputs=inputs,
        fresh=fresh,
        restart=place.restart,
        executor=place.executor,
    )
