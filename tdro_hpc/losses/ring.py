"""InfoNCE of this rank's rows against the columns of all ranks, which go round the ranks: no rank ever has them all.

A rank computes with one shard of columns while the next one arrives from its neighbour, so beside its own it holds two.
In the backward the shards go round once more, and behind each follows the sum of its gradients, which is complete when
it is back where the columns came from. Losses and gradients are those of the gathered columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from tdro_hpc.losses.arguments import checked_arguments, refuse_positives_outside
from tdro_hpc.losses.infonce import core_of, fused_serves
from tdro_hpc.losses.torch_core import SOFTPLUS_THRESHOLD, excess_of, split_totals, temperature_gradient
from tdro_hpc.parallel.gather import pass_on
from tdro_hpc.parallel.process import group_rank

_COLUMNS_TAG, _GRADIENTS_TAG = 0, 8  # of messages that are under way at the same time


def ring_infonce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    sizes: list[int],
    temperature: float | Tensor,
    query_group: Tensor | None = None,
    document_group: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_positive_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    keep_duplicates: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Losses [rows] of this rank's rows over the columns of all ranks. All ranks call it together, and its backward.

    documents, document_group, document_ids   of this rank's columns only; ranks may have different numbers of them
    positives [rows]   column of the positive, among this rank's own
    sizes              columns of each rank, in rank order, each >= 1: rows_of_ranks(len(documents))
    temperature        the gradient of one that requires it is that of this rank's losses
    The other arguments, the result and the errors are those of grouped_infonce. Whether an argument is None, and the
    type of the embeddings, is the same on all ranks.
    """
    assert sizes[group_rank()] == len(documents), f"{len(documents)} columns, but {sizes} were announced"
    try:
        problem = checked_arguments(
            queries,
            documents,
            positives,
            temperature,
            query_group,
            document_group,
            document_ids,
            known_positive_ids,
            false_negative_margin,
            keep_duplicates,
            None,
            False,
        )
        use_fused = fused_serves(implementation, problem.queries.dtype, queries.device.type)
        return _RingInfoNCE.apply(*problem, sizes, use_fused)
    except (IndexError, RuntimeError):
        refuse_positives_outside(positives, len(documents))
        raise


class _RingInfoNCE(torch.autograd.Function):
    """Forward keeps two numbers a row; backward lets the columns go round once more."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        positives: Tensor,
        temperature: Tensor,
        query_group: Tensor | None,
        document_group: Tensor | None,
        column_ids: Tensor | None,
        positive_ids: Tensor | None,
        known_ids: Tensor | None,
        margin: float | None,
        log_weights: Tensor | None,
        sizes: list[int],
        use_fused: bool,
    ) -> Tensor:
        rows = _Rows(queries, temperature, positives, query_group, positive_ids, known_ids, margin, use_fused)
        of_columns = [tensor for tensor in (documents, document_group, column_ids) if tensor is not None]
        columns = _Circle(of_columns, sizes, group_rank(), _COLUMNS_TAG)
        positive_scores: Tensor | None = None
        row_negatives = torch.full((len(queries),), -math.inf, device=queries.device, dtype=torch.float64)
        for _ in columns.turns():
            positive_scores, found = rows.sums(columns, positive_scores)
            row_negatives = torch.logaddexp(row_negatives, found)
        assert positive_scores is not None, "this rank is one of them"
        of_rows = queries, temperature, positives, query_group, positive_ids, known_ids
        ctx.save_for_backward(*of_rows, positive_scores, row_negatives, *of_columns)
        ctx.options = margin, sizes, use_fused
        excess = excess_of(row_negatives, positive_scores)
        return softplus(excess, threshold=SOFTPLUS_THRESHOLD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        queries, temperature, positives, query_group, positive_ids, known_ids, *more = ctx.saved_tensors
        positive_scores, row_negatives, *of_columns = more
        margin, sizes, use_fused = ctx.options
        rows = _Rows(queries, temperature, positives, query_group, positive_ids, known_ids, margin, use_fused)
        excess = excess_of(row_negatives, positive_scores)
        shares = torch.sigmoid(excess) * upstream  # of a row's negatives in its softmax
        columns = _Circle(of_columns, sizes, group_rank(), _COLUMNS_TAG)
        of_queries = torch.zeros_like(queries, dtype=shares.dtype)
        asked: _Circle | None = None  # what the ranks before ask of the columns, a turn behind them
        for _ in columns.turns():
            found, found_here = rows.gradients(columns, positive_scores, row_negatives, shares)
            of_queries += found
            if asked is not None:
                asked.arrive()
                found_here += asked.here[0]
            asked = _Circle([found_here], sizes, columns.owner, _GRADIENTS_TAG)
            asked.pass_on()
        assert asked is not None, "this rank is one of them"
        asked.arrive()
        for_queries, for_documents, _, for_temperature = ctx.needs_input_grad[:4]
        return (
            of_queries.to(queries.dtype) if for_queries else None,
            asked.here[0].to(queries.dtype) if for_documents else None,
            None,
            temperature_gradient(queries, of_queries, temperature) if for_temperature else None,
            *(None,) * 9,
        )


@dataclass(frozen=True)
class _Rows:
    """What stays on this rank: its rows, to be compared with one shard of columns after the other."""

    queries: Tensor  # [rows, width]
    temperature: Tensor  # []
    positives: Tensor  # int64 [rows], among this rank's columns
    query_group: Tensor | None  # int64 [rows]
    positive_ids: Tensor | None  # int64 [rows]
    known_ids: Tensor | None  # int64 [rows, known]
    margin: float | None
    use_fused: bool

    def sums(self, columns: "_Circle", positive_scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of the positives [rows], and the logsumexp of the negatives among the columns that are here [rows]."""
        found = core_of(self.use_fused).forward(*self._problem(columns, positive_scores), False)
        return found[0], found[1]

    def gradients(
        self, columns: "_Circle", positive_scores: Tensor, row_negatives: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the queries and of the columns that are here, where `shares` [rows] is asked of a row's negatives."""
        totals, gains = split_totals(row_negatives, shares.dtype)
        of_rows = totals, shares * gains, -shares
        return core_of(self.use_fused).backward(*self._problem(columns, positive_scores), *of_rows, None, None)

    def _problem(self, columns: "_Circle", positive_scores: Tensor | None) -> tuple[Any, ...]:
        documents, *labels = columns.here
        document_group = None if self.query_group is None else labels.pop(0)
        column_ids = labels.pop(0) if labels else None
        own = columns.owner == group_rank()
        positives = self.positives if own else torch.full_like(self.positives, -1)  # none of these columns
        of_pairs = positives, positive_scores, self.temperature, self.query_group, document_group
        masks = column_ids, self.positive_ids, self.known_ids, self.margin, None
        return self.queries, documents, *of_pairs, *masks


class _Circle:
    """Tensors [columns of a rank, ...] on their way round the ranks: those that are here, and those that arrive.

    Whoever holds on to `here` beyond its turn holds one shard more.
    """

    def __init__(self, here: list[Tensor], sizes: list[int], owner: int, tag: int) -> None:
        self.here, self.owner = here, owner  # owner: the rank that they belong to
        self._sizes, self._tag = sizes, tag
        self._arriving: list[Tensor] = []
        self._works: list[dist.Work] = []

    def turns(self) -> Iterator[None]:
        """Own columns first, then those of every other rank; during each turn the next ones arrive."""
        for turn in range(len(self._sizes)):
            last = turn == len(self._sizes) - 1
            if not last:
                self.pass_on()
            yield
            if not last:
                self.arrive()

    def pass_on(self) -> None:
        """Begin to send what is here to the next rank, and to receive what is with the rank before."""
        rows = self._sizes[self.owner - 1]
        self._arriving = [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in self.here]
        self._works = pass_on(self.here, self._arriving, tag=self._tag)

    def arrive(self) -> None:
        """Wait until what was sent is gone and what was to be received is here."""
        for work in self._works:
            work.wait()
        self.here, self.owner = self._arriving, (self.owner - 1) % len(self._sizes)
        self._arriving, self._works = [], []
