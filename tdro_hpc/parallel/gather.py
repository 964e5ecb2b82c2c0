"""Rows of every data rank put together, in rank order, with or without gradient; or handed on from rank to rank.

Ranks may bring different numbers of rows. The backward of `gather_rows` sums what all ranks ask of a row and hands it
to the rank that owns it: no factor of the number of ranks anywhere. Averaging the parameters' gradients over ranks is
then exact.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdro_hpc.parallel.process import data_group, group_device, group_rank, group_size


def rows_of_ranks(num_rows: int) -> list[int]:
    """Number of rows that each rank brings, in rank order. All ranks call it together."""
    if group_size() == 1:
        return [num_rows]
    mine = torch.tensor([num_rows], device=group_device())
    sizes = [torch.empty_like(mine) for _ in range(group_size())]
    dist.all_gather(sizes, mine, group=data_group())
    return torch.cat(sizes).tolist()  # the collectives below need the sizes on the host


def gather_rows(tensor: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Rows of all ranks, in rank order, differentiable. All ranks call it together.

    tensor   [rows, ...]        rows may differ between ranks, the rest may not
    sizes    rows_of_ranks(rows), where it is already known
    returns  [sum of rows, ...] on the device of `tensor`; the tensor itself for one rank
    """
    if group_size() == 1:
        return tensor
    sizes = sizes if sizes is not None else rows_of_ranks(len(tensor))
    return _GatherRows.apply(tensor, sizes)


def gather_values(tensor: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Rows of all ranks without gradient, any type; shapes as in `gather_rows`."""
    if group_size() == 1:
        return tensor.detach()
    return _gather(tensor.detach(), sizes if sizes is not None else rows_of_ranks(len(tensor)))


def gather_ids(ids: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Integer rows of all ranks, shapes as in `gather_rows`."""
    assert not ids.is_floating_point(), "ids are integers; gather_values takes floats"
    return gather_values(ids, sizes)


def pass_on(going: list[Tensor], coming: list[Tensor], *, tag: int) -> list[dist.Work]:
    """Begin to send to the next rank and to receive from the one before, round the ring. All ranks call it together.

    going, coming  contiguous, on group_device(), as many of the same types on all ranks; `coming` in the shapes that
                   the rank before sends. Neither may be touched before each of the results has been waited for
    tag            messages that are under way together differ in it by at least their number
    """
    rank, world = group_rank(), group_size()
    if world == 1:
        for own, copy in zip(going, coming, strict=True):
            copy.copy_(own)
        return []
    ring = data_group()

    def message(move: Callable[..., Any], tensor: Tensor, to: int, i: int) -> dist.P2POp:
        return dist.P2POp(move, tensor, group=ring, tag=tag + i, group_peer=to % world)

    sends = [message(dist.isend, tensor, rank + 1, i) for i, tensor in enumerate(going)]
    receives = [message(dist.irecv, tensor, rank - 1, i) for i, tensor in enumerate(coming)]
    return dist.batch_isend_irecv([*sends, *receives])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather(tensor, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_own_rows(gradient, ctx.sizes), None


def _gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    assert sizes[group_rank()] == len(tensor), f"{len(tensor)} rows, but {sizes} were announced"
    mine = _padded(tensor.to(group_device()), max(sizes))
    blocks = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(blocks, mine, group=data_group())
    return torch.cat([block[:rows] for block, rows in zip(blocks, sizes, strict=True)]).to(tensor.device)


def _sum_own_rows(gradient: Tensor, sizes: list[int]) -> Tensor:
    """Rows of this rank of the sum over ranks of `gradient` [sum of sizes, ...]."""
    rank, everything = group_rank(), gradient.to(group_device())
    if dist.get_backend() == "gloo":  # has no reduce-scatter in some of the supported versions of torch
        total = everything.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=data_group())
        return total.split(sizes)[rank].to(gradient.device)
    return _reduce_scatter(everything, sizes).to(gradient.device)


def _reduce_scatter(everything: Tensor, sizes: list[int]) -> Tensor:
    blocks = [_padded(block, max(sizes)) for block in everything.split(sizes)]
    own = torch.empty_like(blocks[0])
    dist.reduce_scatter(own, blocks, group=data_group())
    return own[: sizes[group_rank()]]


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """Contiguous rows with zeros below: collectives want equal shapes. Nobody reads the padding of a shorter rank."""
    missing = rows.new_zeros(num_rows - len(rows), *rows.shape[1:])
    return torch.cat([rows, missing]) if len(missing) else rows.contiguous()
