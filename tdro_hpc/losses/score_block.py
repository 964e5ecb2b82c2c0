"""A batch's embeddings and ids in, the description of its scores out: which columns each row is compared with.

The scores themselves are never built. Under the policy `world` the columns are those of all ranks, the rows those of
this rank; all columns come to this rank at once, or where they are many, one rank's after the other.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdro_hpc.config.schema import NEGATIVES, LossConfig
from tdro_hpc.losses.infonce import grouped_infonce, weighted_infonce
from tdro_hpc.losses.ring import ring_infonce
from tdro_hpc.parallel.gather import gather_ids, gather_rows, rows_of_ranks
from tdro_hpc.parallel.process import group_rank

if TYPE_CHECKING:
    from tdro_hpc.data.batches import Batch


@dataclass
class ScoreBlock:
    """Scores [rows, columns] as their factors, groups and masks; the fields are the arguments of grouped_infonce."""

    queries: Tensor  # [rows, width]
    documents: Tensor  # [columns, width]
    positives: Tensor  # int64 [rows], column of the positive
    temperature: float
    query_group: Tensor | None = None  # int64 [rows]
    document_group: Tensor | None = None  # int64 [columns]
    document_ids: Tensor | None = None  # int64 [columns]
    known_positive_ids: Tensor | None = None  # int64 [rows, known], -1 = none
    false_negative_margin: float | None = None  # in units of q . d
    keep_duplicates: bool = False  # columns with the text of the positive stay negatives
    implementation: str = "auto"  # auto, fused, torch
    workspace_mb: int = 16  # of the compiled loss on a CPU
    ring_sizes: list[int] | None = None  # columns of each rank: this rank's are above, the others' pass by; None = all

    def row_losses(self) -> Tensor:
        """Loss of every row [rows], nats. All ranks call it together where the columns go round them."""
        if self.ring_sizes is not None:
            return ring_infonce(*self._embeddings(), sizes=self.ring_sizes, **self._options())
        return grouped_infonce(*self._embeddings(), workspace_mb=self.workspace_mb, **self._options())

    def weighted(self, row_weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum(row_weights * losses) [], and the losses [rows], detached: less work than row_losses, but in the ring.

        row_weights [rows], of any sign; not differentiated
        """
        if self.ring_sizes is not None:
            losses = self.row_losses()
            return (row_weights * losses).sum(), losses.detach()
        return weighted_infonce(
            *self._embeddings(), row_weights=row_weights, workspace_mb=self.workspace_mb, **self._options()
        )

    def _embeddings(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries, self.documents, self.positives

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "query_group": self.query_group,
            "document_group": self.document_group,
            "document_ids": self.document_ids,
            "known_positive_ids": self.known_positive_ids,
            "false_negative_margin": self.false_negative_margin,
            "keep_duplicates": self.keep_duplicates,
            "implementation": self.implementation,
        }


def build_score_block(
    queries: Tensor, passages: Tensor, batch: "Batch", *, negatives: str, temperature: float, loss: LossConfig
) -> ScoreBlock:
    """The scores that a negatives policy asks for. All ranks call it together under `world`.

    queries [rows, width]   passages [rows * passages_per_query, width], the positive of row i at i * passages_per_query
    negatives  group: a row's own passages. task: those of the rows of its task in this rank's batch. batch: all of this
               rank's. world: all ranks'. Rows marked own_negatives_only keep to their own passages under every policy,
               and no other row sees theirs.
    raises     ValueError for an unknown policy, or passages that do not divide into rows
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"The negatives policy is {negatives!r}; it must be one of {', '.join(NEGATIVES)}.")
    if len(queries) == 0 or len(passages) % len(queries):
        raise ValueError(
            f"{len(passages)} passages do not divide into {len(queries)} rows; every row brings the same number."
        )
    device, per_query = queries.device, len(passages) // len(queries)
    sizes = rows_of_ranks(len(passages)) if negatives == "world" else [len(passages)]
    first_column = sum(sizes[: group_rank()]) if negatives == "world" else 0
    positives = per_query * torch.arange(len(queries), device=device)
    query_group = document_group = None
    if negatives in ("group", "task") or _any_own_negatives(batch, len(sizes), device):
        query_group = _query_groups(batch, first_column + positives, negatives)
        document_group = query_group.repeat_interleave(per_query)
    documents, ids = passages, batch.document_ids.to(device)
    ring = len(sizes) > 1 and _bytes_of_columns(passages, sizes) > loss.ring_above_mb * 1_000_000
    if len(sizes) > 1 and not ring:
        positives = first_column + positives
        documents = gather_rows(passages, sizes)
        labels = [ids] if document_group is None else [ids, document_group]
        ids, *others = gather_ids(torch.stack(labels, dim=1), sizes).unbind(1)
        document_group = others[0] if others else None
    masked = loss.mask_duplicates or loss.mask_known_positives
    return ScoreBlock(
        queries,
        documents,
        positives,
        temperature,
        query_group=query_group,
        document_group=document_group,
        document_ids=ids if masked else None,
        known_positive_ids=batch.known_positive_ids.to(device) if loss.mask_known_positives else None,
        false_negative_margin=loss.false_negative_margin,
        keep_duplicates=not loss.mask_duplicates,
        implementation=loss.implementation,
        workspace_mb=loss.workspace_mb,
        ring_sizes=sizes if ring else None,
    )


def _any_own_negatives(batch: "Batch", ranks: int, device: torch.device) -> bool:
    """Whether a row of any of the ranks keeps to its own passages: all ranks find the same."""
    here = bool(batch.own_negatives_only.any())
    if ranks == 1:
        return here
    return bool(gather_ids(torch.tensor([here], device=device).long(), [1] * ranks).any())


def _bytes_of_columns(passages: Tensor, sizes: list[int]) -> int:
    """Memory of the columns of all ranks together: every rank finds the same number."""
    return sum(sizes) * passages.shape[1] * passages.element_size()


def _query_groups(batch: "Batch", positives: Tensor, negatives: str) -> Tensor:
    """Group of each row [rows] int64. A group of its own is below 0 and unlike any other's on any rank."""
    own = -1 - positives
    if negatives == "group":
        return own
    shared = batch.task_ids.to(own.device) if negatives == "task" else torch.zeros_like(own)
    return torch.where(batch.own_negatives_only.to(own.device), own, shared)
