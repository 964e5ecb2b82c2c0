"""What torch has to know of the compiled library's operators: shapes without values, and a derivative.

The losses of infonce.py bring their own autograd, which hands gradients over instead of computing them again. The
derivative here is for whoever calls torch.ops.tdro_hpc.infonce_forward, of which all others are made.
"""

from typing import Any

import torch
from torch import Tensor

from tdro_hpc.losses.torch_core import split_totals
from tdro_hpc.losses.torch_ops import Argument, backward_shapes, forward_backward_shapes, forward_shapes


def register() -> None:
    """Tell torch of all operators infonce_* that compute. Once a process, after the library is loaded."""
    shapes = {
        "infonce_forward": forward_shapes,
        "infonce_backward": backward_shapes,
        "infonce_forward_backward": forward_backward_shapes,
        "infonce_losses": _losses_shapes,
        "infonce_losses_backward": _losses_backward_shapes,
        "infonce_gradients": _gradients_shapes,
        "infonce_plain_weighted": _plain_weighted_shapes,
        "infonce_plain_losses": _plain_losses_shapes,
        "infonce_plain_losses_backward": _losses_backward_shapes,
    }
    for name, function in shapes.items():
        torch.library.register_fake(f"tdro_hpc::{name}", function)
    torch.library.register_autograd("tdro_hpc::infonce_forward", _backward, setup_context=_keep)


def _losses_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor]:
    rows = queries.new_empty(len(queries), dtype=torch.float32)
    return rows, torch.empty_like(rows), rows.new_empty(torch.library.get_ctx().new_dynamic_size())


def _losses_backward_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor]:
    of_queries, of_documents = rest[-2:]
    return _gradient_shape(queries, of_queries), _gradient_shape(documents, of_documents)


def _gradients_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = queries.new_empty(len(queries), dtype=torch.float32)
    return rows, torch.empty_like(rows), *_losses_backward_shapes(queries, documents, *rest)


def _plain_losses_shapes(queries: Tensor, documents: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, kept = _losses_shapes(queries, documents)
    return rows, rows.new_empty(2, len(rows)), kept


def _plain_weighted_shapes(
    queries: Tensor, documents: Tensor, *rest: Argument
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = queries.new_empty(len(queries), dtype=torch.float32)
    return rows.new_empty(()), rows, *_losses_backward_shapes(queries, documents, *rest)


def _gradient_shape(side: Tensor, asked: Argument) -> Tensor:
    return side.new_empty(len(side) if asked else 0, side.shape[1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Argument, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, margin, log_weights, symmetric = inputs
    ctx.save_for_backward(*tensors, log_weights, *output)
    ctx.margin, ctx.symmetric = margin, symmetric


def _backward(ctx: Any, of_scores: Tensor, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor | None, ...]:
    """A sum over exponentials asks of each score its share: the scores' own gradients are what backward forms."""
    *tensors, log_weights, scores, row_negatives, column_negatives = ctx.saved_tensors
    queries, documents, positives, given, temperature, *masks = tensors
    of_positives = torch.zeros_like(of_scores) if given is not None else of_scores
    shares: list[Tensor | None] = [*_shares(row_negatives, of_rows), of_positives.contiguous()]
    shares += _shares(column_negatives, of_columns) if ctx.symmetric else [None, None]
    of_queries, of_documents = torch.ops.tdro_hpc.infonce_backward(
        queries, documents, positives, scores, temperature, *masks, ctx.margin, log_weights, *shares
    )
    of_temperature = -(queries * of_queries).sum(dtype=temperature.dtype) / temperature
    gradients = of_queries.to(queries.dtype), of_documents.to(documents.dtype), None
    return *gradients, None if given is None else of_scores, of_temperature.to(temperature.device), *(None,) * 8


def _shares(sums: Tensor, upstream: Tensor) -> list[Tensor]:
    totals, gains = split_totals(sums, torch.float32)
    return [totals, (gains * upstream).float()]
