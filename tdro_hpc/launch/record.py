"""What a stage left on disk: DONE.json and FAILED.json are written and read here, and summed up as a StageState.

DONE.json    {"stage", "keys", "hash", "code", "outputs": {path under <stage>: bytes}, "inputs": {stage: identity},
              "seconds", "ranks", "finished"}; written last
FAILED.json  {"stage", "step", "rank", "host", "error", "log"}: the first cause
STALE.json   a DONE.json whose stage is to be made again
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tdro_hpc
from tdro_hpc.atomic import write_json
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.jobs import (
    JOBS,
    last_row,
    local_job,
    newest_metrics,
    read_jsonl,
    rows_of_this_making,
    seconds_spent,
)
from tdro_hpc.launch.keys import hash_of, result_keys
from tdro_hpc.launch.queue import Queue
from tdro_hpc.launch.slurm_rows import SlurmWork, lost_words, slurm_work, status_by_rows
from tdro_hpc.launch.snapshot import code_version_of
from tdro_hpc.launch.stage import Stage

DONE, FAILED, STALE = "DONE.json", "FAILED.json", "STALE.json"
_KEPT = ("log", JOBS)  # of a stage that is begun anew


@dataclass(frozen=True)
class StageState:
    """One stage as its folder tells it. Plain data: the plan is made from nothing else."""

    status: str = "new"  # new, queued, running, done, stale, failed, stopped, unknown (squeue did not answer)
    keys_now: Mapping[str, Any] = field(default_factory=dict)  # result keys that the config gives today
    keys: Mapping[str, Any] = field(default_factory=dict)  # those that it was made or begun with
    inputs: Mapping[str, str] = field(default_factory=dict)  # identities of the stages that it was made from
    identity: str = ""  # sha256 of DONE.json
    problem: str = ""  # why DONE.json does not count, what FAILED.json says, what became of a job that never began
    code: str = ""  # version of the code that made it
    job: str = ""  # id of the newest job
    pid: int = 0  # of the newest local job
    host: str = ""  # where that was started
    attempt: int = 0  # newest attempt, from 1
    step: int = 0  # a new attempt continues after this step
    steps: int = 0
    seconds: float = 0.0  # wall time so far
    executor: str = "local"  # of the newest job: local, slurm
    restarts: int = 0  # times that the newest submission has gone on after a stop
    max_restarts: int = 0  # times that it may
    queue_reason: str = ""  # Slurm's word for why it waits, such as Resources
    nodes: str = ""  # where it runs, as Slurm writes them: node[1-2]
    jobs: tuple[str, ...] = ()  # ids in Slurm's queue in the order of their links; what comes after waits for the last
    dead_jobs: tuple[str, ...] = ()  # ids in the queue that will never do anything: to be cancelled before a new start


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_states(
    config: Config,
    graph: dict[str, Stage],
    run_dir: Path,
    ranks: Mapping[str, int],
    queue: Queue | None = None,
) -> dict[str, StageState]:
    """State of every stage of the graph, by name. `ranks` = processes of each stage under this config."""
    return {
        name: read_state(run_dir / name, keys_now=result_keys(config, stage, ranks[name]), queue=queue)
        for name, stage in graph.items()
    }


def read_state(stage_dir: Path, *, keys_now: Mapping[str, Any] | None = None, queue: Queue | None = None) -> StageState:
    """State of one stage, from its own files and from what squeue has said.

    queue  None where nobody asks Slurm, on the nodes and in the report: then its rows alone tell of a Slurm job
    """
    rows = read_jsonl(stage_dir / JOBS)
    work = slurm_work(stage_dir, rows, queue)
    state = _with(_begun_state(stage_dir, rows), keys_now=keys_now or {})
    if work.jobs or work.alive:
        state = _of_slurm(state, work)
    state = _with(state, dead_jobs=tuple(job.job for job in work.dead))
    # DONE.json is put aside before a stage is made again, so beside a live job it is that job's own.
    if not (stage_dir / DONE).exists():
        if local_job(stage_dir, rows) is not None:
            return _with(state, status="running")
        status = _status_in_slurm(work, queue, failed=(stage_dir / FAILED).exists())
        if status:
            words = queue.problem if status == "unknown" and queue is not None else ""
            return _with(state, status=status, problem=words)
    return _finished_state(stage_dir, state, lost_words(stage_dir, work) if queue is not None else "")


def _begun_state(stage_dir: Path, rows: list[dict[str, Any]]) -> StageState:
    """What the newest start of the stage says of it."""
    start = last_row(rows, "start") or {}
    step, steps = progress_of(stage_dir)
    return StageState(
        status="stopped" if start else "new",
        keys=start.get("keys", {}),
        inputs=start.get("inputs", {}),
        job=start.get("job", ""),
        pid=start.get("pid", 0),
        host=start.get("host", ""),
        attempt=start.get("attempt", 0),
        step=step,
        steps=steps,
        seconds=seconds_spent(rows_of_this_making(rows)),
    )


def _of_slurm(state: StageState, work: SlurmWork) -> StageState:
    """The same, with what is known of its Slurm jobs. Process ids mean nothing on another machine."""
    current = work.current
    first = work.jobs[0] if work.jobs else ""
    state = _with(
        state,
        executor="slurm",
        job=current.job if current else work.starts[-1]["job"] if work.starts else first,
        pid=0,
        restarts=work.restarts,
        max_restarts=work.submits[-1]["max_restarts"] if work.submits else 0,
        queue_reason=current.reason if current and current.waits else "",
        nodes=current.nodes if current else "",
        jobs=tuple(job.job for job in work.alive),
    )
    if work.begun or not work.submits or not (work.submits[0]["fresh"] or state.status == "new"):
        return state
    # Nothing that an earlier making left counts once this one begins; what it is made from is known then.
    return _with(state, keys=work.submits[-1]["keys"], inputs={}, step=0, steps=0, seconds=0.0)


def _status_in_slurm(work: SlurmWork, queue: Queue | None, *, failed: bool) -> str:
    """queued, running or unknown; empty when Slurm has no job of the stage, or when files tell how it ended."""
    if work.current is not None:
        return "queued" if work.current.waits else "running"
    if not work.jobs or (failed and work.begun):
        return ""
    if queue is None:
        status = status_by_rows(work)
        return status if status in ("queued", "running") else ""
    # One that was cancelled while it ran may still be saving.
    is_gone = work.cancelled and not work.begun
    return "unknown" if queue.problem and not is_gone else ""


def _finished_state(stage_dir: Path, state: StageState, lost: str) -> StageState:
    """State of a stage that no job works on. `lost` = why its newest job never began, in words."""
    done = read_json(stage_dir / DONE)
    if done is not None:
        return _done_state(stage_dir, state, done)
    if (stage_dir / DONE).exists():
        return _with(state, status="stale", problem=f"{DONE} cannot be read")
    if (stage_dir / STALE).exists():
        return _with(state, status="stale", problem=f"it was to be made again{lost and f', but {lost}'}")
    failed = read_json(stage_dir / FAILED)
    if failed is not None:
        return _with(state, status="failed", problem=failed_words(failed))
    return _with(state, problem=lost)


def _done_state(stage_dir: Path, state: StageState, done: dict[str, Any]) -> StageState:
    state = _with(state, keys=done["keys"], inputs=done["inputs"], code=done["code"], seconds=done["seconds"])
    lost = lost_outputs(stage_dir, done)
    if lost:
        return _with(state, status="stale", problem=f"{DONE} is there, but {lost}")
    return _with(state, status="done", identity=identity_of(stage_dir))


def _with(state: StageState, **changes: Any) -> StageState:
    return StageState(**{**state.__dict__, **changes})


def identity_of(stage_dir: Path) -> str:
    """sha256 of DONE.json: another one each time that the stage is made; empty when it is not done."""
    path = stage_dir / DONE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def lost_outputs(stage_dir: Path, done: dict[str, Any]) -> str:
    """What is wrong with the outputs that a DONE.json lists, in words; empty when all are there with their sizes."""
    for name, size in done["outputs"].items():
        path = stage_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return ""


def progress_of(stage_dir: Path) -> tuple[int, int]:
    """(step after which a new attempt continues, steps in all); 0 where there is no checkpoint or no metrics yet."""
    saved = [int(path.parent.name.removeprefix("step-")) for path in stage_dir.glob("checkpoints/step-*/state.json")]
    newest = newest_metrics(stage_dir) or last_row(rows_of_this_making(read_jsonl(stage_dir / JOBS)), "stopped") or {}
    return max(saved, default=0), newest.get("steps", 0)


def failed_words(failed: Mapping[str, Any]) -> str:
    """FAILED.json as one sentence; the first line of the error stands for all of it."""
    first_line = str(failed["error"]).strip().split("\n")[0]
    where = f"rank {failed['rank']} on {failed['host']}"
    at = f"at step {failed['step']}: " if failed["step"] else ""
    return f"{at}{where}: {first_line} (log {failed['log']})"


def write_done(
    stage_dir: Path,
    stage: Stage,
    *,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: str,
    ranks: int,
    seconds: float,
) -> None:
    """Write DONE.json, the last act of a stage.

    raises ValueError when an output that the stage promises is not there
    """
    outputs: dict[str, int] = {}
    for name in stage.makes:
        found = sorted(path for path in _files_below(stage_dir / "out" / name))
        if not found:
            raise ValueError(f"{stage.name} ended without {stage_dir / 'out' / name}, which it is there to make.")
        outputs |= {str(path.relative_to(stage_dir)): path.stat().st_size for path in found}
    value = {
        "stage": stage.name,
        "keys": dict(keys),
        "hash": hash_of(keys),
        "code": code,
        "outputs": outputs,
        "inputs": dict(inputs),
        "seconds": round(seconds, 3),
        "ranks": ranks,
        "finished": time.time(),
    }
    for name in (FAILED, STALE):
        (stage_dir / name).unlink(missing_ok=True)
    write_json(stage_dir / DONE, value)


def write_failed(stage_dir: Path, *, rank: int, error: str, log: Path, replace: bool = False) -> bool:
    """Write FAILED.json unless another rank was first: the first cause counts. True when this one is kept."""
    value = {
        "stage": stage_dir.name,
        "step": newest_metrics(stage_dir).get("step", 0),
        "rank": rank,
        "host": socket.gethostname(),
        "error": error,
        "log": str(log),
    }
    temporary = stage_dir / f".{FAILED}.{socket.gethostname()}-{os.getpid()}"
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    try:
        if replace:
            os.replace(temporary, stage_dir / FAILED)
        else:
            os.link(temporary, stage_dir / FAILED)  # fails where the name exists, unlike a rename
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def mark_stale(stage_dir: Path) -> None:
    """Take the word back that a stage is done, before what it was made from changes."""
    if (stage_dir / DONE).exists():
        os.replace(stage_dir / DONE, stage_dir / STALE)


def clear_stage(stage_dir: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove everything of an earlier making except its logs, its list of jobs, and the names in `keep`."""
    # DONE.json goes first and its stale copy last: a stop in between leaves a stage that is still to be made anew.
    mark_stale(stage_dir)
    for entry in sorted(stage_dir.iterdir() if stage_dir.is_dir() else []):
        if entry.name in (*_KEPT, *keep, STALE):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (stage_dir / STALE).unlink(missing_ok=True)


def inputs_of(stage: Stage, run_dir: Path) -> dict[str, str]:
    """Identity of every stage that this one is made from.

    raises ValueError naming those that are not done
    """
    missing = [name for name in stage.needs if read_state(run_dir / name).status != "done"]
    if missing:
        paths = ", ".join(str(run_dir / name / DONE) for name in missing)
        raise ValueError(
            f"{stage.name} needs {' and '.join(missing)}, but {paths} is missing or does not count. "
            f"Type: python -m tdro_hpc.submit stage={','.join(missing)},{stage.name} name={run_dir.name}"
        )
    return {name: identity_of(run_dir / name) for name in stage.needs}


def code_version() -> str:
    """Version of the code in use: the commit, with `-dirty-<hash>` when files differ from it; that of a snapshot."""
    return code_version_of(Path(tdro_hpc.__file__).resolve().parent.parent)


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
