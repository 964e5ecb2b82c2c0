"""A rank starts and ends here, with the small collectives that steer a run. Everything works without a group too.

Two kinds of them: what steers a run (any_rank, broadcast_from_first, wait_for_all) is agreed by all ranks of torch's
default group; sums and gathers of rows run over the data group, whose ranks read different rows.
"""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tdro_hpc.config.schema import ParallelConfig
from tdro_hpc.parallel.mesh import Groups, build_groups, mesh_of

_groups = Groups()  # of the one process group that a process can be in


@dataclass(frozen=True)
class Process:
    """The place of this process among those of a stage."""

    data_rank: int  # 0 .. data_size - 1: which rows it reads
    data_size: int  # replicas of the model, which read different rows
    local_rank: int  # 0 .. : its place on its node, and the index of its GPU
    device: torch.device  # where the encoder lives
    pipeline_rank: int = 0  # 0 .. pipeline_size - 1: which layers it holds
    pipeline_size: int = 1
    tensor_rank: int = 0  # 0 .. tensor_size - 1: which part of each matrix it holds
    tensor_size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one rank that writes and says what all ranks have in common."""
        return self.data_rank == self.pipeline_rank == self.tensor_rank == 0


def start_process(
    config: ParallelConfig,
    *,
    rank: int,
    world: int,
    local_rank: int,
    rendezvous: str,
    local_world: int | None = None,
    meshed: bool = False,
) -> Process:
    """Join the group of `world` ranks; one rank alone needs none. Also sets the device and the number of CPU threads.

    rank         0 .. world - 1
    local_rank   0 .. on this node: GPU index under nccl
    rendezvous   file:///path/on/shared/disk or tcp://host:port, the same on all ranks; not looked at for one rank
    local_world  ranks on this node, for the share of CPU threads; None = all ranks are on this node
    meshed       whether the model is spread over ranks as config.pp and config.tp say; if not, every rank reads rows
    returns      the device is CUDA under nccl, else the CPU: backend=gloo keeps the work off the GPUs
    raises       ValueError if the backend or the GPU is not there, the rendezvous cannot be read, or the mesh does not
                 fit the number of ranks
    """
    assert 0 <= rank < world, f"rank {rank} is not one of {world} ranks"
    mesh = mesh_of(world, pipeline_size=config.pp, tensor_size=config.tp) if meshed else mesh_of(world)
    backend = backend_of(config)
    device = _device_of(backend, local_rank)
    torch.set_num_threads(config.threads_per_rank or max(1, _usable_cores() // (local_world or world)))
    if world > 1:
        if not rendezvous.startswith(("file://", "tcp://")):
            raise ValueError(
                f"The rendezvous is {rendezvous!r}; {world} ranks find each other through file:///path/on/shared/disk "
                "or tcp://host:port."
            )
        dist.init_process_group(
            backend,
            init_method=rendezvous,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=config.timeout_seconds),
            device_id=device if backend == "nccl" else None,
        )
    global _groups
    _groups = build_groups(mesh, rank)
    pipeline_rank, data_rank, tensor_rank = mesh.place(rank)
    return Process(
        data_rank=data_rank,
        data_size=mesh.data_size,
        local_rank=local_rank,
        device=device,
        pipeline_rank=pipeline_rank,
        pipeline_size=mesh.pipeline_size,
        tensor_rank=tensor_rank,
        tensor_size=mesh.tensor_size,
    )


def backend_of(config: ParallelConfig) -> str:
    """nccl or gloo: what parallel.backend says, auto being nccl where CUDA is.

    raises ValueError if nccl is asked for on a machine without CUDA
    """
    if config.backend == "nccl" and not torch.cuda.is_available():
        raise ValueError(
            "parallel.backend is nccl, but torch sees no CUDA device here. "
            "Set parallel.backend=gloo, or install a CUDA build of torch on a GPU node."
        )
    if config.backend != "auto":
        return config.backend
    return "nccl" if torch.cuda.is_available() else "gloo"


def _device_of(backend: str, local_rank: int) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"Local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}. "
            f"Set cluster.ranks_per_node={torch.cuda.device_count()}, or parallel.backend=gloo to train on the CPU."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _usable_cores() -> int:
    # The cores that Slurm or a container left to this process, not those that the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_process() -> None:
    """Leave the group, if there is one."""
    global _groups
    _groups = Groups()
    if dist.is_initialized():
        # Data-parallel wrappers sit in reference cycles and hold the group: what is left of it when the
        # interpreter ends takes its threads down in an order that now and then aborts the process.
        gc.collect()
        dist.destroy_process_group()


def data_group() -> dist.ProcessGroup | None:
    """Ranks that hold the same part of the model and read different rows; None = all ranks."""
    return _groups.data


def replica_group() -> dist.ProcessGroup | None:
    """Ranks that hold one model together and read the same rows; None = this rank alone."""
    return _groups.replica


def tensor_group() -> dist.ProcessGroup | None:
    """Ranks that share each matrix; None = this rank alone."""
    return _groups.tensor


def group_size() -> int:
    """Number of ranks in the data group; 1 without a group."""
    return dist.get_world_size(data_group()) if dist.is_initialized() else 1


def group_rank() -> int:
    """Place of this process in the data group; 0 without a group."""
    return dist.get_rank(data_group()) if dist.is_initialized() else 0


def world_size() -> int:
    """Number of all ranks; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def world_rank() -> int:
    """Place of this process among all ranks; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def group_device() -> torch.device:
    """Device that tensors of a collective must be on."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all. All ranks call it together."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=group_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise sum over data ranks, a new tensor on the device of `tensor`, without gradient. All ranks call it."""
    total = tensor.detach().to(group_device(), copy=True)
    if group_size() > 1:
        dist.all_reduce(total, group=data_group())
    return total.to(tensor.device)


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """The values that rank 0 has, a new tensor on the device of `tensor`, without gradient. All ranks call it."""
    values = tensor.detach().to(group_device(), copy=True).contiguous()
    if world_size() > 1:
        dist.broadcast(values, src=0)
    return values.to(tensor.device)


def wait_for_all() -> None:
    """Return when every rank has come here."""
    # A sum instead of a barrier: nccl's barrier has to guess a device.
    any_rank(False)
