import errno
import os

import pytest

from tdro_hpc.data import derived
from tdro_hpc.data.derived import derived_folder, stamp_of

STAMP = "0123456789abcdef"


def build(folder):
    (folder / "a").write_text("whole")


def make(path, kind="rows", *, stamp=STAMP, cache_dir="", build=build):
    return derived_folder(path, kind, stamp=stamp, cache_dir=cache_dir, build=build)


def test_stamp_changes_with_size_time_and_ends(tmp_path):
    path = tmp_path / "x"
    stamps = []
    body = bytes(100_000)
    contents = [body, body + b"x", body + b"y", b"y" + body, b"z" + body]
    for content, time in [(content, 1) for content in contents] + [(body, 2)]:
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        stamps.append(stamp_of(path))
    assert len(set(stamps)) == 6 and all(len(stamp) == 16 for stamp in stamps)


def test_build_that_fails_leaves_nothing_and_the_next_one_works(tmp_path):
    def fail(folder):
        (folder / "a").write_text("half")
        raise ValueError("stopped")

    path = tmp_path / "x"
    with pytest.raises(ValueError, match="stopped"):
        make(path, build=fail)
    assert not [entry for entry in (tmp_path / ".tdro_hpc").iterdir() if entry.is_dir()]
    assert (make(path) / "a").read_text() == "whole"


def test_part_of_a_killed_build_is_removed_and_other_kinds_and_files_stay(tmp_path):
    path = tmp_path / "x"
    others = [make(path, "keys"), make(tmp_path / "x.gz"), make(tmp_path / "y")]
    left_behind = tmp_path / ".tdro_hpc" / f"x.{'f' * 16}.rows.host-1.part"
    left_behind.mkdir()
    make(path)
    assert not left_behind.exists() and all(other.is_dir() for other in others)


def test_without_locks_the_first_build_counts(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(derived.fcntl, "flock", no_locks)
    path = tmp_path / "x"

    def overtaken(folder):
        make(path)  # another process ends first
        (folder / "a").write_text("late")

    assert (make(path, build=overtaken) / "a").read_text() == "whole"


def test_no_place_to_write_says_which_key_to_set(tmp_path):
    blocked = tmp_path / "file"
    (blocked / "cache").mkdir(parents=True)
    (blocked).chmod(0o555)
    try:
        with pytest.raises(ValueError, match="Set data.cache_dir="):
            make(tmp_path / "x", cache_dir=str(blocked / "new"))
    finally:
        blocked.chmod(0o755)


def test_full_disk_says_which_key_to_set(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(ValueError, match="full. Set data.cache_dir="):
        make(tmp_path / "x", build=full)
