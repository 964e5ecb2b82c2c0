"""What is known of the stages of a run in, one word and one reason for each out. Reads and asks nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdro_hpc.launch.jobs import last_row
from tdro_hpc.launch.look.printout import short_duration
from tdro_hpc.launch.record import StageState

# What Slurm's accounting calls the end of a job of which our own files say nothing.
_ENDS = {
    "TIMEOUT": "ended by the time limit before it could save",
    "NODE_FAIL": "a node failed and the job was not requeued",
    "OUT_OF_MEMORY": "killed because it used more memory than the job had asked for",
    "CANCELLED": "cancelled with scancel",
    "PREEMPTED": "preempted and not requeued",
    "BOOT_FAIL": "its nodes did not come up",
    "DEADLINE": "ended by a deadline",
    "FAILED": "the job ended with an error before a rank could write it down",
}
_PUT_BACK = "back into the queue"  # how requeue.py says so


@dataclass(frozen=True)
class SeenStage:
    """One stage as a person is told of it."""

    folder: Path
    needs: tuple[str, ...]
    state: StageState
    rows: tuple[dict[str, Any], ...] = ()  # of jobs.jsonl
    metrics: Mapping[str, Any] = field(default_factory=dict)  # newest row
    planned: bool = True  # the newest plan of the run names it

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.folder.name


Stages = Mapping[str, SeenStage]


def unexplained_job(stage: SeenStage) -> str:
    """Id of a job of Slurm that is gone without a word in our files; empty where these tell, or it is not gone."""
    state = stage.state
    if state.executor != "slurm" or state.status not in ("stopped", "new", "stale") or not state.job:
        return ""
    told = [row for row in stage.rows if row["event"] in ("stopped", "cancelled") and row["job"] == state.job]
    begun = last_row(list(stage.rows), "start")
    # What was put back into the queue, or went on since, has not ended with that stop.
    told = [row for row in told if not row.get("then", "").startswith(_PUT_BACK)]
    if begun is not None and begun["job"] == state.job:
        told = [row for row in told if row["time"] >= begun["time"]]
    return "" if told else state.job


def begun_rows(stage: SeenStage) -> list[dict[str, Any]]:
    """Rows of the newest submission to Slurm; all rows where there was none."""
    firsts = [index for index, row in enumerate(stage.rows) if row["event"] == "submit" and row["link"] == 1]
    return list(stage.rows[max(firsts, default=0) :])


def state_word(stage: SeenStage, stages: Stages) -> str:
    """One word for the state of a stage: done, running, queued, failed, dead, stopped, waiting, unknown ..."""
    status = stage.state.status
    if status == "stale":
        return "to be made again"
    if status in ("new", "stopped") and failed_before(stage, stages):
        return "dead"
    return "waiting" if status == "new" else status


def failed_before(stage: SeenStage, stages: Stages) -> SeenStage | None:
    """The nearest stage that this one is made from, directly or not, and that has failed."""
    for need in stage.needs:
        if need in stages and stages[need].state.status == "failed":
            return stages[need]
    found = (failed_before(stages[need], stages) for need in stage.needs if _is_to_come(need, stages))
    return next((other for other in found if other is not None), None)


def _is_to_come(name: str, stages: Stages) -> bool:
    return name in stages and stages[name].state.status in ("new", "stopped", "stale")


def reason(stage: SeenStage, stages: Stages, accounting: Mapping[str, str]) -> str:
    """Why the stage is in its state, in words.

    accounting   job id -> how it ended, of jobs that `unexplained_job` names; empty without Slurm's accounting
    """
    state = stage.state
    if state.status == "done":
        return f"took {short_duration(state.seconds)}, code {state.code}"
    if state.status == "running":
        return _running_words(state)
    if state.status == "queued":
        return _queued_words(stage, stages)
    if state.status == "unknown":
        return f"job {state.job}: squeue did not answer"
    if state.status == "failed":
        return _failed_words(stage)
    failed = failed_before(stage, stages)
    if failed is not None and state.status in ("new", "stopped"):
        return _failed_words(failed)
    if state.status == "stale":
        return state.problem
    if state.status == "stopped":
        return _stopped_words(stage, accounting)
    return _new_words(stage, stages, accounting)


def _failed_words(stage: SeenStage) -> str:
    """dead: s1 failed at step 400: rank 3 on node2: CUDA out of memory (log ...)."""
    problem = stage.state.problem
    return f"dead: {stage.name} failed{'' if problem.startswith('at step') else ':'} {problem}"


def _running_words(state: StageState) -> str:
    if state.executor != "slurm":
        return f"job {state.job}, pid {state.pid} on {state.host}"
    restart = f", restart {state.restarts} of {state.max_restarts}" if state.restarts else ""
    return f"running on {state.nodes or state.host}{restart}"


def _queued_words(stage: SeenStage, stages: Stages) -> str:
    state = stage.state
    rows = begun_rows(stage)
    start, stopped = last_row(rows, "start"), last_row(rows, "stopped")
    if start is not None:
        restart = f"restart {state.restarts + 1} of {state.max_restarts}"
        if stopped is not None and stopped["time"] >= start["time"]:
            words = f"requeued after {stopped['reason']} at step {stopped['step']}, {restart}"
        else:
            words = f"requeued by Slurm (preemption or a failed node), {restart}"
        return f"{words}; {_queue_words(state)}"
    if state.queue_reason in ("Dependency", "") and _waits_for(stage, stages):
        return f"waiting for {_waits_for(stage, stages)}"
    return _queue_words(state)


def _queue_words(state: StageState) -> str:
    return f"queued: {state.queue_reason or 'no reason given'} (job {state.job})"


def _waits_for(stage: SeenStage, stages: Stages) -> str:
    """s1 (job 812) and s2-curr: what has to be done before."""
    waiting = [need for need in stage.needs if need not in stages or stages[need].state.status != "done"]
    return " and ".join(_with_job(need, stages) for need in waiting)


def _with_job(name: str, stages: Stages) -> str:
    if name not in stages or stages[name].state.status not in ("queued", "running"):
        return name
    state = stages[name].state
    return f"{name} (job {state.jobs[-1] if state.jobs else state.job})"


def _stopped_words(stage: SeenStage, accounting: Mapping[str, str]) -> str:
    state, rows = stage.state, list(stage.rows)
    after = f"after step {state.step}" if state.step else "from the beginning: nothing was saved"
    goes_on = f"the same line continues {after}"
    stopped, cancelled = last_row(rows, "stopped"), last_row(rows, "cancelled")
    if state.executor != "slurm":
        why = stopped["reason"] if stopped and stopped["job"] == state.job else "interrupted"
        return f"{why}; the same line continues after step {state.step}"
    if unexplained_job(stage):
        end = accounting.get(state.job, "")
        # Without accounting nobody has kept how it ended.
        why = _ENDS.get(end, f"Slurm says {end}" if end else "gone from the queue without a word")
        return f"job {state.job}: {why}; {goes_on}"
    if cancelled is not None and cancelled["job"] == state.job:
        return f"job {state.job}: {cancelled['reason']}; {goes_on}"
    assert stopped is not None, "a job that is explained was stopped or cancelled"
    then = stopped.get("then", "").partition(" Type:")[0].rstrip(".")
    if then.startswith("preempted") or stopped["reason"] == "Slurm ended the job: preemption":
        return f"preempted at step {stopped['step']} and not requeued; {goes_on}"
    if stopped["reason"].startswith("Slurm ended"):
        return f"{stopped['reason']}; {goes_on}"
    return f"stopped by {stopped['reason']} at step {stopped['step']}{then and f': {then}'}; {goes_on}"


def _new_words(stage: SeenStage, stages: Stages, accounting: Mapping[str, str]) -> str:
    state = stage.state
    cancelled = last_row(list(stage.rows), "cancelled")
    if cancelled is not None and cancelled["job"] == state.job:
        return f"job {state.job}: {cancelled['reason']} before it began"
    if state.executor == "slurm" and state.problem:
        end = accounting.get(state.job, "")
        why = f": {_ENDS.get(end, f'Slurm says {end}')}" if end else ""
        return f"{state.problem}{why}; the same line submits it again"
    waiting = _waits_for(stage, stages)
    return f"waiting for {waiting}" if waiting else "not started yet"
