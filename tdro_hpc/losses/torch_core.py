"""The sums and gradients of grouped InfoNCE in tiles of plain torch: any float type, any device.

These three functions take what the operators of the compiled library take, in the same order (fused.py), and give the
same results. The [rows, columns] scores never exist: a tile is made, used and thrown away. Nothing here is looked at on
the host but the sizes of the groups.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.losses.tiles import (
    Index,
    RowBlock,
    RowsOf,
    block_rows,
    group_blocks,
    panel_rows,
    row_ranges,
    whole_blocks,
)

SOFTPLUS_THRESHOLD = 40  # log(1 + e^x) is x above it, also in float64


def forward(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    positive_scores: Tensor | None,
    temperature: Tensor,
    query_group: Tensor | None,
    document_group: Tensor | None,
    column_ids: Tensor | None,
    positive_ids: Tensor | None,
    known_ids: Tensor | None,
    margin: float | None,
    log_weights: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each row's positive, and logsumexp of the scores of its negatives; of each column's too if symmetric.

    queries [rows, width], documents [columns, width]   one float type; a score is (q . d) / temperature + log_weights
    positives [rows] int64    column of the positive, or any other number with positive_scores: it is not among these
    positive_scores [rows]    scores of the positives, None = computed here     temperature []   > 0
    query_group [rows], document_group [columns] int64   a column counts for the rows of its group; None = for all
    column_ids [columns], positive_ids [rows], known_ids [rows, known] int64   a column with the id of the row's
                              positive or one of its known ids (-1 = none) does not count
    margin                    columns with q . d > the positive's - margin do not count; None = off
    log_weights [columns]     added to the scores of negatives; None = 0
    returns   positive_scores [rows] in float32, or float64 for float64 embeddings; row_negatives [rows] and
              column_negatives [columns] or [0] in float64, where the device has it; -inf where nothing counts
    raises    IndexError for a positive that is no column, without positive_scores (on CUDA, the device's assertion)
    """
    with _exact_products(queries.device):
        found = _scores_of_positives(queries, documents, positives, positive_scores, temperature)
        limits = _limits(found, margin, temperature)
        masks = _Masks(positives, column_ids, positive_ids, known_ids, limits, log_weights)
        row_negatives = torch.full_like(found, -math.inf, dtype=_type_of_totals(found.device))
        column_negatives = row_negatives.new_full((len(documents) if symmetric else 0,), -math.inf)
        for block in _blocks(queries, documents, query_group, document_group, block_rows):
            scaled = _wide(queries[block.rows]) / temperature
            running = row_negatives[block.rows]
            for columns in block.columns:
                scores = masks.apply(scaled @ _wide(documents[columns]).mT, block.rows, columns)
                running = torch.logaddexp(running, _logsumexp(scores, -1))
                if symmetric:
                    of_tile = _logsumexp(scores, -2)
                    column_negatives[columns] = torch.logaddexp(column_negatives[columns], of_tile)
            row_negatives[block.rows] = running
    return found, row_negatives, column_negatives


def backward(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    positive_scores: Tensor,
    temperature: Tensor,
    query_group: Tensor | None,
    document_group: Tensor | None,
    column_ids: Tensor | None,
    positive_ids: Tensor | None,
    known_ids: Tensor | None,
    margin: float | None,
    log_weights: Tensor | None,
    row_totals: Tensor,
    row_factors: Tensor,
    positive_factors: Tensor,
    column_totals: Tensor | None,
    column_factors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents, from what each row and each column makes of its scores.

    A negative's score s has the gradient row_factors exp(s - row_totals) + column_factors exp(s - column_totals), the
    positive's has positive_factors.
    row_totals, row_factors, positive_factors [rows]; column_totals, column_factors [columns], None = no such part;
    totals are finite and no smaller than the scores that they are subtracted from. The others are those of forward.
    returns   [rows, width] and [columns, width] in float32, or float64 for float64 embeddings
    """
    with _exact_products(queries.device):
        limits = _limits(positive_scores, margin, temperature)
        masks = _Masks(positives, column_ids, positive_ids, known_ids, limits, log_weights)
        gradients = _Gradients(queries, documents)
        for block in _blocks(queries, documents, query_group, document_group, block_rows):
            scaled = _wide(queries[block.rows]) / temperature
            for columns in block.columns:
                scores = masks.apply(scaled @ _wide(documents[columns]).mT, block.rows, columns)
                of_columns = None
                if column_totals is not None and column_factors is not None:
                    totals, factors = column_totals[columns], column_factors[columns] / temperature
                    of_columns = torch.exp(scores - totals.unsqueeze(-2)).mul_(factors.unsqueeze(-2))
                totals, factors = row_totals[block.rows], row_factors[block.rows] / temperature
                shares = scores.sub_(totals.unsqueeze(-1)).exp_().mul_(factors.unsqueeze(-1))
                gradients.add(shares if of_columns is None else shares.add_(of_columns), block.rows, columns)
        gradients.add_positives(positives, positive_factors / temperature)
    return gradients.queries, gradients.documents


def forward_backward(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    row_weights: Tensor,
    temperature: Tensor,
    query_group: Tensor | None,
    document_group: Tensor | None,
    column_ids: Tensor | None,
    positive_ids: Tensor | None,
    known_ids: Tensor | None,
    margin: float | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [rows], and the gradients of sum(row_weights * losses): three matrix products instead of four.

    row_weights [rows]   of any sign. The other arguments and the types of the results are those of forward.
    """
    with _exact_products(queries.device):
        positive_scores = _scores_of_positives(queries, documents, positives, None, temperature)
        limits = _limits(positive_scores, margin, temperature)
        masks = _Masks(positives, column_ids, positive_ids, known_ids, limits, log_weights)
        gradients = _Gradients(queries, documents)
        # logsumexp of a row's negatives - its positive
        excess = torch.full_like(positive_scores, -math.inf, dtype=_type_of_totals(queries.device))
        factors = row_weights / temperature
        for block in _blocks(queries, documents, query_group, document_group, panel_rows):
            scaled = _wide(queries[block.rows]) / temperature
            positive = positive_scores[block.rows]
            panel, running = [], excess[block.rows]
            for columns in block.columns:
                scores = masks.apply(scaled @ _wide(documents[columns]).mT, block.rows, columns)
                panel.append(scores.sub_(positive.unsqueeze(-1)))
                running = torch.logaddexp(running, _logsumexp(scores, -1))
            excess[block.rows] = running
            whole = torch.nn.functional.softplus(running, threshold=SOFTPLUS_THRESHOLD)
            totals, gains = split_totals(whole, positive.dtype)
            of_rows = factors[block.rows] * gains
            for columns, scores in zip(block.columns, panel, strict=True):
                shares = scores.sub_(totals.unsqueeze(-1)).exp_().mul_(of_rows.unsqueeze(-1))
                gradients.add(shares, block.rows, columns)
        excess = excess.to(positive_scores.dtype)
        gradients.add_positives(positives, -torch.sigmoid(excess) * factors)
        losses = torch.nn.functional.softplus(excess, threshold=SOFTPLUS_THRESHOLD)
    return losses, gradients.queries, gradients.documents


def split_totals(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logsumexps in float64 as totals for `backward`, which are finite, and what its factors must be multiplied by.

    A total of 500 is a float32 in steps of 3e-5, and so would be the sum of a row's shares; the factors take up what is
    left of it.
    """
    bounded = sums.clamp(min=torch.finfo(dtype).min)  # of nothing: so that no difference is NaN
    totals = bounded.to(dtype)
    return totals, (totals - bounded).exp().to(dtype)


def temperature_gradient(queries: Tensor, of_queries: Tensor, temperature: Tensor) -> Tensor:
    """From that of the queries: a score is q . d / temperature, so it is what a factor common to them would get."""
    product = (queries * of_queries).sum(dtype=temperature.dtype)
    return (-product / temperature).to(temperature.device)


def excess_of(negatives: Tensor, positive_scores: Tensor) -> Tensor:
    """By how much the logsumexp of the negatives [rows] exceeds the positive, in the type of the latter."""
    return (negatives - positive_scores).to(positive_scores.dtype)


def add_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """target[index] += values with repeated indices, always summed in the same order."""
    if target.is_cuda:  # index_add_ sums there in whatever order the threads arrive
        target.index_put_((index,), values, accumulate=True)
    else:
        target.index_add_(0, index, values)


@dataclass(frozen=True)
class _Masks:
    """Which columns of a tile are not negatives of a row, and what is added to the others."""

    positives: Tensor  # int64 [rows]
    column_ids: Tensor | None  # int64 [columns]
    positive_ids: Tensor | None  # int64 [rows]
    known_ids: Tensor | None  # int64 [rows, known], -1 = none
    limits: Tensor | None  # [rows], the highest score that counts
    log_weights: Tensor | None  # [columns]

    def apply(self, scores: Tensor, rows: Index, columns: Index) -> Tensor:
        """The scores [..., rows, columns], changed in place: -inf where a column does not count."""
        if self.limits is not None:
            scores.masked_fill_(scores > self.limits[rows].unsqueeze(-1), -math.inf)
        if self.log_weights is not None:
            scores.add_(self.log_weights[columns].unsqueeze(-2))
        self._leave_out_positives(scores, rows, columns)
        if self.column_ids is None:
            return scores
        ids = self.column_ids[columns].unsqueeze(-2)
        if self.positive_ids is not None:
            scores.masked_fill_(ids == self.positive_ids[rows].unsqueeze(-1), -math.inf)
        for known in () if self.known_ids is None else self.known_ids.unbind(1):
            known_rows = known[rows].unsqueeze(-1)
            scores.masked_fill_((ids == known_rows) & (known_rows != -1), -math.inf)
        return scores

    def _leave_out_positives(self, scores: Tensor, rows: Index, columns: Index) -> None:
        positives = self.positives[rows].unsqueeze(-1)
        if isinstance(columns, Tensor):
            scores.masked_fill_(columns.unsqueeze(-2) == positives, -math.inf)
            return
        # One element a row at most: a comparison of the whole tile would be one more pass over it.
        place = positives - columns.start
        nearest = place.clamp(0, scores.shape[-1] - 1)
        there = scores.gather(-1, nearest)
        scores.scatter_(-1, nearest, there.masked_fill(nearest == place, -math.inf))


class _Gradients:
    """The gradients of both sides, to which tiles and positives are added."""

    def __init__(self, queries: Tensor, documents: Tensor) -> None:
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        self.of = queries, documents
        self.queries = torch.zeros_like(queries, dtype=dtype)
        self.documents = torch.zeros_like(documents, dtype=dtype)

    def add(self, shares: Tensor, rows: Index, columns: Index) -> None:
        """Add those of a tile whose scores have the gradients `shares` [..., rows, columns]."""
        queries, documents = (_wide(side[index]) for side, index in zip(self.of, (rows, columns), strict=True))
        _add_product(self.queries, rows, shares, documents)
        _add_product(self.documents, columns, shares.mT, queries)

    def add_positives(self, positives: Tensor, factors: Tensor) -> None:
        """Add those of the positives' scores, which have the gradients `factors` [rows]."""
        queries, documents = self.of
        if len(documents) == 0:
            return
        columns = positives.clamp(0, len(documents) - 1)
        factors = factors.masked_fill(columns != positives, 0).unsqueeze(-1)
        for rows in row_ranges(len(queries)):
            self.queries[rows].addcmul_(factors[rows], _wide(documents.index_select(0, columns[rows])))
            add_rows(self.documents, columns[rows], factors[rows] * queries[rows])


def _add_product(target: Tensor, index: Index, left: Tensor, right: Tensor) -> None:
    """target[index] += left @ right, for an index without repetitions."""
    if isinstance(index, slice):
        target[index].addmm_(left, right)
    else:
        target[index] += left @ right


def _logsumexp(scores: Tensor, dim: int) -> Tensor:
    """In float64 what torch.logsumexp rounds to the type of the scores."""
    wide = _type_of_totals(scores.device)
    highest = scores.amax(dim, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    return highest.squeeze(dim).to(wide) + (scores - highest).exp_().sum(dim).to(wide).log()


def _type_of_totals(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which such a device has not


def _limits(positive_scores: Tensor, margin: float | None, temperature: Tensor) -> Tensor | None:
    return None if margin is None else positive_scores - margin / temperature


def _blocks(
    queries: Tensor, documents: Tensor, query_group: Tensor | None, document_group: Tensor | None, rows_of: RowsOf
) -> list[RowBlock]:
    if query_group is None or document_group is None:
        return whole_blocks(len(queries), len(documents), rows_of)
    return group_blocks(query_group, document_group, queries.device, rows_of)


def _scores_of_positives(
    queries: Tensor, documents: Tensor, positives: Tensor, given: Tensor | None, temperature: Tensor
) -> Tensor:
    if given is not None:
        return given.clone()  # an operator may not return what it was given
    found = torch.empty(len(queries), device=queries.device, dtype=_wide(queries[:0]).dtype)
    for rows in row_ranges(len(queries)):
        of_rows = _wide(documents.index_select(0, positives[rows]))
        found[rows] = (_wide(queries[rows]) / temperature).mul_(of_rows).sum(dim=-1)
    return found


def _wide(embeddings: Tensor) -> Tensor:
    """The embeddings as float32, or float64: at low temperatures a score of half precision is off by whole nats."""
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the type of their operands: no autocast, no TF32, no bfloat16 inside."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
