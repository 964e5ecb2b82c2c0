"""Tiles of scores on a GPU: where they lie, and what is done on one. Knows nothing of losses.

Scores of half-precision embeddings are float32 products; the gradients of scores lie in their place, in the type of the
embeddings. `Kernels` is all that a GPU is needed for, so that tests put something slow and obvious in its place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tdro_hpc.losses import tiles

# Nothing of this was tuned on a device; it follows from bytes: of one call, all scores and copies take <= 240 MiB.
SCORE_BYTES = 192 << 20  # scores of one tile whose shares go into gradients
SUM_BYTES = 64 << 20  # scores of one tile that is summed only: small enough to be in the L2 cache for the most part
COPY_BYTES = 48 << 20  # embeddings of a tile, and their gradients, that have to be copied together
SUM_ROWS = 4096
GRADIENT_ROWS = 16384  # a tile reads and writes the gradients of its rows once more: the columns should be many too
BATCHED_SCORES = 1 << 20  # groups with more scores fill a GPU alone
ALIGNMENT = 128  # of the rows and columns of a tile of a larger group: what matrix products are cut into


@dataclass(frozen=True)
class Tile:
    """Groups of one shape that lie one after the other, or a part of one group, in the order of the tiles."""

    first_row: int
    first_column: int
    groups: int
    rows: int  # of one group
    columns: int

    @property
    def all_rows(self) -> int:
        return self.groups * self.rows

    @property
    def all_columns(self) -> int:
        return self.groups * self.columns


class TileMasks(NamedTuple):
    """Which products of all rows and columns count, in the order of the tiles; None = all do."""

    temperature: Tensor  # [] float32
    positives: Tensor  # int64 [rows], number of the column; no column = the positive is in no tile of its row
    query_group: Tensor | None  # int64 [rows], when groups are to be compared within tiles
    document_group: Tensor | None  # int64 [columns]
    column_ids: Tensor | None  # int64 [columns]
    positive_ids: Tensor | None  # int64 [rows]
    known_ids: Tensor | None  # int64 [rows, known], -1 = none
    limits: Tensor | None  # float32 [rows], the highest product that counts
    log_weights: Tensor | None  # float32 [columns]


class Kernels(Protocol):
    """What is done on one tile of products [groups, rows, stride] float32. Vectors are of all rows, or all columns.

    A logsumexp is kept as (largest score, sum of exp(score - largest)); of nothing it is (lowest float, 0).
    """

    def compares_groups(self, group: Tensor) -> bool:
        """Whether groups that lie where these do can be compared within tiles; if not, each gets tiles of its own."""

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """out [groups, m, n] float32 = left [groups, m, k] @ right [groups, k, n], or += it; sums are float32."""

    def sum_rows(self, scores: Tensor, tile: Tile, masks: TileMasks, row_sums: tuple[Tensor, Tensor]) -> None:
        """Merge the logsumexp of each row of the tile into row_sums."""

    def sum_columns(self, scores: Tensor, tile: Tile, masks: TileMasks, column_sums: tuple[Tensor, Tensor]) -> None:
        """Merge the logsumexp of each column of the tile into column_sums."""

    def write_shares(
        self, scores: Tensor, tile: Tile, masks: TileMasks, rows: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor] | None, residuals: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Put factor exp(score - total) into shares_of(scores): that of the row, plus that of the column.

        rows, columns   (totals, factors)
        residuals       [rows] float32: what rounding to dtype takes off the shares of each row is added; None = nowhere
        """

    def write_softmax(
        self, scores: Tensor, tile: Tile, masks: TileMasks, positive_scores: Tensor, row_weights: Tensor,
        losses: Tensor, residuals: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """For a tile with all columns of its rows: their losses, and row_weight exp(score - total) as above."""

    def positive_scores(self, queries: Tensor, documents: Tensor, positives: Tensor, temperature: Tensor) -> Tensor:
        """q . d_positive / temperature [rows] float32; NaN where the positive is no column."""

    def add_positives(
        self, queries: Tensor, documents: Tensor, positives: Tensor, factors: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Add factors [rows] times the other side of each positive pair to the gradients of queries and documents.

        Nothing is added where the positive is no column.
        """


class TileOps:
    """The kernels as operators of the compiled library."""

    STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # TdroStorage in kernels/cuda/tiles.h

    def __init__(self, namespace: Any = torch.ops.tdro_hpc) -> None:
        self.ops = namespace

    def compares_groups(self, group: Tensor) -> bool:
        return group.is_cuda

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
        if left.dtype == torch.float32:
            out.baddbmm_(left, right) if accumulate else torch.bmm(left, right, out=out)
        elif accumulate:
            # Of the products with another output type, only the batched one adds in place in every torch since 2.10.
            torch.ops.aten.baddbmm.dtype_out(out, left, right, torch.float32, out=out)
        else:
            torch.ops.aten.bmm.dtype_out(left, right, torch.float32, out=out)

    def sum_rows(self, scores: Tensor, tile: Tile, masks: TileMasks, row_sums: tuple[Tensor, Tensor]) -> None:
        self.ops.tile_row_statistics.default(*_place_of(scores, tile), *masks, *row_sums)

    def sum_columns(self, scores: Tensor, tile: Tile, masks: TileMasks, column_sums: tuple[Tensor, Tensor]) -> None:
        self.ops.tile_column_statistics.default(*_place_of(scores, tile), *masks, *column_sums)

    def write_shares(
        self, scores: Tensor, tile: Tile, masks: TileMasks, rows: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor] | None, residuals: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        of_columns = (None, None) if columns is None else columns
        vectors = *rows, *of_columns, residuals
        self.ops.tile_gradient.default(*_place_of(scores, tile), *masks, *vectors, self.STORAGE[dtype])

    def write_softmax(
        self, scores: Tensor, tile: Tile, masks: TileMasks, positive_scores: Tensor, row_weights: Tensor,
        losses: Tensor, residuals: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        vectors = positive_scores, row_weights, losses, residuals
        self.ops.tile_softmax.default(*_place_of(scores, tile), *masks, *vectors, self.STORAGE[dtype])

    def positive_scores(self, queries: Tensor, documents: Tensor, positives: Tensor, temperature: Tensor) -> Tensor:
        scores = queries.new_empty(len(queries), dtype=torch.float32)
        self.ops.tile_positive_scores.default(queries, documents, positives, temperature, scores)
        return scores

    def add_positives(
        self, queries: Tensor, documents: Tensor, positives: Tensor, factors: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        order = torch.argsort(positives, stable=True)  # rows of one positive are summed one after the other
        self.ops.tile_add_positives.default(queries, documents, positives, *factors, order, *gradients)


def _place_of(scores: Tensor, tile: Tile) -> tuple[Tensor, int, int, int]:
    return scores, tile.columns, tile.first_row, tile.first_column


def shares_of(scores: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The gradients of scores [groups, rows, columns], where the kernels have put them: at the start of each row."""
    return scores.view(dtype)[..., :columns]


class Workspace:
    """Memory for the scores of one tile after the other."""

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.empty(0, dtype=torch.float32, device=device)

    def scores(self, tile: Tile) -> Tensor:
        """[groups, rows, stride] float32, undefined; it ends that of the tile before."""
        stride = stride_of(tile.columns)
        wanted = tile.all_rows * stride
        if self.numbers.numel() < wanted:
            self.numbers = self.numbers.new_empty(0)  # given back before more is asked for
            self.numbers = self.numbers.new_empty(wanted)
        return self.numbers[:wanted].view(tile.groups, tile.rows, stride)


def stride_of(columns: int) -> int:
    """Floats from one row of scores to the next: kernels read four at once, matrix products like 32 bytes."""
    return -(-columns // 8) * 8


class Side:
    """All queries or all documents, in the order of the tiles."""

    def __init__(self, embeddings: Tensor, order: Tensor | None) -> None:
        """order [n] int64 on the host: which embeddings are in tiles; None = all, as they are."""
        self.embeddings, self.order, self.index = embeddings, order, order
        if order is not None and embeddings.is_cuda:
            self.index = order.pin_memory().to(embeddings.device, non_blocking=True)  # without waiting for it

    @property
    def copied_rows(self) -> int | None:
        """How many may have to be copied together; None = they lie as they are, nothing is copied."""
        if self.order is None:
            return None
        return max(1, COPY_BYTES // 2 // _copied_bytes(self.embeddings))

    def place(self, first: int, count: int) -> slice | Tensor:
        """Where some lie that follow each other in the order: a slice, which copies nothing, or int64 [count]."""
        if self.order is None or self.index is None:
            return slice(first, first + count)
        order = self.order[first : first + count]
        start = int(order[0])
        if torch.equal(order, torch.arange(start, start + count)):
            return slice(start, start + count)
        return self.index[first : first + count]

    def take(self, first: int, count: int) -> Tensor:
        """[count, width] of them."""
        place = self.place(first, count)
        return self.embeddings[place] if isinstance(place, slice) else self.embeddings.index_select(0, place)

    @property
    def count(self) -> int:
        """How many are in tiles."""
        return len(self.embeddings if self.order is None else self.order)

    def sort(self, values: Tensor) -> Tensor:
        """What belongs to all, in the order of the tiles."""
        return values if self.index is None else values.index_select(0, self.index)

    def sort_given(self, values: Tensor | None) -> Tensor | None:
        """The same, of what may be absent."""
        return None if values is None else self.sort(values)

    def unsort(self, values: Tensor, fill: float) -> Tensor:
        """The inverse; `fill` for those that are in no tile."""
        if self.index is None:
            return values
        return values.new_full((len(self.embeddings),), fill).index_copy_(0, self.index, values)

    def positions(self, places: Tensor) -> Tensor:
        """Of int64 numbers of embeddings, their numbers in the order of the tiles; -1 for what is in no tile."""
        if self.index is None:
            return places
        last = max(0, len(self.embeddings) - 1)
        position = places.new_full((last + 1,), -1)
        position.index_copy_(0, self.index, torch.arange(len(self.index), device=places.device))
        nearest = places.clamp(0, last)
        return position[nearest].masked_fill_(nearest != places, -1)


def _copied_bytes(embeddings: Tensor) -> int:
    """Of one copied embedding: itself and its float32 gradient."""
    return max(1, embeddings.shape[1] * (embeddings.element_size() + 4))


def group_tiles(
    queries: Tensor, documents: Tensor, query_group: Tensor, document_group: Tensor
) -> tuple[Side, Side, list[Tile]]:
    """Both sides in the order of their groups, and one tile for each group, or for several small ones of one shape.

    query_group, document_group   int64 on the host. A group without rows or without columns is in no tile.
    """
    row_order, column_order, shapes = tiles.sorted_by_shape(query_group, document_group)
    row_bytes = max(_copied_bytes(queries), _copied_bytes(documents))
    found: list[Tile] = []
    first_row = first_column = 0
    for rows, columns, num_groups in shapes:
        scores = SUM_BYTES // (4 * rows * stride_of(columns))
        together = min(scores, COPY_BYTES // (row_bytes * (rows + columns)))
        if rows * columns > BATCHED_SCORES:
            together = 1
        for first in range(0, num_groups, max(1, together)):
            groups = min(max(1, together), num_groups - first)
            found.append(Tile(first_row + first * rows, first_column + first * columns, groups, rows, columns))
        first_row += rows * num_groups
        first_column += columns * num_groups
    return Side(queries, row_order), Side(documents, column_order), found


def cut(tile: Tile, *, most_rows: int, most_columns: int) -> Iterator[Tile]:
    """Parts of a tile, rows outside; a tile of several groups is one part."""
    if tile.groups > 1:
        yield tile
        return
    for row, rows in spans(tile.rows, most_rows):
        for column, columns in spans(tile.columns, most_columns):
            yield Tile(tile.first_row + row, tile.first_column + column, 1, rows, columns)


def spans(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of as few parts as `most` allows, of nearly one size: a last small one would waste a launch."""
    size = total
    if total > most:
        if most >= ALIGNMENT:
            most -= most % ALIGNMENT
        size = min(most, math.ceil(total / math.ceil(total / most) / ALIGNMENT) * ALIGNMENT)
    for first in range(0, total, max(1, size)):
        yield first, min(size, total - first)
