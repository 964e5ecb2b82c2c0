"""What follows when a Slurm job was asked to stop and has saved: back into the queue, the next link, or nothing.

Measured with Slurm 22.05: `scontrol requeue` from inside brings a job back after a signal and in the grace of a
preemption, whatever the site's PreemptMode; but a job that a person has cancelled comes back too. A job that leaves by
itself in the grace is over for Slurm, and is not put back. Therefore the state of the job is looked at first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.config.cluster import ClusterConfig
from tdro_hpc.launch.commands import run_command
from tdro_hpc.launch.job.place import Place
from tdro_hpc.launch.jobs import append_event, read_jsonl

QUEUED_CODE, STOPPED_CODE = 0, 75  # 75 = EX_TEMPFAIL: it would have gone on; what comes after must not start
_ATTEMPTS = 3  # slurmctld may be busy or just restarting
_ENDING = ("COMPLETING", "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass(frozen=True)
class JobFacts:
    """What `scontrol show job` tells of the running job; empty where it did not answer."""

    state: str = ""  # RUNNING, COMPLETING ...
    reason: str = ""  # TimeLimit when that has been reached
    preempted: bool = False  # it is in the grace of a preemption, or that has just ended
    restarts: int = -1  # -1 = not known


@dataclass(frozen=True)
class Stop:
    """A stop that has been obeyed: all ranks have saved."""

    reason: str  # name of the signal that came to rank 0, or words
    restart: int  # times that the job was started again so far
    max_restarts: int
    links: bool  # cluster.requeue=links: other jobs go on, not this one
    link: int = 1
    num_links: int = 1
    cancelled: bool = False  # the front door has left its mark
    again: str = ""  # what a person types to go on


@dataclass(frozen=True)
class Sequel:
    """What is to be done after a stop."""

    requeue: bool
    then: str  # in words


def sequel_of(stop: Stop, facts: JobFacts) -> Sequel:
    """What follows a stop: a pure decision."""
    by_hand = f"Type: {stop.again}"
    if stop.cancelled:
        return Sequel(False, f"cancelled. {by_hand}")
    if facts.preempted and facts.state in _ENDING:
        return Sequel(False, f"preempted; Slurm puts it back where the site allows that. Otherwise {_lower(by_hand)}")
    if facts.state in _ENDING and facts.reason != "TimeLimit":
        return Sequel(False, f"Slurm is ending the job: it was cancelled. {by_hand}")
    if stop.links:
        if stop.link < stop.num_links:
            return Sequel(False, f"the next link continues ({stop.link + 1} of {stop.num_links})")
        return Sequel(False, f"that was the last link ({stop.link} of {stop.num_links}). {by_hand}")
    if stop.reason in ("SIGTERM", "SIGINT") and not facts.preempted and facts.reason != "TimeLimit":
        told = "Slurm does not say that it was preempted" if facts.state else "Slurm does not say why"
        return Sequel(False, f"{stop.reason} came, and {told}: it is not put back. {by_hand}")
    if stop.restart >= stop.max_restarts:
        return Sequel(False, f"it has gone on {stop.restart} times, as often as cluster.max_restarts allows. {by_hand}")
    return Sequel(True, f"back into the queue: restart {stop.restart + 1} of {stop.max_restarts}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def facts_in(text: str) -> JobFacts:
    """The facts in what `scontrol show job` has printed."""
    words = dict(re.findall(r"(?:^|\s)(JobState|Reason|PreemptTime|Restarts)=(\S*)", text))
    return JobFacts(
        state=words.get("JobState", ""),
        reason=words.get("Reason", ""),
        preempted=words.get("PreemptTime", "None") not in ("None", "Unknown", "", "N/A"),
        restarts=int(words["Restarts"]) if words.get("Restarts", "").isdigit() else -1,
    )


def look_at(job: str) -> JobFacts:
    """What Slurm says of a job now."""
    answer = run_command(["scontrol", "show", "job", job], seconds=10.0)
    return facts_in(answer.out) if answer.code == 0 else JobFacts()


def requeue(job: str, restart: int) -> str:
    """Put the running job back into the queue; empty when Slurm has taken it, else its own words."""
    words = ""
    for _ in range(_ATTEMPTS):
        answer = run_command(["scontrol", "requeue", job], seconds=20.0)
        if answer.code == 0:
            return ""
        words = " ".join((answer.err or answer.out).split()) or f"scontrol left with exit code {answer.code}"
        # Slurm ends the job, and scontrol with it, as soon as it has taken the request.
        if answer.code < 0 or look_at(job).restarts > restart:
            return ""
        if "onnect" not in words and "imed out" not in words and "not answer" not in words:
            break
    return words


def after_stop(
    stage_dir: Path, cluster: ClusterConfig, place: Place, *, step: int, steps: int, reason: str
) -> tuple[int, str]:
    """(exit code of rank 0, what follows in words); notes the stop in jobs.jsonl before Slurm ends this job."""
    stop = _stop_of(stage_dir, cluster, place, reason)
    sequel = sequel_of(stop, look_at(place.job))
    note = {"job": place.job, "step": step, "steps": steps, "reason": reason}
    # The row before the call: Slurm ends this job within a second of it.
    append_event(stage_dir, "stopped", **note, then=sequel.then)
    if not sequel.requeue:
        return STOPPED_CODE, sequel.then
    refused = requeue(place.job, place.restart)
    if not refused:
        return QUEUED_CODE, sequel.then
    then = f"Slurm does not put it back ({refused}). Type: {stop.again}"
    append_event(stage_dir, "stopped", **note, then=then)
    return STOPPED_CODE, then


def cancel_mark(stage_dir: Path, job: str) -> Path:
    """File that says that a person has cancelled the job, as opposed to its time limit."""
    return stage_dir / "log" / f"cancel-{job}"


def _stop_of(stage_dir: Path, cluster: ClusterConfig, place: Place, reason: str) -> Stop:
    row = submit_row(read_jsonl(stage_dir / "jobs.jsonl"), place.job) or {}
    return Stop(
        reason=reason,
        restart=place.restart,
        max_restarts=cluster.max_restarts,
        links=cluster.requeue == "links",
        link=row.get("link", 1),
        num_links=row.get("links", 1),
        cancelled=cancel_mark(stage_dir, place.job).exists(),
        again=f"python -m tdro_hpc.submit config={stage_dir / 'config.yaml'} stage={stage_dir.name}",
    )


def submit_row(rows: list[dict[str, Any]], job: str) -> Mapping[str, Any] | None:
    """The row that the front door wrote when it submitted this job; None for a job that was submitted by hand."""
    return next((row for row in reversed(rows) if row["event"] == "submit" and row["job"] == job), None)
