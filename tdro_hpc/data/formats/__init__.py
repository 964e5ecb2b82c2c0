"""Every format a task can declare: how its rows are read, and the short function that makes a Record of one.

A new format is a converter and a line in CONVERTERS (and its name in config.schema.FORMATS).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tdro_hpc.data.formats.folders import beir_files, msmarco_files
from tdro_hpc.data.formats.joined import BEIR_EXAMPLE, MSMARCO_EXAMPLE, JoinedRows, joined_record
from tdro_hpc.data.formats.rows import (
    LLM_EMBEDDER_EXAMPLE,
    PAIRS_EXAMPLE,
    TDRO_EXAMPLE,
    llm_embedder_record,
    pairs_record,
    tdro_record,
)
from tdro_hpc.data.record import Record
from tdro_hpc.data.rowfile import RowFile


class Rows(Protocol):
    """What a format reads from: raw rows by number, and what to say about them."""

    path: Path
    skipped_rows: int
    skipped_lines: list[int]  # the first ones
    first_problem: str

    def __len__(self) -> int: ...
    def raw(self, row: int) -> Any: ...
    def place(self, row: int) -> str: ...


class JsonRows:
    """Rows of a file with one JSON value a line."""

    def __init__(self, path: Path, *, cache_dir: str, check: Callable[[Any], object] | None, variant: str) -> None:
        def check_line(line: bytes) -> object:
            return check(parsed(line)) if check else None

        self._file = RowFile(path, cache_dir=cache_dir, check=check_line if check else None, variant=variant)
        self.path = self._file.path
        self.skipped_rows = self._file.skipped_rows
        self.skipped_lines = self._file.skipped_lines
        self.first_problem = self._file.first_problem

    def __len__(self) -> int:
        return len(self._file)

    def raw(self, row: int) -> Any:
        """The parsed JSON value of a row."""
        return parsed(self._file.read(row))

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, line {self._file.line_of(row)}"


@dataclass(frozen=True)
class Format:
    """One format: how it is read, converted and shown."""

    convert: Callable[[Any], Record]  # one raw row; ValueError says what is wrong with it
    example: str  # a row, for messages and docs
    open: Callable[..., Rows]  # (path, cache_dir=, check=, variant=)


def _open_beir(path: Path, **options: Any) -> Rows:
    return JoinedRows(beir_files(path), **options)


def _open_msmarco(path: Path, **options: Any) -> Rows:
    return JoinedRows(msmarco_files(path), **options)


CONVERTERS: dict[str, Format] = {
    "tdro": Format(tdro_record, TDRO_EXAMPLE, JsonRows),
    "llm_embedder": Format(llm_embedder_record, LLM_EMBEDDER_EXAMPLE, JsonRows),
    "pairs": Format(pairs_record, PAIRS_EXAMPLE, JsonRows),
    "beir": Format(joined_record, BEIR_EXAMPLE, _open_beir),
    "msmarco": Format(joined_record, MSMARCO_EXAMPLE, _open_msmarco),
}


def parsed(line: bytes) -> Any:
    """The JSON value of a line; ValueError in words."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON: {error.msg} at character {error.pos + 1}") from None


def formats_that_fit(raw: Any) -> list[str]:
    """Names of the one-file formats whose converter takes this row: a hint when the declared one does not."""
    names = []
    for name, candidate in CONVERTERS.items():
        try:
            if candidate.open is JsonRows:
                candidate.convert(raw)
                names.append(name)
        except ValueError:
            continue
    return names
