"""Which rows meet which columns: group ids in, a list of small score tiles out. Looks at no embedding.

Large groups are cut into blocks of rows and columns; many small groups of one shape become one batched tile. Rows and
columns of different groups never share a tile, so the work is the sum over groups of rows x columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 512  # a tile of float32 scores is 4 MiB at most: it stays in cache between its passes
BLOCK_COLUMNS = 2048
PANEL_SCORES = 2**22  # scores of a panel, 16 MiB of float32
PANEL_ROWS = 32  # a panel of very many columns has as many rows all the same: fewer would only wait for memory

RowsOf = Callable[[int], int]
Index = slice | Tensor  # of rows or columns: a range, int64 [rows], or int64 [groups, rows of one group]


@dataclass(frozen=True)
class RowBlock:
    """Rows and the blocks of columns that they are compared with; the k-th group of rows meets the k-th of columns."""

    rows: Index
    columns: list[Index]


def block_rows(num_columns: int) -> int:
    """Rows of a block whose tiles are made one after the other: as many as a tile has, whatever the columns."""
    return BLOCK_ROWS


def panel_rows(num_columns: int) -> int:
    """Rows of a block all of whose tiles are kept together: the more columns, the fewer."""
    return min(BLOCK_ROWS, max(PANEL_ROWS, PANEL_SCORES // max(1, num_columns)))


def row_ranges(num_rows: int) -> list[slice]:
    """All rows, a block at a time."""
    return list(_ranges(0, num_rows, BLOCK_ROWS))


def whole_blocks(num_rows: int, num_columns: int, rows_of: RowsOf = block_rows) -> list[RowBlock]:
    """Blocks that compare every row with every column."""
    columns: list[Index] = list(_ranges(0, num_columns, BLOCK_COLUMNS))
    return [RowBlock(rows, columns) for rows in _ranges(0, num_rows, rows_of(num_columns))]


def groups_on_host(query_group: Tensor | None, document_group: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both on the host, where the sizes of the groups decide the shapes of the tiles: one copy.

    As they are where a CUDA graph is captured, which forbids the copy.
    """
    if query_group is None or document_group is None or not query_group.is_cuda:
        return query_group, document_group
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        return query_group, document_group
    both = torch.cat([query_group, document_group]).to("cpu")
    return both[: len(query_group)], both[len(query_group) :]


def group_blocks(
    query_group: Tensor, document_group: Tensor, device: torch.device, rows_of: RowsOf = block_rows
) -> list[RowBlock]:
    """Blocks that compare each row with the columns of its group; rows of a group without columns are in none.

    query_group     [rows] int64, in any order       document_group  [columns] int64, in any order
    device          of the embeddings                rows_of         columns of a group -> most rows of a block
    """
    row_order, column_order, shapes = sorted_by_shape(query_group.to("cpu"), document_group.to("cpu"))
    rows_on_device, columns_on_device = row_order.to(device), column_order.to(device)
    blocks: list[RowBlock] = []
    first_row = first_column = 0
    for num_rows, num_columns, num_groups in shapes:
        row_spans = _Spans(row_order, rows_on_device, first_row, num_rows, num_groups)
        column_spans = _Spans(column_order, columns_on_device, first_column, num_columns, num_groups)
        blocks += _blocks_of_one_shape(row_spans, column_spans, rows_of(num_columns))
        first_row += num_rows * num_groups
        first_column += num_columns * num_groups
    return blocks


def sorted_by_shape(query_group: Tensor, document_group: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Rows and columns ordered so that groups are together, and groups of one shape are neighbours.

    returns  row order, column order, and (rows, columns, number of groups) of each shape, in that order
    Rows of groups without columns and columns of groups without rows are left out. The sorts are stable.
    """
    groups, row_to_group, group_rows = torch.unique(query_group, return_inverse=True, return_counts=True)
    nearest = torch.searchsorted(groups, document_group.contiguous()).clamp(max=max(0, len(groups) - 1))
    wanted = groups[nearest] == document_group if len(groups) else torch.zeros_like(document_group, dtype=torch.bool)
    column_to_group, kept_columns = nearest[wanted], wanted.nonzero().squeeze(1)
    group_columns = torch.bincount(column_to_group, minlength=len(groups))
    kept_rows = (group_columns[row_to_group] > 0).nonzero().squeeze(1)
    shape_key = group_rows * (len(document_group) + 1) + group_columns
    group_order = torch.argsort(shape_key, stable=True)
    place = torch.empty_like(group_order)
    place[group_order] = torch.arange(len(groups))
    row_order = kept_rows[torch.argsort(place[row_to_group[kept_rows]], stable=True)]
    column_order = kept_columns[torch.argsort(place[column_to_group], stable=True)]
    used = group_order[group_columns[group_order] > 0]
    keys, counts = torch.unique_consecutive(shape_key[used], return_counts=True)
    rows, columns = keys // (len(document_group) + 1), keys % (len(document_group) + 1)
    return row_order, column_order, list(zip(rows.tolist(), columns.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class _Spans:
    """The members of `num_groups` groups of `size` each, which lie one after the other in an order."""

    order: Tensor  # on the host, to see which spans are ranges
    order_on_device: Tensor
    first: int
    size: int
    num_groups: int

    def together(self, first_group: int, num_groups: int) -> Tensor:
        """Index [groups, size] of some of the groups."""
        start = self.first + first_group * self.size
        return self.order_on_device[start : start + num_groups * self.size].view(num_groups, self.size)

    def pieces(self, group: int, block: int) -> list[Index]:
        """One group cut into blocks; a block whose members are neighbours becomes a slice, which copies nothing."""
        start = self.first + group * self.size
        found: list[Index] = []
        for span in _ranges(start, start + self.size, block):
            low, high = int(self.order[span.start]), int(self.order[span.stop - 1])
            contiguous = high - low == span.stop - span.start - 1  # members rise within a group
            found.append(slice(low, high + 1) if contiguous else self.order_on_device[span])
        return found


def _blocks_of_one_shape(rows: _Spans, columns: _Spans, num_block_rows: int) -> Iterator[RowBlock]:
    tile_groups = min(
        BLOCK_ROWS * BLOCK_COLUMNS // (rows.size * columns.size),
        2 * BLOCK_COLUMNS // (rows.size + columns.size),  # bounds the embeddings that a batched tile copies
    )
    if tile_groups >= 2:
        for span in _ranges(0, rows.num_groups, tile_groups):
            size = span.stop - span.start
            yield RowBlock(rows.together(span.start, size), [columns.together(span.start, size)])
        return
    for group in range(rows.num_groups):
        column_pieces = columns.pieces(group, BLOCK_COLUMNS)
        for row_piece in rows.pieces(group, num_block_rows):
            yield RowBlock(row_piece, column_pieces)


def _ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
