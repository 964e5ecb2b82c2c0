import gzip
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_hpc.data import rowfile
from tdro_hpc.data.rowfile import RowFile, line_blocks

BOM = b"\xef\xbb\xbf"
MILLION = """
import random, re, sys
from pathlib import Path
from tdro_hpc.data.rowfile import RowFile
file = RowFile(Path(sys.argv[1]), cache_dir="")
for row in random.Random(0).sample(range(1_000_000), 1000):
    assert file.read(row) == b'{"query": "row %d"}' % row, row
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(file), peak.group(1), (file.index / "offsets.npy").stat().st_mtime_ns)
"""
LINES = [b"{}", b"[1]", b"", b"  ", b"\t", b'{"a": "long enough for two blocks"}', b" {} "]


def rows_of(file):
    return [file.read(row) for row in range(len(file))]


def read_all(file, results):
    rows = rows_of(file)
    results.put((os.getpid(), file._process, rows))


def refuse_odd(line):
    if int(line.strip(b"{}")) % 2:
        raise ValueError("odd")


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.sampled_from(LINES)),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    ends=st.booleans(),
    bom=st.booleans(),
    block_bytes=st.integers(1, 40),
)
def test_lines_are_those_of_a_plain_reading(tmp_path_factory, lines, line_end, ends, bom, block_bytes):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(BOM * bom + line_end.join(lines) + line_end * ends)
    text = path.read_bytes().removeprefix(BOM)
    expected = [(n, line.rstrip(b"\r")) for n, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rowfile, "BLOCK_BYTES", block_bytes)
        found = []
        for block, offset, starts, stops, first_line in line_blocks(path):
            whole = path.read_bytes()
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                assert whole[offset + start : offset + stop] == block[start:stop]
                found.append((first_line + block.count(b"\n", 0, start), block[start:stop]))
    assert found == expected


def test_row_is_read_by_number_and_knows_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(BOM + b'{"a":1}\r\n\r\n   \n{"a":2}\n{"a":3}')
    file = RowFile(path, cache_dir="")
    assert rows_of(file) == [b'{"a":1}', b'{"a":2}', b'{"a":3}']
    assert [file.line_of(row) for row in range(3)] == [1, 4, 5]
    for row in (3, -1):
        with pytest.raises(IndexError, match="3 rows"):
            file.read(row)


def test_changed_file_is_indexed_again_and_the_old_index_goes(tmp_path, write_lines):
    path = write_lines(tmp_path / "x.jsonl", ["{1}", "{2}"])
    first = RowFile(path, cache_dir="").index
    assert RowFile(path, cache_dir="").index == first
    write_lines(path, ["{1}", "{3}"])  # same size
    os.utime(path, ns=(1, 1))
    second = RowFile(path, cache_dir="")
    assert rows_of(second) == [b"{1}", b"{3}"] and not first.exists()


def test_index_is_not_built_twice(tmp_path, write_lines, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", ["{1}"])
    RowFile(path, cache_dir="")
    monkeypatch.setattr(rowfile, "build_index", lambda *_, **__: pytest.fail("built again"))
    assert rows_of(RowFile(path, cache_dir="")) == [b"{1}"]


def test_processes_that_build_at_once_read_the_same_rows(tmp_path, write_lines):
    path = write_lines(tmp_path / "x.jsonl", [f"{{{n}}}" for n in range(5000)])
    packed = tmp_path / "y.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def build():
        results.put([len(RowFile(path, cache_dir="")), len(RowFile(packed, cache_dir=""))])

    processes = [context.Process(target=build) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[5000, 5000]] * 4
    for process in processes:
        process.join()
    assert not [entry.name for entry in (tmp_path / ".tdro_hpc").iterdir() if entry.name.endswith(".part")]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_process_reads_the_same_rows_through_its_own_handle(tmp_path, write_lines, method):
    file = RowFile(write_lines(tmp_path / "x.jsonl", ["{1}", "{2}"]), cache_dir="")
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=read_all, args=(file, results))
    process.start()
    pid, opened_by, rows = results.get(timeout=60)
    process.join()
    assert pid == opened_by != os.getpid() and rows == rows_of(file)


def test_file_that_changed_after_opening_is_not_read_by_a_new_process(tmp_path, write_lines):
    path = write_lines(tmp_path / "x.jsonl", ["{1}", "{2}"])
    state = pickle.dumps(RowFile(path, cache_dir=""))
    write_lines(path, ["{100}", "{2}"])
    with pytest.raises(OSError, match="changed while it was in use"):
        pickle.loads(state)


def test_skipped_rows_are_counted_and_the_numbering_is_that_of_the_good_rows(tmp_path, write_lines, monkeypatch):
    monkeypatch.setattr(rowfile, "BLOCK_BYTES", 16)  # bad rows in many blocks
    path = write_lines(tmp_path / "x.jsonl", [f"{{{n}}}" for n in range(30)])
    file = RowFile(path, cache_dir="", check=refuse_odd, variant="skip")
    assert rows_of(file) == [f"{{{n}}}".encode() for n in range(0, 30, 2)]
    assert (file.skipped_rows, file.skipped_lines[:2], len(file.skipped_lines)) == (15, [2, 4], 10)
    assert file.first_problem == "odd" and file.line_of(1) == 3
    assert len(RowFile(path, cache_dir="")) == 30  # the index of the other variant is another one


@pytest.mark.parametrize("end", ['{"query": "cut', '"query": 1}', "nothing"])
def test_cut_off_line_is_found_when_the_index_is_built(tmp_path, write_lines, end):
    path = write_lines(tmp_path / "x.jsonl", ["{1}", "", end])
    with pytest.raises(ValueError, match=r"x.jsonl, line 3: the line is not a JSON object or list.*cut off"):
        RowFile(path, cache_dir="")
    assert not [entry for entry in (tmp_path / ".tdro_hpc").iterdir() if entry.is_dir()]


def test_file_without_line_ends_says_how_to_make_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(rowfile, "BLOCK_BYTES", 64)
    monkeypatch.setattr(rowfile, "LONGEST_LINE_BYTES", 256)
    (tmp_path / "x.jsonl").write_text("[" + "{}," * 200 + "{}]")
    with pytest.raises(ValueError, match="line 1: no line end.*jq"):
        RowFile(tmp_path / "x.jsonl", cache_dir="")


def test_read_only_folder_leaves_the_index_in_the_home_cache(tmp_path, write_lines, home):
    path = write_lines(tmp_path / "data" / "x.jsonl", ["{1}"])
    path.parent.chmod(0o555)
    try:
        file = RowFile(path, cache_dir="")
        assert file.index.parent == home / ".cache" / "tdro_hpc"
        assert [entry.name for entry in path.parent.iterdir()] == ["x.jsonl"] and rows_of(file) == [b"{1}"]
    finally:
        path.parent.chmod(0o755)


def test_files_of_one_name_do_not_meet_in_a_shared_cache(tmp_path, write_lines):
    cache = str(tmp_path / "cache")
    files = [RowFile(write_lines(tmp_path / name / "x.jsonl", [name]), cache_dir=cache) for name in ("{a}", "{b}")]
    assert [rows_of(file) for file in files] == [[b"{a}"], [b"{b}"]]
    assert all(file.index.is_dir() for file in files)
    shutil.rmtree(cache)


def test_offsets_are_int64_pairs_on_disk(tmp_path, write_lines):
    file = RowFile(write_lines(tmp_path / "x.jsonl", ["{1}", "{22}"]), cache_dir="")
    offsets = np.load(file.index / "offsets.npy")
    assert offsets.dtype == np.int64 and offsets.tolist() == [[0, 3], [4, 8]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_million_rows_need_little_memory_and_are_indexed_once(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"query": "row {row}"}}\n' for row in range(1_000_000))
    command = [sys.executable, "-c", MILLION, str(path)]
    root = Path(__file__).parents[2]
    answers = [subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60) for _ in range(2)]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr + answers[1].stderr
    (rows, peak, made), (_, _, found) = (answer.stdout.split() for answer in answers)
    assert rows == "1000000" and int(peak) < 300_000  # kB
    assert made == found  # the second opening read the index of the first
