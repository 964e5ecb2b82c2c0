"""The functions of torch_core.py as operators, which torch.compile takes whole, and the shapes of their results.

The tiles depend on the sizes of the groups, so a compiler could not follow them.
"""

import torch
from torch import Tensor

from tdro_hpc.losses import torch_core

Argument = Tensor | float | bool | None

forward = torch.library.custom_op("tdro_hpc::torch_infonce_forward", torch_core.forward, mutates_args=())
backward = torch.library.custom_op("tdro_hpc::torch_infonce_backward", torch_core.backward, mutates_args=())
forward_backward = torch.library.custom_op(
    "tdro_hpc::torch_infonce_forward_backward", torch_core.forward_backward, mutates_args=()
)


def forward_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor]:
    """What forward gives, without values. The arguments of each are those of the function of its name."""
    rows = queries.new_empty(len(queries), dtype=_dtype_of_sums(queries))
    symmetric = rest[-1]
    sums = torch.empty_like(rows, dtype=torch.float64)
    return rows, sums, sums.new_empty(len(documents) if symmetric else 0)


def backward_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor]:
    """What backward gives, without values."""
    dtype = _dtype_of_sums(queries)
    return queries.new_empty(queries.shape, dtype=dtype), documents.new_empty(documents.shape, dtype=dtype)


def forward_backward_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor]:
    """What forward_backward gives, without values."""
    losses = queries.new_empty(len(queries), dtype=_dtype_of_sums(queries))
    return losses, *backward_shapes(queries, documents)


def _dtype_of_sums(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


forward.register_fake(forward_shapes)
backward.register_fake(backward_shapes)
forward_backward.register_fake(forward_backward_shapes)
