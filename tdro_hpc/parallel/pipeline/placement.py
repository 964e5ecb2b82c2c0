"""Which part of which parameter of the whole model a rank holds: the link between its modules and layout-free names."""

from dataclasses import dataclass

from torch import Tensor

from tdro_hpc.parallel.slices import Slice, StoredTensors


@dataclass(frozen=True)
class Placement:
    """A parameter of one rank as a part of the whole model."""

    weight: str  # name in the files of a Hugging Face model or adapter
    name: str  # name of the trained parameter in an engine's state, without `parameter.`
    shape: tuple[int, ...]  # of the whole
    dim: int | None = None  # along which it is split over tensor ranks; None = this rank has all of it
    start: int = 0  # this rank's first row along dim
    size: int = 0  # this rank's rows along dim
    partial: bool = False  # this rank's gradient is a share of a sum over tensor ranks
    adapter: bool = False  # a factor of a low-rank update

    def part_of(self, source: StoredTensors, name: str) -> Tensor:
        """This rank's part of a stored tensor of the same shape as the whole parameter."""
        if self.dim is None:
            return source[name]
        return source.part(name, self.dim, self.start, self.start + self.size)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the shape of the whole parameter."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.size)

    def labelled(self, own: Tensor) -> Tensor | Slice:
        """A tensor of the shape of this rank's part, as what it is of the whole."""
        return own if self.dim is None else Slice(own, self.shape, self.dim, self.start)
