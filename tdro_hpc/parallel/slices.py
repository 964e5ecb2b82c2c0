"""How an engine names the tensors of its state: each whole, or as one slice of a whole that other ranks complete.

Says nothing of files: training/checkpoint.py writes what engines hand out here and hands it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Rows start .. start + tensor.shape[dim] along `dim` of a tensor that is of `shape` in all.

    The slices of one name that all ranks write cover the whole tensor, each row once.
    """

    tensor: Tensor  # of `shape` but along `dim`
    shape: tuple[int, ...]  # of the whole tensor
    dim: int  # counted from 0
    start: int

    def __post_init__(self) -> None:
        assert 0 <= self.dim < len(self.shape) == self.tensor.ndim, f"{self} has other dimensions than its whole"
        others = [size for dim, size in enumerate(self.shape) if dim != self.dim]
        assert others == [size for dim, size in enumerate(self.tensor.shape) if dim != self.dim], f"{self} does not fit"
        assert 0 <= self.start and self.stop <= self.shape[self.dim], f"{self} ends outside of its whole"

    @property
    def stop(self) -> int:
        """Row after the last one."""
        return self.start + self.tensor.shape[self.dim]

    def __repr__(self) -> str:
        size = self.tensor.shape[self.dim] if self.dim < self.tensor.ndim else "?"
        return f"Slice({list(self.tensor.shape)}: {size} from {self.start} of dim {self.dim} of {list(self.shape)})"


class StoredTensors(Protocol):
    """Tensors by name, whole or in part, read when they are asked for; state["tensors"] of a load_state_dict."""

    def __contains__(self, name: str) -> bool: ...

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, on the host."""
        ...

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop along `dim` of the whole tensor, on the host."""
        ...


class WholeTensors:
    """Whole tensors that are in memory already, as StoredTensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop along `dim`; shares memory with the whole."""
        return self._tensors[name].narrow(dim, start, stop - start)
