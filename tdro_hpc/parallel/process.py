"""A rank starts and ends here, with the small collectives that steer a run. Everything works without a group too.

The process group is torch's default one: every rank of it is a data rank.
"""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tdro_hpc.config.schema import ParallelConfig


@dataclass(frozen=True)
class Process:
    """The place of this process among those of a stage."""

    data_rank: int  # 0 .. data_size - 1: which rows it reads
    data_size: int  # processes that read different rows
    local_rank: int  # 0 .. : its place on its node, and the index of its GPU
    device: torch.device  # where the encoder lives


def start_process(
    config: ParallelConfig,
    *,
    rank: int,
    world: int,
    local_rank: int,
    rendezvous: str,
    local_world: int | None = None,
) -> Process:
    """Join the group of `world` ranks; one rank alone needs none. Also sets the device and the number of CPU threads.

    rank         0 .. world - 1
    local_rank   0 .. on this node: GPU index under nccl
    rendezvous   file:///path/on/shared/disk or tcp://host:port, the same on all ranks; not looked at for one rank
    local_world  ranks on this node, for the share of CPU threads; None = all ranks are on this node
    returns      the device is CUDA under nccl, else the CPU: backend=gloo keeps the work off the GPUs
    raises       ValueError if the backend or the GPU is not there, or the rendezvous cannot be read
    """
    assert 0 <= rank < world, f"rank {rank} is not one of {world} ranks"
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
    return Process(data_rank=rank, data_size=world, local_rank=local_rank, device=device)


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
    if dist.is_initialized():
        # Data-parallel wrappers sit in reference cycles and hold the group: what is left of it when the
        # interpreter ends takes its threads down in an order that now and then aborts the process.
        gc.collect()
        dist.destroy_process_group()


def group_size() -> int:
    """Number of ranks in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_rank() -> int:
    """Place of this process in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def group_device() -> torch.device:
    """Device that tensors of a collective must be on."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all. All ranks call it together."""
    if group_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=group_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise sum over ranks, a new tensor on the device of `tensor`, without gradient. All ranks call it."""
    total = tensor.detach().to(group_device(), copy=True)
    if group_size() > 1:
        dist.all_reduce(total)
    return total.to(tensor.device)


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """The values that rank 0 has, a new tensor on the device of `tensor`, without gradient. All ranks call it."""
    values = tensor.detach().to(group_device(), copy=True).contiguous()
    if group_size() > 1:
        dist.broadcast(values, src=0)
    return values.to(tensor.device)


def wait_for_all() -> None:
    """Return when every rank has come here."""
    # A sum instead of a barrier: nccl's barrier has to guess a device.
    any_rank(False)
