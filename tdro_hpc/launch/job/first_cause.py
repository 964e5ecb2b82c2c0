"""Which rank failed first: the others fail too, of its absence, and must not be taken for the cause.

A rank that can speak writes FAILED.json itself. For one that was killed, srun tells in its own lines.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

# What a rank says when it failed because another one did. It waits before it claims to be the first cause.
_SECOND_HAND = ("another rank", "connection closed", "connection reset", "broken pipe", "nccl", "gloo", "timed out")
_POLL_SECONDS = 0.25
# srun: error: node2: tasks 2-3: Killed      before Slurm 23 and after
_TASK = re.compile(r"^srun: error: (?P<hosts>\S+): tasks? (?P<tasks>[\d,-]+): (?P<words>.+)$")
_JOB_ENDED = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO (?P<why>[^*,]+?)(?:,[^*]*)?)? \*\*\*")
_OF_JOB = re.compile(
    r"^srun: error: (?P<words>(?:Unable to|Task launch|Application launch|Invalid|Job step creation).*)$"
)
_MEANINGS = (
    (
        "Out Of Memory",
        "out of memory: it used more than the job was given. Lower queries_per_rank, or raise the memory",
    ),
    ("Killed", "ended by SIGKILL (the kernel does that when memory runs out)"),
)
STOP_WORDS = ("User defined signal 2", "Terminated", "Interrupt")  # ended by a stop signal before it could listen


@dataclass(frozen=True)
class Cause:
    """What ended a job, as srun's lines tell it."""

    words: str
    rank: int = 0
    host: str = ""  # empty = no particular one
    signal: bool = False  # a stop signal ended it, not a failure


def is_second_hand(words: str) -> bool:
    """Whether an error may be the consequence of another rank's end."""
    return any(sign in words.lower() for sign in _SECOND_HAND)


def wait_for_another(failed: Path, seconds: float) -> None:
    """Return when FAILED.json is there, or after `seconds`: another rank, or Slurm, may know more than this one."""
    deadline = time.monotonic() + seconds
    while not failed.exists() and time.monotonic() < deadline:
        time.sleep(min(_POLL_SECONDS, seconds))


def cause_in(text: str) -> Cause | None:
    """The first cause in what srun has written of one attempt; None where it names none."""
    stopped: Cause | None = None
    for line in text.splitlines():
        of_job = _OF_JOB.match(line)
        if of_job:
            return Cause(of_job["words"].strip())
        match = _TASK.match(line)
        if match is None:
            continue
        words = match["words"].strip()
        cause = Cause(
            next((meaning for sign, meaning in _MEANINGS if sign in words), f"srun says: {words}"),
            rank=int(re.split(r"[,-]", match["tasks"])[0]),
            host=_first_host(match["hosts"]),
            signal=words.startswith(STOP_WORDS),
        )
        if not cause.signal:
            return cause
        stopped = stopped or cause
    return stopped


def ended_by_slurm(text: str) -> str | None:
    """Why Slurm ended the job itself: JOB REQUEUE, PREEMPTION, TIME LIMIT, NODE FAILURE ..., empty = a person
    cancelled it; None when it did not."""
    found = list(_JOB_ENDED.finditer(text))
    if found:
        return found[-1]["why"] or ""
    # The batch shell of a node that Slurm has given up hears of it from srun only.
    return "NODE FAILURE" if re.search(r"^srun: error: Node failure on ", text, flags=re.MULTILINE) else None


def _first_host(hosts: str) -> str:
    """gpu03 of gpu[03-05,07],cpu1."""
    return re.sub(r"\[(\w+).*", r"\1", hosts).split(",")[0]
