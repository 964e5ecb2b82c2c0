"""A file of lines and a key in, the lines with that key out: texts of a corpus by id, judgements by query.

Kept on disk and memory-mapped: 24 bytes for each stretch of neighbouring lines with one key (64-bit hash of the key,
start, end), sorted by hash. A file grouped by its key, as qrels and run files are, has one stretch a key.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdro_hpc.data.derived import derived_folder, stamp_of
from tdro_hpc.data.rowfile import line_at, line_blocks, plain_file

logger = logging.getLogger(__name__)

INDEX_VERSION = "1"
LEADING_ID = re.compile(rb'\{"_id":\s*"([^"\\]+)"')


def fields_of(line: bytes) -> list[str]:
    """Columns of a line: between tabs where it has any (ids may then hold spaces), else between spaces."""
    return line.decode().split("\t") if b"\t" in line else line.decode().split()


def first_field(line: bytes) -> str:
    """Text before the first tab, or before the first space of a line without tabs: the key of a table's line."""
    return line.split(b"\t" if b"\t" in line else None, 1)[0].decode()


def json_id(line: bytes) -> str:
    """The `_id` of a BEIR line."""
    leading = LEADING_ID.match(line)  # five times faster than parsing a long text for its id
    if leading:
        return leading.group(1).decode()
    value = json.loads(line)
    if not isinstance(value, dict) or "_id" not in value:
        raise ValueError('a JSON object with "_id" is expected')
    return str(value["_id"])


KEYS: dict[str, Callable[[bytes], str]] = {"first_field": first_field, "json_id": json_id}


def hash_of(key: str) -> int:
    """Signed 64-bit hash of a key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


class KeyedFile:
    """Lines of a plain or packed file by key. Can be pickled and forked.

    key  name in KEYS of the function that finds the key of a line
    """

    def __init__(self, path: Path, *, cache_dir: str, key: str) -> None:
        self.path, cache_dir = plain_file(path, cache_dir=cache_dir)
        self.key = key
        self.stamp = stamp_of(self.path)
        self.index = derived_folder(
            self.path,
            f"{key}-v{INDEX_VERSION}.keys",
            stamp=self.stamp,
            cache_dir=cache_dir,
            build=lambda folder: build_keys(self.path, folder, key_of=KEYS[key]),
        )
        self._open()

    def _open(self) -> None:
        # asarray: still mapped; slices of a memmap object took 40 % of the time of a row with 100 documents.
        self._hashes = np.asarray(np.load(self.index / "hashes.npy", mmap_mode="r"))  # int64 [stretches], ascending
        self._places = np.asarray(np.load(self.index / "places.npy", mmap_mode="r"))  # int64 [stretches, 2]
        self._handle = self.path.open("rb", buffering=0)
        self._process = os.getpid()

    @property
    def places_in_order(self) -> np.ndarray:
        """int64 [stretches, 2], start and end byte of each stretch, in the order of the file."""
        return self._places[np.argsort(self._places[:, 0])]

    def lines(self, keys: Sequence[str]) -> list[list[bytes]]:
        """Lines of each key, in the order of the file; an empty list for a key that the file does not have."""
        hashes = np.array([hash_of(key) for key in keys], np.int64)
        first = np.searchsorted(self._hashes, hashes, side="left").tolist()
        last = np.searchsorted(self._hashes, hashes, side="right").tolist()
        key_of = KEYS[self.key]
        found: list[list[bytes]] = []
        for key, low, high in zip(keys, first, last, strict=True):
            lines = [line for start, end in self._places[low:high].tolist() for line in self.stretch(start, end)]
            found.append([line for line in lines if key_of(line) == key])  # two keys may share a hash
        return found

    def stretch(self, start: int, end: int) -> list[bytes]:
        """Lines between two bytes, blank ones left out."""
        if os.getpid() != self._process:
            self._open()
        block = os.pread(self._handle.fileno(), end - start, start)
        if len(block) != end - start:
            raise OSError(f"{self.path} became shorter while it was in use. Start again with the file at rest.")
        return [line.rstrip(b"\r") for line in block.split(b"\n") if line.strip()]

    def line_at(self, offset: int) -> int:
        """Line number, from 1, of a byte. Reads the file up to there: for messages only."""
        return line_at(self.path, offset)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_hashes", "_places", "_handle", "_process")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def build_keys(path: Path, folder: Path, *, key_of: Callable[[bytes], str]) -> None:
    """Write hashes.npy and places.npy of a plain file into `folder`; ValueError names a line without a key."""
    say = logger.info if path.stat().st_size > 50_000_000 else logger.debug  # what takes no time needs no line
    say("indexing the ids of %s (%.1f MB)", path, path.stat().st_size / 1e6)
    parts = [np.zeros((0, 3), np.int64)]
    previous = None
    for block, offset, starts, ends, first_line in line_blocks(path):
        stretches: list[tuple[int, int, int]] = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            try:
                key = key_of(block[start:end])
            except ValueError as error:
                line = first_line + block.count(b"\n", 0, start)
                raise ValueError(f"{path}, line {line}: the line has no id: {error}.") from error
            if key == previous and stretches:
                stretches[-1] = (stretches[-1][0], stretches[-1][1], offset + end)
            else:
                stretches.append((hash_of(key), offset + start, offset + end))
            previous = key
        parts.append(np.array(stretches, np.int64).reshape(-1, 3))
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 0], kind="stable")]
    np.save(folder / "hashes.npy", np.ascontiguousarray(table[:, 0]))
    np.save(folder / "places.npy", np.ascontiguousarray(table[:, 1:]))
