"""Query and document embeddings in, one InfoNCE loss a row out: the [rows, columns] scores never exist.

Chooses between the compiled library (fused.py) and plain torch (torch_core.py), and tells autograd of both. With
x = logsumexp(scores of the negatives) - score of the positive, the loss is log(1 + e^x): it stays accurate when the
positive wins by far, and is exactly 0 for a row without negatives.
"""

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tdro_hpc.config.schema import LOSS_IMPLEMENTATIONS
from tdro_hpc.losses import fused, host, plain, torch_core, torch_ops
from tdro_hpc.losses.arguments import Problem, checked_arguments, checked_row_weights, refuse_positives_outside
from tdro_hpc.losses.autograd import multiplied, of_sides, once
from tdro_hpc.losses.tiles import groups_on_host
from tdro_hpc.losses.torch_core import SOFTPLUS_THRESHOLD, add_rows, excess_of, split_totals, temperature_gradient


def grouped_infonce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    query_group: Tensor | None = None,
    document_group: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_positive_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    keep_duplicates: bool = False,
    column_weights: Tensor | None = None,
    symmetric: bool = False,
    implementation: str = "auto",
    workspace_mb: int = 16,
) -> Tensor:
    """Loss of every row: -log of the share that its positive has in the softmax over its columns.

    queries [rows, width]        documents [columns, width]   any float types; scores and sums are float32 or wider
    positives                    [rows] int64: column of the positive, which always counts, even in another group
    temperature                  divides the scores q . d; > 0; a number, or a tensor [], which may require its gradient
    query_group, document_group  [rows], [columns] int64: a column counts for a row of its group; None = all count
    document_ids                 [columns] int64: columns with the id of the row's positive are not negatives
    known_positive_ids           [rows, known] int64: columns with these ids are not negatives; -1 = none
    false_negative_margin        columns with q . d > positive's - margin are not negatives; None = off
    keep_duplicates              true = document_ids serve known_positive_ids only
    column_weights               [columns] float, > 0: a negative counts that many times; not differentiated; None = 1
    symmetric                    true = mean of this loss and that of the row's positive against all rows it is a
                                 negative of
    implementation               fused = the compiled library, torch = plain torch, auto = fused where it serves
    workspace_mb                 what the library may use on a CPU beside the two gradients, in MiB; a quarter of their
                                 size if that is more. With more it computes fewer scores twice
    returns                      [rows] float32 (float64 for float64 inputs), nats; differentiable once
    raises                       ValueError for wrong shapes, types, devices, indices, a temperature <= 0, or
                                 implementation="fused" without the library
    """
    given = queries, documents, positives, temperature, query_group, document_group, document_ids, known_positive_ids
    arguments = *given, false_negative_margin, keep_duplicates, column_weights, symmetric
    try:
        if plain.serves(*arguments) and fused_serves(implementation, torch.float32, "cpu"):
            call = positives, temperature, host.room_of(queries, documents, workspace_mb)
            return plain.PlainLosses.apply(queries, documents, call)
        problem = checked_arguments(*arguments)
        use_fused = fused_serves(implementation, problem.queries.dtype, _kind_of_device(queries))
        return _row_losses(problem, symmetric, use_fused, workspace_mb)
    except (IndexError, RuntimeError):
        refuse_positives_outside(positives, len(documents))
        raise


def weighted_infonce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    row_weights: Tensor,
    temperature: float | Tensor,
    query_group: Tensor | None = None,
    document_group: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_positive_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    keep_duplicates: bool = False,
    column_weights: Tensor | None = None,
    symmetric: bool = False,
    implementation: str = "auto",
    workspace_mb: int = 16,
) -> tuple[Tensor, Tensor]:
    """sum(row_weights * losses), and the losses of grouped_infonce: less work where the weights are known beforehand.

    The gradient is formed with the loss, by three matrix products instead of four (not if symmetric, nor by the
    library on the CPU in float16).
    row_weights  [rows] float, of any sign; may require its gradient
    returns      [], differentiable once, and [rows], detached; types, errors and the other arguments are those of
                 grouped_infonce
    """
    given = queries, documents, positives, temperature, query_group, document_group, document_ids, known_positive_ids
    arguments = *given, false_negative_margin, keep_duplicates, column_weights, symmetric
    try:
        if plain.serves(*arguments) and plain.serves_weights(row_weights, queries):
            if fused_serves(implementation, torch.float32, "cpu"):
                call = positives, temperature, host.room_of(queries, documents, workspace_mb)
                return plain.PlainWeighted.apply(queries, documents, row_weights, call)
        problem = checked_arguments(*arguments)
        weights = checked_row_weights(row_weights, problem.queries)
        use_fused = fused_serves(implementation, problem.queries.dtype, _kind_of_device(queries))
        # What small weights leave of a gradient is lost in float16: it waits for the factor that scales the loss.
        waits = symmetric or (problem.queries.dtype == torch.float16 and _on_host(problem.queries, use_fused))
        if _differentiated(problem) and not waits:
            return _WeightedInfoNCE.apply(*_inputs(problem), weights, (problem, use_fused, workspace_mb))
        losses = _row_losses(problem, symmetric, use_fused, workspace_mb)
        # Of its own memory, because the caller may change the losses and the weights before the backward.
        return (weights.clone() * losses).sum(), losses.detach().clone()
    except (IndexError, RuntimeError):
        refuse_positives_outside(positives, len(documents))
        raise


def _kind_of_device(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # of which the latter takes its time


def _row_losses(problem: Problem, symmetric: bool, use_fused: bool, workspace_mb: int) -> Tensor:
    if not symmetric and _on_host(problem.queries, use_fused):
        return _KeptInfoNCE.apply(*_inputs(problem), problem, _differentiated(problem), workspace_mb)
    return _GroupedInfoNCE.apply(*_inputs(problem), problem, symmetric, use_fused)


def _on_host(queries: Tensor, use_fused: bool) -> bool:
    """Whether host.py computes the loss. A compiler knows the operators that do without its room only."""
    return use_fused and queries.is_cpu and not torch.compiler.is_compiling()


def _inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """What may have a gradient."""
    return problem.queries, problem.documents, problem.temperature


def _differentiated(problem: Problem) -> bool:
    """Whether a gradient may be asked for."""
    wanted = problem.queries.requires_grad or problem.documents.requires_grad or problem.temperature.requires_grad
    return wanted and torch.is_grad_enabled()


def _sides(ctx: Any) -> host.Sides:
    """Whose gradients are asked for. That of the temperature is found from that of the queries."""
    wanted = ctx.needs_input_grad
    return wanted[0] or wanted[2], wanted[1]


def _save(ctx: Any, problem: Problem, *more: Tensor | None) -> None:
    """Save a problem and more for the backward."""
    *tensors, ctx.margin, log_weights = problem
    ctx.save_for_backward(*tensors, log_weights, *more)


def _saved(ctx: Any) -> tuple[Problem, tuple[Tensor, ...]]:
    """What was saved."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    count = len(Problem._fields) - 1
    *tensors, log_weights = saved[:count]
    return Problem._make((*tensors, ctx.margin, log_weights)), saved[count:]


class _GroupedInfoNCE(torch.autograd.Function):
    """Forward keeps one number a row, and one a column if symmetric; backward computes each score once more."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        temperature: Tensor,
        problem: Problem,
        symmetric: bool,
        use_fused: bool,
    ) -> Tensor:
        positives, margin, log_weights = problem.positives, problem.margin, problem.log_weights
        groups = groups_on_host(problem.query_group, problem.document_group)
        ids = problem.column_ids, problem.positive_ids, problem.known_ids
        positive_scores, row_negatives, column_negatives = core_of(use_fused).forward(
            queries, documents, positives, None, temperature, *groups, *ids, margin, log_weights, symmetric
        )
        excess = excess_of(row_negatives, positive_scores)
        sums = positive_scores, row_negatives, column_negatives, excess
        ctx.save_for_backward(queries, documents, temperature, positives, *sums, *groups, *ids, log_weights)
        ctx.options = margin, symmetric, use_fused
        losses = softplus(excess, threshold=SOFTPLUS_THRESHOLD)
        if not symmetric:
            return losses
        excess = excess_of(column_negatives.index_select(0, positives), positive_scores)
        return (losses + softplus(excess, threshold=SOFTPLUS_THRESHOLD)) / 2

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, temperature, positives, *saved, log_weights = ctx.saved_tensors
        positive_scores, row_negatives, column_negatives, excess, *masks = saved
        margin, symmetric, use_fused = ctx.options
        column_totals = column_factors = None
        if symmetric:
            upstream = upstream / 2
        # Each share is that of all negatives in the softmax: what their gradients sum up to, and the positive's loses.
        row_shares = torch.sigmoid(excess) * upstream
        positive_factors = -row_shares
        if symmetric:
            # A column's rows count in the losses of all rows whose positive it is.
            excess = excess_of(column_negatives.index_select(0, positives), positive_scores)
            column_shares = torch.sigmoid(excess) * upstream
            positive_factors = positive_factors - column_shares
            column_factors = torch.zeros_like(column_negatives, dtype=excess.dtype)
            add_rows(column_factors, positives, column_shares)
            column_totals, gains = split_totals(column_negatives, excess.dtype)
            column_factors *= gains
        row_totals, gains = split_totals(row_negatives, excess.dtype)
        problem = queries, documents, positives, positive_scores, temperature, *masks, margin, log_weights
        shares = row_totals, row_shares * gains, positive_factors, column_totals, column_factors
        gradients = list(core_of(use_fused).backward(*problem, *shares))
        return *_gradients(ctx, queries, documents, temperature, gradients), None, None, None


class _KeptInfoNCE(torch.autograd.Function):
    """What _GroupedInfoNCE computes, by the library on the host: forward keeps exponentials where they are few."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        temperature: Tensor,
        problem: Problem,
        keep: bool,
        workspace_mb: int,
    ) -> Tensor:
        ctx.workspace_mb = workspace_mb
        losses, *kept = host.losses(problem, workspace_mb, keep)
        _save(ctx, problem, losses.clone(), *kept)  # the caller may change the losses
        return losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        problem, (losses, positive_scores, kept) = _saved(ctx)
        found = losses, positive_scores, kept
        gradients = host.losses_backward(problem, found, upstream.contiguous(), ctx.workspace_mb, _sides(ctx))
        return *_gradients(ctx, *_inputs(problem), gradients), None, None, None


class _WeightedInfoNCE(torch.autograd.Function):
    """Forward forms the gradients, backward hands them over. A small batch notices every line of both."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        temperature: Tensor,
        row_weights: Tensor,
        call: tuple[Problem, bool, int],
    ) -> tuple[Tensor, Tensor]:
        problem, *ctx.options = call
        ctx.dtype = problem.queries.dtype
        losses, ctx.gradients = _weighted(ctx, problem, row_weights)
        # The gradients are not among the saved tensors: those are held until backward has returned, so its receiver
        # would copy them.
        _save(ctx, problem, row_weights, losses.clone() if ctx.needs_input_grad[3] else None)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return torch.dot(row_weights, losses), losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:  # nothing was asked of the total
            return (None,) * 5
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # the graph was kept, and the gradients of the first backward are the caller's
            problem, (row_weights, _) = _saved(ctx)
            _, gradients = _weighted(ctx, problem, row_weights)
        gradients = multiplied(gradients, upstream)
        _, _, for_temperature, for_weights, _ = ctx.needs_input_grad
        of_temperature = of_weights = None
        if for_temperature or for_weights:
            problem, (_, losses) = _saved(ctx)
            if for_temperature:
                of_temperature = temperature_gradient(problem.queries, gradients[0], problem.temperature)
            of_weights = upstream * losses if for_weights else None
        return *of_sides(ctx, gradients, ctx.dtype), of_temperature, of_weights, None


def _weighted(ctx: Any, problem: Problem, row_weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients [of queries, of documents] of their weighted sum."""
    use_fused, workspace_mb = ctx.options
    if _on_host(problem.queries, use_fused):
        return host.forward_backward(problem, row_weights, workspace_mb, _sides(ctx))
    queries, documents, positives, temperature, query_group, document_group, *rest = problem
    groups = groups_on_host(query_group, document_group)
    losses, *gradients = core_of(use_fused).forward_backward(
        queries, documents, positives, row_weights, temperature, *groups, *rest
    )
    return losses, gradients


def _gradients(
    ctx: Any, queries: Tensor, documents: Tensor, temperature: Tensor, gradients: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is asked of the gradients [of queries, of documents], each in its type, and that of the temperature."""
    for_temperature = ctx.needs_input_grad[2]
    of_temperature = temperature_gradient(queries, gradients[0], temperature) if for_temperature else None
    return *of_sides(ctx, gradients, queries.dtype), of_temperature


def core_of(use_fused: bool) -> ModuleType:
    """The module whose forward, backward and forward_backward compute the loss."""
    if use_fused:
        return fused
    return torch_ops if torch.compiler.is_compiling() else torch_core


@torch.compiler.assume_constant_result
def fused_serves(implementation: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the compiled library computes the loss of such embeddings; a ValueError where it must and cannot."""
    return _library_serves(implementation, dtype, device_type)


@cache
def _library_serves(implementation: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the compiled library computes this loss."""
    if implementation not in LOSS_IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(LOSS_IMPLEMENTATIONS)}.")
    if implementation == "torch":
        return False
    obstacle = fused.obstacle(dtype, device_type)
    if obstacle and implementation == "fused":
        raise ValueError(f"implementation is 'fused', but {obstacle} Or use implementation='auto'.")
    if obstacle and dtype in fused.DTYPES:
        _warn_of_slow_loss(obstacle)
    return not obstacle


@cache
def _warn_of_slow_loss(obstacle: str) -> None:
    warnings.warn(f"The loss runs in plain torch, slower: {obstacle}", stacklevel=5)
