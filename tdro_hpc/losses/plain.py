"""The losses of float32 embeddings on the host without options, in as few steps as autograd in Python takes.

Below some hundred queries a call is Python for the most part, and a quarter of it would go into options that are not
used. Losses and gradients are in every bit what infonce.py gives, by the same code of the library; the weighted sum is
rounded once.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tdro_hpc.losses.autograd import multiplied, of_sides, once


def serves(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    temperature: Any,
    query_group: Tensor | None,
    document_group: Tensor | None,
    document_ids: Tensor | None,
    known_positive_ids: Tensor | None,
    false_negative_margin: float | None,
    keep_duplicates: bool,
    column_weights: Tensor | None,
    symmetric: bool,
) -> bool:
    """Whether these arguments of grouped_infonce, of any types, are as the functions below take them."""
    options = query_group is document_group is document_ids is known_positive_ids is column_weights is None
    if not options or false_negative_margin is not None or symmetric or torch.compiler.is_compiling():
        return False
    if not (type(queries) is type(documents) is Tensor and type(temperature) is float):
        return False
    shape, columns = queries.shape, documents.shape
    return (
        0 < temperature < math.inf
        and queries.dtype is documents.dtype is torch.float32
        and len(shape) == len(columns) == 2
        and shape[1] == columns[1] > 0
        and queries.is_cpu
        and documents.is_cpu
        and queries.is_contiguous()
        and documents.is_contiguous()
        and (queries.requires_grad or documents.requires_grad)
        and torch.is_grad_enabled()
        and _is_list(positives, torch.int64, shape[0])
    )


def serves_weights(row_weights: Tensor, queries: Tensor) -> bool:
    """Whether PlainWeighted takes these weights."""
    return _is_list(row_weights, torch.float32, queries.shape[0]) and not row_weights.requires_grad


def _is_list(values: Any, dtype: torch.dtype, count: int) -> bool:
    if not isinstance(values, Tensor):
        return False
    return values.dtype is dtype and values.shape == (count,) and values.is_cpu and values.is_contiguous()


class PlainLosses(torch.autograd.Function):
    """Losses [rows]. Forward keeps exponentials where they are few."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, documents: Tensor, call: tuple[Tensor, float, int]) -> Tensor:
        positives, *ctx.options = call
        operator = torch.ops.tdro_hpc.infonce_plain_losses.default
        losses, *found = operator(queries, documents, positives, *ctx.options)
        ctx.save_for_backward(queries, documents, positives, *found)
        return losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_queries, of_documents, _ = ctx.needs_input_grad
        operator = torch.ops.tdro_hpc.infonce_plain_losses_backward.default
        gradients = operator(*ctx.saved_tensors, upstream, *ctx.options, of_queries, of_documents)
        return *of_sides(ctx, list(gradients), torch.float32), None


class PlainWeighted(torch.autograd.Function):
    """The sum of the weighted losses [], and these losses [rows]. Forward forms the gradients of the sum."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, documents: Tensor, row_weights: Tensor, call: tuple[Tensor, float, int]
    ) -> tuple[Tensor, Tensor]:
        positives, *ctx.options = call
        total, losses, ctx.gradients = _weighted(ctx, queries, documents, positives, row_weights)
        ctx.save_for_backward(queries, documents, positives, row_weights)  # not the gradients: see of_sides
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return total, losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:  # nothing was asked of the total
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # the graph was kept, and the gradients of the first backward are the caller's
            _, _, gradients = _weighted(ctx, *ctx.saved_tensors)
        return *of_sides(ctx, multiplied(gradients, upstream), torch.float32), None, None


def _weighted(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    of_queries, of_documents, _, _ = ctx.needs_input_grad
    operator = torch.ops.tdro_hpc.infonce_plain_weighted.default
    total, losses, *gradients = operator(*tensors, *ctx.options, of_queries, of_documents)
    return total, losses, gradients
