"""Vectors of a set of texts in, rows and blocks of them out. They may lie on disk: only what is asked for is read."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Embeddings:
    """Float32 vectors in one or several arrays, in an order of their own."""

    def __init__(self, parts: Sequence[np.ndarray], order: np.ndarray) -> None:
        """
        parts  arrays [rows, width], memory-mapped or not; one follows the other
        order  int64 [all rows], number of the text whose vector stands at each place
        """
        assert sum(len(part) for part in parts) == len(order), "one number for each vector"
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._order = order
        self._place_of = np.empty(len(order), np.int64)
        self._place_of[order] = np.arange(len(order))

    @classmethod
    def of_array(cls, vectors: np.ndarray) -> "Embeddings":
        """Vectors that are in memory, in the order of their texts."""
        return cls([np.ascontiguousarray(vectors, dtype=np.float32)], np.arange(len(vectors)))

    @property
    def num_rows(self) -> int:
        """Number of texts."""
        return len(self._order)

    @property
    def width(self) -> int:
        """Numbers of one vector."""
        return int(self._parts[0].shape[1]) if self._parts else 0

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors [len(numbers), width] of the texts with these numbers."""
        places = self._place_of[numbers]
        owners = np.searchsorted(self._starts, places, side="right") - 1
        vectors = np.empty((len(places), self.width), np.float32)
        for owner in np.unique(owners).tolist():
            inside = owners == owner
            vectors[inside] = self._parts[owner][places[inside] - self._starts[owner]]
        return vectors

    def blocks(self, max_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of the texts, their vectors), at most `max_rows` at a time, every text once."""
        for start in range(0, self.num_rows, max_rows):
            end = min(start + max_rows, self.num_rows)
            pieces = [
                part[max(start - first, 0) : end - first]
                for part, first in zip(self._parts, self._starts[:-1].tolist(), strict=True)
                if first < end and first + len(part) > start
            ]
            vectors = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            yield self._order[start:end], np.ascontiguousarray(vectors)


def read_note(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none or it was cut off, which means: nothing is done yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
