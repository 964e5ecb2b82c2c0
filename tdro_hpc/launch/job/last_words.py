"""What a rank that fails leaves behind: its traceback and the cause in words, also on a disk that is full."""

import contextlib
import errno
import os
import re
import traceback
from pathlib import Path

ROOM = "room.bin"  # in <stage>/log while its job runs
_ROOM_BYTES = 1 << 16  # for a traceback, FAILED.json and a few lines
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def keep_room(stage_dir: Path) -> None:
    """Take room on the disk, so that a failure can be told when there is no more."""
    path = stage_dir / "log" / ROOM
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(_ROOM_BYTES))  # zeros would be no room on a disk that compresses


def free_room(stage_dir: Path) -> None:
    """Give that room to whatever is to be told."""
    with contextlib.suppress(OSError):
        (stage_dir / "log" / ROOM).unlink()


def leave_trace(stage_dir: Path, rank: int, error: BaseException) -> tuple[Path, str]:
    """(file with the traceback, the cause in words).

    Not in the log itself: that of rank 0 is shown to a person, who is told the first cause in words.
    """
    free_room(stage_dir)
    trace = stage_dir / "log" / f"rank{rank}-error.txt"
    with contextlib.suppress(OSError):
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return trace, words_of(error, stage_dir)


def words_of(error: BaseException, stage_dir: Path) -> str:
    """The cause in words: our own as they are, those of others with the kind of the exception."""
    is_full = isinstance(error, OSError) and error.errno in _FULL_NUMBERS
    found = _FULL.search(str(error))
    if is_full or found:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else found and found.group()
        where = getattr(error, "filename", None) or f"what is written below {stage_dir}"
        return (
            f"{what}: {where}. Make room, ask for a larger quota, or set runs_dir to another disk; "
            "the same line then continues after the last checkpoint."
        )
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
