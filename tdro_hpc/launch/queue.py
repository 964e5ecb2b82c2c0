"""What Slurm has of this user, from one call of squeue; what became of jobs that are over, from one call of sacct.

Plain data out. Nothing here changes anything, and a Slurm that does not answer is a sentence, not an exception.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tdro_hpc.launch.commands import NOT_INSTALLED, TOO_LATE, Outcome, run_command

NEVER = "DependencyNeverSatisfied"  # Slurm's reason of a job that waits for one that has failed
FIELD = "\x1f"  # between the fields: paths and free words of a site may have any character that one can type
FORMAT = FIELD.join(["%i", "%T", "%L", "%N", "%E", "%r", "%o"])  # what parse_queue reads, the script last
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_NOTHING = ("", "(null)", "None", "N/A", "n/a")
# Settings of a user for his own eyes, which would hide jobs from us or print them in another way.
_PERSONAL = ("ACCOUNT", "FORMAT", "FORMAT2", "LICENSES", "NAMES", "PARTITION", "QOS", "SORT", "STATES", "USERS")
_SECONDS = 10.0  # that Slurm has for an answer
_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?:(?:(?P<hours>\d+):)?(?P<minutes>\d+):)?(?P<seconds>\d+)")


@dataclass(frozen=True)
class QueueJob:
    """One job that is waiting, running or just leaving."""

    job: str  # id
    state: str  # PENDING, RUNNING, COMPLETING and so on
    reason: str = ""  # Slurm's word for why it waits: Resources, Priority, Dependency; empty = none
    dependency: str = ""  # such as afterok:811(unfulfilled)
    nodes: str = ""  # such as node[1-2]; empty while it waits
    script: str = ""  # full path of the batch script, with its arguments
    seconds_left: int = -1  # until its time limit; -1 = not known, or no limit

    @property
    def waits(self) -> bool:
        """Whether it is not running, or not any more since it was put back."""
        return self.state in _WAITING


@dataclass(frozen=True)
class Queue:
    """The jobs of this user by id, or the reason why they are not known."""

    jobs: Mapping[str, QueueJob] = field(default_factory=dict)
    problem: str = ""  # why squeue could not answer, in words; jobs is empty then

    def jobs_of(self, stage_dir: Path, ids: Sequence[str]) -> tuple[QueueJob, ...]:
        """Jobs with these ids, in their order, and then any other whose script lies below stage_dir, oldest first.

        The others were submitted by a front door that was killed before it could note them.
        """
        noted = [self.jobs[plain_id(job)] for job in ids if plain_id(job) in self.jobs]
        folders = dict.fromkeys([os.path.abspath(stage_dir), os.path.realpath(stage_dir)]) if self.jobs else {}
        others = {job.job: job for folder in folders for job in self._by_folder.get(folder, [])}
        return (*noted, *(others[job] for job in sorted(others, key=_age) if others[job] not in noted))

    def job_of(self, stage_dir: Path, ids: Sequence[str]) -> QueueJob | None:
        """The first of `jobs_of`: the job that works on a stage, or that will do so next."""
        return next(iter(self.jobs_of(stage_dir, ids)), None)

    def never_starts(self, job: QueueJob) -> bool:
        """Whether it waits for something that has failed, or for another job in the queue that does."""
        return job.job in self._dead

    @cached_property
    def _dead(self) -> set[str]:
        """Ids of the jobs that never start."""
        waiting = [job for job in self.jobs.values() if job.waits]
        children: dict[str, list[str]] = {}
        for job in waiting:
            for parent in re.findall(r":(\d+)", job.dependency):  # afterok:811(unfulfilled),afterany:810
                children.setdefault(parent, []).append(job.job)
        found: set[str] = set()
        left = [job.job for job in waiting if job.reason == NEVER or "(failed)" in job.dependency]
        while left:
            dead = left.pop()
            if dead not in found:
                found.add(dead)
                left += children.get(dead, [])
        return found

    @cached_property
    def _by_folder(self) -> dict[str, list[QueueJob]]:
        """Jobs by every folder that their script lies in, however deep: one look for each of many stages."""
        found: dict[str, list[QueueJob]] = {}
        for job in self.jobs.values():
            if not job.script.startswith("/"):
                continue
            scripts = dict.fromkeys([job.script, os.path.realpath(job.script)])
            for folder in dict.fromkeys(str(folder) for script in scripts for folder in Path(script).parents):
                found.setdefault(folder, []).append(job)
        return found


def plain_id(job: str) -> str:
    """The id of a job without the cluster that a federation adds: 812 of 812;alpha."""
    return job.partition(";")[0].strip()


def _age(job: str) -> tuple[int, str]:
    number = re.match(r"\d*", job)
    return (int(number.group() or 0) if number else 0, job)


def ask_queue() -> Queue:
    """The jobs of this user, from one call of squeue that has ten seconds to answer."""
    unset = [word for name in _PERSONAL for word in ("-u", f"SQUEUE_{name}")]
    # --all: also those in partitions that a site hides.
    squeue = ["squeue", f"--user={os.getuid()}", "--all", "--noheader", f"--format={FORMAT}"]
    answer = run_command(["env", *unset, *squeue], seconds=_SECONDS)
    return parse_queue(answer.out) if answer.code == 0 else Queue(problem=_problem(answer))


def _problem(answer: Outcome) -> str:
    if answer.code == NOT_INSTALLED:
        return "squeue is not installed here"
    if answer.code == TOO_LATE:
        return f"squeue did not answer within {_SECONDS:g} s"
    words = " ".join(line.strip() for line in answer.err.splitlines() if line.strip())
    return words or f"squeue left with exit code {answer.code} and no word"


def parse_queue(text: str) -> Queue:
    """The queue in what `squeue --format=FORMAT` has printed.

    A line that cannot be read is a problem of the whole: the job in it might be one of ours.
    """
    jobs = {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        cells = line.split(FIELD, FORMAT.count(FIELD))
        if len(cells) != FORMAT.count(FIELD) + 1:
            return Queue(problem=f"squeue printed a line that cannot be read: {line.strip()!r}")
        job, state, left, nodes, dependency, reason, script = (_cell(cell) for cell in cells)
        jobs[plain_id(job)] = QueueJob(
            job=plain_id(job),
            state=state,
            reason=reason,
            dependency=dependency,
            nodes=nodes,
            script=script,
            seconds_left=seconds_of(left),
        )
    return Queue(jobs)


def _cell(text: str) -> str:
    return "" if text.strip() in _NOTHING else text.strip()


def seconds_of(text: str) -> int:
    """Seconds of a duration such as 1-02:03:04 or 02:03; -1 for UNLIMITED, INVALID, NOT_SET."""
    match = _DURATION.fullmatch(text)
    if match is None:
        return -1
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def ask_accounting(jobs: Sequence[str]) -> dict[str, str]:
    """Last state of jobs that are over, such as TIMEOUT, by id, from one call of sacct.

    {} when there is no sacct, or no accounting behind it: most of what it knows is in our own files.
    """
    ids = list(dict.fromkeys(plain_id(job) for job in jobs))
    if not ids:
        return {}
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(ids)}"]
    answer = run_command(sacct, seconds=_SECONDS)
    if answer.code != 0:
        return {}
    rows = [line.split("|") for line in answer.out.splitlines()]
    # CANCELLED by 1000
    return {plain_id(row[0]): row[1].split()[0] for row in rows if len(row) == 2 and row[1].strip()}
