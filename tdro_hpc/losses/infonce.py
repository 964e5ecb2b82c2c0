"""Query and document embeddings in, one InfoNCE loss a row out, in tiles: the [rows, columns] scores never exist.

The positive is kept apart from the tiles. With x = logsumexp(negative scores) - positive score the loss is
log(1 + e^x), which stays accurate when the positive wins by far and is exactly 0 for a row without negatives.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdro_hpc.losses.tiles import Index, RowBlock, group_blocks, whole_blocks


def grouped_infonce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    query_group: Tensor | None = None,
    document_group: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_positive_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    keep_duplicates: bool = False,
) -> Tensor:
    """Loss of every row: -log of the share that its positive has in the softmax over its columns.

    queries [rows, width]        documents [columns, width]   one float type, any; scores and sums are float32 or wider
    positives                    [rows] int64: column of the positive, which always counts, even in another group
    temperature                  divides the scores q . d; > 0
    query_group, document_group  [rows], [columns] int64: a column counts for a row of its group; None = all count
    document_ids                 [columns] int64: columns with the id of the row's positive are not negatives
    known_positive_ids           [rows, known] int64: columns with these ids are not negatives; -1 = none
    false_negative_margin        columns with q . d > positive's - margin are not negatives; None = off
    keep_duplicates              true = document_ids serve known_positive_ids only
    returns                      [rows] float32 (float64 for float64 inputs), nats; differentiable once in both sides
    raises                       ValueError for wrong shapes, types, devices, indices, or a temperature <= 0
    """
    _check_embeddings(queries, documents, temperature, false_negative_margin)
    _check_ids("positives", positives, (len(queries),), queries)
    _check_ids("query_group", query_group, (len(queries),), queries)
    _check_ids("document_group", document_group, (len(documents),), queries)
    _check_ids("document_ids", document_ids, (len(documents),), queries)
    _check_ids("known_positive_ids", known_positive_ids, (len(queries), None), queries)
    _check_positives(positives, len(documents))
    if (query_group is None) != (document_group is None):
        raise ValueError("query_group and document_group go together: give both or none.")
    if known_positive_ids is not None and document_ids is None:
        raise ValueError("known_positive_ids are looked up in document_ids: give document_ids too.")
    if query_group is None or document_group is None:
        blocks = whole_blocks(len(queries), len(documents))
    else:
        blocks = group_blocks(query_group, document_group)
    own_ids = document_ids
    if own_ids is None or keep_duplicates:
        own_ids = torch.arange(len(documents), device=documents.device)  # the positive's own column and no other
    exclusions = _Exclusions(own_ids, own_ids[positives], document_ids, known_positive_ids, false_negative_margin)
    return _TiledInfoNCE.apply(queries, documents, positives, float(temperature), blocks, exclusions)


@dataclass(frozen=True)
class _Exclusions:
    """Which columns of a tile are not negatives of a row."""

    column_ids: Tensor  # int64 [columns]
    positive_ids: Tensor  # int64 [rows]: a column with this id is the positive, or its double
    document_ids: Tensor | None  # int64 [columns]
    known_ids: Tensor | None  # int64 [rows, known], -1 = none
    margin: float | None  # in units of q . d

    def apply(self, scores: Tensor, rows: Index, columns: Index, limits: Tensor | None) -> None:
        """Put -inf over the scores [..., rows, columns] that do not count; limits [rows] = highest score that does."""
        if limits is not None:
            scores.masked_fill_(scores > limits[rows].unsqueeze(-1), -math.inf)
        ids = self.column_ids[columns].unsqueeze(-2)
        scores.masked_fill_(ids == self.positive_ids[rows].unsqueeze(-1), -math.inf)
        if self.known_ids is None or self.document_ids is None:
            return
        ids = self.document_ids[columns].unsqueeze(-2)
        for known in self.known_ids.unbind(1):
            known_rows = known[rows].unsqueeze(-1)
            scores.masked_fill_((ids == known_rows) & (known_rows != -1), -math.inf)


class _TiledInfoNCE(torch.autograd.Function):
    """Forward keeps one number a row; backward computes each tile of scores once more."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        positives: Tensor,
        temperature: float,
        blocks: list[RowBlock],
        exclusions: _Exclusions,
    ) -> Tensor:
        with _exact_products(queries.device):
            positive_scores = _positive_scores(queries, documents, positives, temperature)
            limits = None if exclusions.margin is None else positive_scores - exclusions.margin / temperature
            negatives = torch.full_like(positive_scores, -math.inf)  # logsumexp of the negative scores of each row
            for block in blocks:
                scaled = _wide(queries[block.rows]) / temperature
                running = negatives[block.rows]
                for columns in block.columns:
                    scores = scaled @ _wide(documents[columns]).mT  # [..., rows, columns]
                    exclusions.apply(scores, block.rows, columns, limits)
                    running = torch.logaddexp(running, torch.logsumexp(scores, dim=-1))
                negatives[block.rows] = running
            losses = torch.logaddexp(negatives - positive_scores, torch.zeros_like(negatives))
        ctx.save_for_backward(queries, documents, positives, positive_scores, losses)
        ctx.temperature, ctx.blocks, ctx.exclusions, ctx.limits = temperature, blocks, exclusions, limits
        return losses.clone()  # the caller may change the losses in place; the backward needs them as they were

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, positives, positive_scores, losses = ctx.saved_tensors
        for_queries, for_documents = ctx.needs_input_grad[:2]
        totals = positive_scores + losses  # logsumexp over positive and negatives
        factors = upstream / ctx.temperature
        query_gradient = torch.zeros_like(queries, dtype=totals.dtype) if for_queries else None
        document_gradient = torch.zeros_like(documents, dtype=totals.dtype) if for_documents else None
        with _exact_products(queries.device):
            for block in ctx.blocks:
                wide_queries = _wide(queries[block.rows])
                scaled = wide_queries / ctx.temperature
                block_gradient = torch.zeros_like(wide_queries) if for_queries else None
                for columns in block.columns:
                    wide_documents = _wide(documents[columns])
                    shares = scaled @ wide_documents.mT
                    ctx.exclusions.apply(shares, block.rows, columns, ctx.limits)
                    shares.sub_(totals[block.rows].unsqueeze(-1)).exp_().mul_(factors[block.rows].unsqueeze(-1))
                    if block_gradient is not None:
                        block_gradient += shares @ wide_documents
                    if document_gradient is not None:
                        document_gradient[columns] += shares.mT @ wide_queries
                if query_gradient is not None and block_gradient is not None:
                    query_gradient[block.rows] = block_gradient
            positive_factors = (torch.expm1(-losses) * factors).unsqueeze(-1)  # share of the positive - 1
            if query_gradient is not None:
                query_gradient += positive_factors * documents[positives]
            if document_gradient is not None:
                _add_rows(document_gradient, positives, positive_factors * queries)
        # Only the caller holds the buffers from here on, so that autograd takes them over instead of copying them.
        return (
            None if query_gradient is None else query_gradient.to(queries.dtype),
            None if document_gradient is None else document_gradient.to(documents.dtype),
            *(None,) * 4,
        )


def _wide(embeddings: Tensor) -> Tensor:
    """The embeddings as float32, or float64: at low temperatures a score of half precision is off by whole nats."""
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def _positive_scores(queries: Tensor, documents: Tensor, positives: Tensor, temperature: float) -> Tensor:
    return (_wide(queries) / temperature * _wide(documents[positives])).sum(dim=-1)


def _add_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index] += values with repeated indices, always summed in the same order."""
    if target.is_cuda:  # index_add_ sums there in whatever order the threads arrive
        target.index_put_((index,), values, accumulate=True)
    else:
        target.index_add_(0, index, values)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the type of their operands: no autocast, no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_embeddings(queries: Tensor, documents: Tensor, temperature: float, margin: float | None) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries are {list(queries.shape)} and documents {list(documents.shape)}; they must be [rows, width] and "
            "[columns, width] with one width."
        )
    if queries.dtype != documents.dtype or not queries.dtype.is_floating_point:
        raise ValueError(
            f"queries are {queries.dtype} and documents {documents.dtype}; both must be of one float type. "
            "Cast one of them, as in queries.to(documents.dtype)."
        )
    if queries.device != documents.device:
        raise ValueError(f"queries are on {queries.device} and documents on {documents.device}; move one of them.")
    if isinstance(temperature, Tensor) or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a number > 0 (usual: 0.002 to 0.05).")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"false_negative_margin is {margin}; it must be a finite number, or None for no such mask.")


def _check_ids(name: str, ids: Tensor | None, shape: tuple[int | None, ...], queries: Tensor) -> None:
    if ids is None:
        return
    fits = ids.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, ids.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(ids.shape)}; it must be [{wanted}].")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} is {ids.dtype}; it must be torch.int64. Use {name}.long().")
    if ids.device != queries.device:
        raise ValueError(f"{name} is on {ids.device} and the embeddings on {queries.device}; move one of them.")


def _check_positives(positives: Tensor, num_documents: int) -> None:
    outside = (positives < 0) | (positives >= num_documents)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"positives[{row}] is {int(positives[row])}; it must be the number of a column, 0 to {num_documents - 1}."
        )
