"""A file of lines in, any line by its row number out. Only byte offsets are kept, on disk and memory-mapped."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdro_hpc.data.archives import BYTE_ORDER_MARK, is_packed, unpacked
from tdro_hpc.data.derived import derived_folder, stamp_of

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 256 << 20
SKIPPED_LINES_KEPT = 10  # line numbers of skipped rows that the index remembers
INDEX_VERSION = "1"  # part of the file name: raise it when offsets would come out differently
JSON_OPENINGS, JSON_ENDINGS = b"{[", b"}]"
LINE_END, CARRIAGE_RETURN = 10, 13

Check = Callable[[bytes], object]  # raises ValueError on a bad row


def plain_file(path: Path, *, cache_dir: str) -> tuple[Path, str]:
    """(file of plain lines, cache_dir for what is derived from it); an archive is unpacked first."""
    if is_packed(path):
        return unpacked(path, cache_dir=cache_dir), ""  # "" = indexes lie beside the unpacked file and go with it
    return path, cache_dir


def line_blocks(path: Path) -> Iterator[tuple[bytes, int, np.ndarray, np.ndarray, int]]:
    """(block of whole lines, its byte offset, starts, ends, number of its first line), 8 MiB or more at a time.

    starts, ends  int64 [lines], inside the block; a line is block[start:end], without its line end
    Blank lines are left out of starts and ends, but they count in the line numbers.
    """
    offset, first_line, tail = 0, 1, b""
    with path.open("rb", buffering=0) as handle:
        while True:
            read = handle.read(BLOCK_BYTES)
            block = tail + read
            cut = len(block) if not read else block.rfind(b"\n") + 1
            if cut == 0 and len(block) > LONGEST_LINE_BYTES:
                raise ValueError(
                    f"{path}, line {first_line}: no line end in {len(block) >> 20} MiB. One row a line is expected; "
                    "a JSON list becomes rows with: jq -c '.[]' FILE > FILE.jsonl"
                )
            if cut:
                starts, ends, num_lines = _lines_of(block[:cut], is_first=offset == 0)
                yield block[:cut], offset, starts, ends, first_line
                offset, first_line = offset + cut, first_line + num_lines
            if not read:
                return
            tail = block[cut:]


def _lines_of(block: bytes, *, is_first: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Starts and ends of the lines that are not blank, and the number of all lines."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == LINE_END)
    if data[-1] != LINE_END:  # the last line of a file may have none
        ends = np.append(ends, len(block))
    starts = np.concatenate(([0], ends[:-1] + 1))
    if is_first and block.startswith(BYTE_ORDER_MARK):
        starts[0] = len(BYTE_ORDER_MARK)
    num_lines = len(starts)
    ends = ends - ((ends > starts) & (data[ends - 1] == CARRIAGE_RETURN))
    blank = ends <= starts
    spaced = np.flatnonzero(~blank & (data[np.minimum(starts, len(block) - 1)] <= 32))
    blank[[row for row in spaced if not block[starts[row] : ends[row]].strip()]] = True
    return starts[~blank], ends[~blank], num_lines


class RowFile:
    """Rows of one file, plain or packed. Can be pickled and forked: each process opens the file for itself.

    path       JSONL file, .gz or .tar.gz
    cache_dir  see derived.derived_folder
    check      None: rows are told apart only by their ends, which takes a second for each GB; a row that does not open
               and close like a JSON value raises ValueError. Else every row is checked once, when the index is built,
               and those on which it raises ValueError are left out and counted.
    variant    word for the check: the same file checked in another way has another index
    """

    def __init__(self, path: Path, *, cache_dir: str, check: Check | None = None, variant: str = "raise") -> None:
        self.path, cache_dir = plain_file(path, cache_dir=cache_dir)
        kind = f"{variant}-v{INDEX_VERSION}.rows"
        self._stamp = stamp_of(self.path)
        self.index = derived_folder(
            self.path,
            kind,
            stamp=self._stamp,
            cache_dir=cache_dir,
            build=lambda folder: build_index(self.path, folder, check=check),
        )
        facts = json.loads((self.index / "facts.json").read_text())
        self.skipped_rows: int = facts["skipped_rows"]
        self.skipped_lines: list[int] = facts["skipped_lines"]
        self.first_problem: str = facts["first_problem"]
        status = self.path.stat()
        self._seen = (status.st_size, status.st_mtime_ns)
        self._open()

    def _open(self) -> None:
        self._offsets = np.asarray(np.load(self.index / "offsets.npy", mmap_mode="r"))  # int64 [rows, 2], start and end
        self._handle = self.path.open("rb", buffering=0)
        self._process = os.getpid()
        status = os.fstat(self._handle.fileno())
        if (status.st_size, status.st_mtime_ns) != self._seen:
            raise OSError(f"{self.path} changed while it was in use. Start again with the file at rest.")

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, row: int) -> bytes:
        """The bytes of one row, without the line end."""
        if not 0 <= row < len(self._offsets):
            raise IndexError(f"row {row} of {self.path}, which has {len(self._offsets)} rows")
        if os.getpid() != self._process:
            self._open()
        start, end = self._offsets[row].tolist()
        line = os.pread(self._handle.fileno(), end - start, start)
        if len(line) != end - start:
            raise OSError(f"{self.path} became shorter while it was in use. Start again with the file at rest.")
        return line

    def line_of(self, row: int) -> int:
        """Line number of a row, from 1, as an editor shows it. Reads the file up to there: for messages only."""
        return line_at(self.path, int(self._offsets[row, 0]))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_offsets", "_handle", "_process")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def line_at(path: Path, offset: int) -> int:
    """Number, from 1, of the line that holds the byte at `offset`."""
    line = 1
    with path.open("rb") as handle:
        while offset > 0:
            block = handle.read(min(BLOCK_BYTES, offset))
            line += block.count(b"\n")
            offset -= len(block)
    return line


def build_index(path: Path, folder: Path, *, check: Check | None) -> None:
    """Write offsets.npy (int64 [rows, 2]) and facts.json of a plain file into `folder`."""
    say = logger.info if path.stat().st_size > 50_000_000 else logger.debug  # what takes no time needs no line
    say("indexing %s (%.1f MB)", path, path.stat().st_size / 1e6)
    parts = [np.zeros((0, 2), np.int64)]
    skipped: list[int] = []
    first_problem = ""
    num_skipped = 0
    for block, offset, starts, ends, first_line in line_blocks(path):
        if check is None:
            _require_json_ends(path, block, starts, ends, first_line)
        else:
            problems = _problems(block, starts, ends, check)
            keep = np.ones(len(starts), bool)
            keep[list(problems)] = False
            for row, problem in problems.items():
                first_problem = first_problem or problem
                if len(skipped) < SKIPPED_LINES_KEPT:
                    skipped.append(first_line + block.count(b"\n", 0, starts[row]))
            num_skipped += len(problems)
            starts, ends = starts[keep], ends[keep]
        parts.append(np.stack([starts, ends], axis=1) + offset)
    np.save(folder / "offsets.npy", np.concatenate(parts))
    facts = {"skipped_rows": num_skipped, "skipped_lines": skipped, "first_problem": first_problem}
    (folder / "facts.json").write_text(json.dumps(facts))


def _require_json_ends(path: Path, block: bytes, starts: np.ndarray, ends: np.ndarray, first_line: int) -> None:
    """Raise on a line that cannot be a JSON object or list, judged by its first and last byte: finds cut-off files."""
    data = np.frombuffer(block, np.uint8)
    opens = np.isin(data[starts], np.frombuffer(JSON_OPENINGS, np.uint8))
    closes = np.isin(data[ends - 1], np.frombuffer(JSON_ENDINGS, np.uint8))
    for row in np.flatnonzero(~(opens & closes)).tolist():
        line = block[starts[row] : ends[row]].strip()
        if line[0] in JSON_OPENINGS and line[-1] in JSON_ENDINGS:  # spaces around it
            continue
        number = first_line + block.count(b"\n", 0, starts[row])
        raise ValueError(
            f"{path}, line {number}: the line is not a JSON object or list: it starts with {_shown(line[:40])} "
            f"and ends with {_shown(line[-20:])}. A file that was cut off ends like this. "
            "Repair it, or set data.on_bad_row=skip."
        )


def _shown(part: bytes) -> str:
    return repr(part.decode("utf-8", errors="backslashreplace"))


def _problems(block: bytes, starts: np.ndarray, ends: np.ndarray, check: Check) -> dict[int, str]:
    problems = {}
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        try:
            check(block[start:end])
        except ValueError as error:
            problems[row] = str(error)
    return problems
