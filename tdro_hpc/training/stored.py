"""Tensors of a checkpoint by name, put together from the slices that lie in the files of several ranks.

Reads what is asked for and no more; whether the files are those that were written is checked in checkpoint.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tdro_hpc.parallel.slices import Slice


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop of a tensor, in one file under the tensor's name."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where the rows of one tensor lie. A tensor without dimensions counts as one row."""

    dtype: str  # as torch names it: float32
    shape: tuple[int, ...]  # of the whole tensor
    dim: int  # that the rows are counted along
    pieces: tuple[Piece, ...]  # rising; they cover all rows, each once

    @property
    def num_rows(self) -> int:
        """Rows of the whole tensor."""
        return self.shape[self.dim] if self.shape else 1

    def as_json(self) -> dict[str, Any]:
        """What `layout_from_json` takes."""
        pieces = [[piece.file, piece.start, piece.stop] for piece in self.pieces]
        return {"dtype": self.dtype, "shape": list(self.shape), "dim": self.dim, "pieces": pieces}


def layout_from_json(value: Mapping[str, Any]) -> Layout:
    """The layout that `as_json` gave."""
    pieces = tuple(Piece(*piece) for piece in value["pieces"])
    return Layout(dtype=value["dtype"], shape=tuple(value["shape"]), dim=value["dim"], pieces=pieces)


def layout_in(file: str, value: Tensor | Slice) -> Layout:
    """Layout of a tensor of which `file` has this much."""
    if isinstance(value, Slice):
        tensor, shape, dim, start, stop = value.tensor, tuple(value.shape), value.dim, value.start, value.stop
    else:
        tensor, shape, dim, start = value, tuple(value.shape), 0, 0
        stop = shape[0] if shape else 1
    return Layout(str(tensor.dtype).removeprefix("torch."), shape, dim, (Piece(file, start, stop),))


def join_layouts(of_ranks: Iterable[Mapping[str, Layout]]) -> dict[str, Layout]:
    """Layout of every tensor, from what each rank wrote of it; the slices must cover each of them once."""
    found: dict[str, list[Layout]] = {}
    for layouts in of_ranks:
        for name, layout in layouts.items():
            found.setdefault(name, []).append(layout)
    return {name: _join(name, layouts) for name, layouts in sorted(found.items())}


def _join(name: str, layouts: list[Layout]) -> Layout:
    first = layouts[0]
    for other in layouts:
        same = (other.dtype, other.shape, other.dim) == (first.dtype, first.shape, first.dim)
        assert same, f"ranks disagree on the type, shape or dim of {name}: {first} and {other}"
    pieces = sorted((piece for layout in layouts for piece in layout.pieces), key=attrgetter("start", "stop"))
    end = 0
    for piece in pieces:
        assert piece.start == end, f"rows {end} to {piece.start} of {name} are written by no rank, or by two: {pieces}"
        end = piece.stop
    assert end == first.num_rows, f"rows {end} to {first.num_rows} of {name} are written by no rank: {pieces}"
    return Layout(first.dtype, first.shape, first.dim, tuple(pieces))


class StoredSlices:
    """Tensors in the files of `folder`, as parallel/slices.py's StoredTensors.

    layouts  of the tensors, by their names in the files
    prefix   of those that are given out, under their names without it
    """

    def __init__(self, folder: Path, layouts: Mapping[str, Layout], *, prefix: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        self._layouts = {
            name.removeprefix(prefix): layout for name, layout in layouts.items() if name.startswith(prefix)
        }
        self._opened: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._layouts

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._layouts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._layouts[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of its elements."""
        found = getattr(torch, self._layouts[name].dtype)
        assert isinstance(found, torch.dtype), f"{self._layouts[name].dtype} is no type of torch's"
        return found

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, on the host, in memory of its own: the file may be deleted while it is in use."""
        layout = self._layouts[name]
        if layout.shape:
            return self.part(name, layout.dim, 0, layout.num_rows)
        tensor: Tensor = self._slice(layout.pieces[0], name)[...]
        return tensor.clone()

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop along `dim`, on the host, in memory of its own; reads no other rows."""
        layout = self._layouts[name]
        assert 0 <= start <= stop <= layout.shape[dim], f"rows {start} to {stop} of {name}, {layout.shape} along {dim}"
        shape = [stop - start if i == dim else size for i, size in enumerate(layout.shape)]
        found = torch.empty(shape, dtype=self.dtype(name))
        for piece in layout.pieces:
            if dim == layout.dim:
                first, last = max(start, piece.start), min(stop, piece.stop)
                wanted, into = (first - piece.start, last - piece.start), (first - start, last - start)
            else:
                wanted, into = (start, stop), (piece.start, piece.stop)
            if wanted[0] < wanted[1]:
                rows = self._slice(piece, name)[tuple([slice(None)] * dim + [slice(*wanted)])]
                found.narrow(layout.dim, into[0], into[1] - into[0]).copy_(rows)
        return found

    def _slice(self, piece: Piece, name: str) -> Any:
        if piece.file not in self._opened:
            self._opened[piece.file] = safe_open(self._folder / piece.file, framework="pt", device="cpu")
        return self._opened[piece.file].get_slice(self._prefix + name)
