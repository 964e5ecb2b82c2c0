import gzip
import io
import os
import tarfile

import pytest

from tdro_hpc.data.archives import unpacked
from tdro_hpc.data.rowfile import RowFile


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_members_of_the_released_archives_follow_each_other_line_by_line(tmp_path):
    members = {
        "dedup/._x.jsonl": b"mac",
        "dedup/x.part0.jsonl": b"{1}\n{2}",  # no line end
        "dedup/README": b"text",
        "dedup/x.part1.jsonl": b"\xef\xbb\xbf{3}\n",
    }
    path = unpacked(write_tar(tmp_path / "x.jsonl.tar.gz", members), cache_dir="")
    assert path.name == "x.jsonl" and path.read_bytes() == b"{1}\n{2}\n{3}\n"


def test_archive_without_rows_names_what_it_has(tmp_path):
    with pytest.raises(ValueError, match="holds no rows.*other.txt"):
        unpacked(write_tar(tmp_path / "x.jsonl.tar.gz", {"other.txt": b"text"}), cache_dir="")


def test_changed_archive_is_unpacked_again_and_the_old_copy_goes(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"{1}\n", mtime=0))
    first = unpacked(path, cache_dir="")
    assert unpacked(path, cache_dir="") == first
    path.write_bytes(gzip.compress(b"{2}\n", mtime=0))
    os.utime(path, ns=(5, 5))
    second = unpacked(path, cache_dir="")
    assert second.read_bytes() == b"{2}\n" and not first.exists()


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.tar.gz"])
def test_cut_off_archive_leaves_nothing_and_says_so(tmp_path, name):
    content = os.urandom(100_000).hex().encode()
    if name.endswith("tar.gz"):
        packed = write_tar(tmp_path / name, {"x.jsonl": content}).read_bytes()
    else:
        packed = gzip.compress(content)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="damaged or its download was cut short"):
        unpacked(tmp_path / name, cache_dir="")
    assert not [entry for entry in (tmp_path / ".tdro_hpc").iterdir() if entry.is_dir()]


def test_index_of_an_unpacked_file_lies_beside_it(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"{1}\n"))
    file = RowFile(path, cache_dir=str(tmp_path / "cache"))
    assert file.path.parent.parent == tmp_path / "cache" and file.path.parent in file.index.parents
