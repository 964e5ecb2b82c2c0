"""The cause of a failure is told in words, and there is room for them."""

import errno
from pathlib import Path

import pytest

from tdro_hpc.launch.job.last_words import free_room, keep_room, leave_trace, words_of


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("s1 needs s0"), "s1 needs s0"),
        (ValueError(), "ValueError: "),
        (KeyError("a"), "KeyError: 'a'"),
        (
            FileNotFoundError(errno.ENOENT, "No", "/data"),
            "FileNotFoundError: [Errno 2] No: '/data'",
        ),
    ],
)
def test_words_are_those_of_the_exception(error, words):
    assert words_of(error, Path("/runs/s0")) == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device: what is written below /runs/s0. "),
        (OSError(errno.EDQUOT, "x", "/home/cache/f"), "Disk quota exceeded: /home/cache/f. "),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device: what is written"),
    ],
)
def test_full_disk_is_named_with_what_to_do(error, words):
    told = words_of(error, Path("/runs/s0"))
    assert told.startswith(words) and "Make room" in told and "the same line" in told


def test_room_is_taken_and_given_to_the_traceback(tmp_path):
    keep_room(tmp_path)
    assert (tmp_path / "log" / "room.bin").stat().st_blocks * 512 >= 1 << 16
    try:
        raise KeyError("a")
    except KeyError as error:
        trace, words = leave_trace(tmp_path, 3, error)
    assert "Traceback" in trace.read_text() and trace.name == "rank3-error.txt" and words == "KeyError: 'a'"
    assert not (tmp_path / "log" / "room.bin").exists()
    free_room(tmp_path)


def test_traceback_that_cannot_be_written_does_not_hide_the_cause(tmp_path):
    (tmp_path / "log").write_text("not a folder")
    assert leave_trace(tmp_path, 0, ValueError("the cause"))[1] == "the cause"
