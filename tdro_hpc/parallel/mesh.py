"""The ranks of a stage as a grid of three axes (pipeline, data, tensor), and the groups along them.

Ranks of one data index read the same rows: together they are one replica of the model. The order of the axes is that of
DeepSpeed's three-dimensional topology, so tensor-parallel ranks are neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes."""

    pipeline_size: int
    data_size: int
    tensor_size: int

    def place(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) index of a rank."""
        rest, tensor = divmod(rank, self.tensor_size)
        pipeline, data = divmod(rest, self.data_size)
        return pipeline, data, tensor

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        """The rank at a place."""
        return (pipeline * self.data_size + data) * self.tensor_size + tensor

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same part of the model."""
        places = product(range(self.pipeline_size), range(self.tensor_size))
        return [[self.rank(p, d, t) for d in range(self.data_size)] for p, t in places]

    def replica_groups(self) -> list[list[int]]:
        """Ranks that read the same rows, in the order of the pipeline."""
        places = [(p, t) for p in range(self.pipeline_size) for t in range(self.tensor_size)]
        return [[self.rank(p, d, t) for p, t in places] for d in range(self.data_size)]

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share each matrix of the same layers."""
        places = product(range(self.pipeline_size), range(self.data_size))
        return [[self.rank(p, d, t) for t in range(self.tensor_size)] for p, d in places]


def mesh_of(world: int, *, pipeline_size: int = 1, tensor_size: int = 1) -> Mesh:
    """The mesh of `world` ranks; the data axis takes what the others leave.

    raises ValueError if they leave a fraction
    """
    replica = pipeline_size * tensor_size
    if world % replica:
        fitting = ", ".join(str(replica * times) for times in (1, 2, 4))
        raise ValueError(
            f"{world} ranks cannot hold copies of a model of parallel.pp={pipeline_size} x parallel.tp={tensor_size} "
            f"= {replica} ranks. Start {fitting} ... ranks (cluster.nodes x cluster.gpus_per_node), or set other sizes."
        )
    return Mesh(pipeline_size, world // replica, tensor_size)


@dataclass(frozen=True)
class Groups:
    """The groups that this rank is in; None = the default group of all ranks, or no group at all."""

    data: dist.ProcessGroup | None = None
    replica: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None


def build_groups(mesh: Mesh, rank: int) -> Groups:
    """Groups along the axes. All ranks call it together, once."""
    if mesh.pipeline_size * mesh.tensor_size == 1:
        return Groups()

    def own(groups: Callable[[], list[list[int]]]) -> dist.ProcessGroup:
        # Every rank has to call new_group for every group, in the same order.
        made = [(ranks, dist.new_group(ranks)) for ranks in groups()]
        return next(group for ranks, group in made if rank in ranks)

    return Groups(own(mesh.data_groups), own(mesh.replica_groups), own(mesh.tensor_groups))
