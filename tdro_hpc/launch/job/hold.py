"""Which attempt owns a stage: log/holder.json. A copy that lives on a lost node must not write after its successor.

{"job", "restart", "host", "time"}    written by rank 0 when it begins, read before every file that counts
"""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from tdro_hpc.atomic import write_json

HOLDER = "holder.json"


class TakenOver(Exception):
    """Another attempt has begun with this stage; this one leaves without a word on disk."""


@dataclass(frozen=True)
class _Hold:
    path: Path  # of holder.json
    job: str
    restart: int


_held: _Hold | None = None  # a process runs one stage in its life


def take_hold(stage_dir: Path, job: str, restart: int) -> None:
    """Make this attempt the owner of the stage: rank 0, when it begins."""
    join_hold(stage_dir, job, restart)
    owner = {"job": job, "restart": restart, "host": socket.gethostname(), "time": time.time()}
    write_json(stage_dir / "log" / HOLDER, owner)


def join_hold(stage_dir: Path, job: str, restart: int) -> None:
    """Let check_hold know which attempt this process belongs to: the other ranks."""
    global _held
    _held = _Hold(stage_dir / "log" / HOLDER, job, restart)


def check_hold() -> None:
    """Return when no other attempt has taken the stage; without a hold nobody can have.

    raises TakenOver in words
    """
    taken = taken_over()
    if taken:
        raise TakenOver(taken)


def taken_over() -> str:
    """Who owns the stage instead of this attempt, in words; empty when this one does, or holds nothing."""
    if _held is None:
        return ""
    try:
        owner = json.loads(_held.path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return ""  # a folder that was cleared by hand: nobody else has claimed it
    if (owner["job"], owner["restart"]) == (_held.job, _held.restart):
        return ""
    return (
        f"Job {owner['job']} (restart {owner['restart']}) took {_held.path.parent.parent.name} over on "
        f"{owner['host']}; this copy, job {_held.job} (restart {_held.restart}), writes nothing more."
    )


def let_go() -> None:
    """Forget the hold of this process; log/holder.json stays."""
    global _held
    _held = None
