"""The sums and gradients of grouped InfoNCE on a GPU: matrix products by torch, the rest of a tile by own kernels.

The three functions are what torch_core.py has under the same names. Nothing here waits for the device, sizes are known
on the host, and memory comes from torch's allocator: they can be captured in a CUDA graph. The exception are groups
that lie on the host: they decide the sizes of the tiles, and a graph would replay those of its capture.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.losses import cuda_tiles
from tdro_hpc.losses.cuda_tiles import (
    Kernels,
    Side,
    Tile,
    TileMasks,
    TileOps,
    Workspace,
    cut,
    group_tiles,
    shares_of,
    spans,
)
from tdro_hpc.losses.torch_core import split_totals

# Rows of a panel with all its columns, from which on three products and the gradients of the columns read and written
# once more for each panel cost less than a fourth product and one more pass over the scores.
PANEL_ROWS = 1024
LARGEST_FLOAT16_SHARE = 8192.0  # sums of a few stay in range, and 1e-8 of it is still a normal number
SOFTPLUS_THRESHOLD = 40  # log(1 + e^x) is x above it
TILE_OPS = TileOps()


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
    *,
    kernels: Kernels = TILE_OPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch_core.forward gives, for float32, bfloat16 and float16.

    temperature                    on the host or the device
    query_group, document_group    on the host: work is the sum of the groups' blocks; on the device: groups are
                                   compared within tiles of all rows and columns
    A positive that is no column, without positive_scores, has the score NaN.
    """
    with _exactly(queries):
        temperature = _on_device(temperature, queries)
        if positive_scores is None:
            found = kernels.positive_scores(queries, documents, positives, temperature)
        else:
            found = positive_scores.clone()  # an operator may not return what it was given
        rest = query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights
        call = _call(kernels, queries, documents, positives, found, temperature, *rest)
        row_sums = _no_scores(call.queries)
        column_sums = _no_scores(call.documents) if symmetric else None
        for tile in call.tiles:
            _add_sums(call, tile, row_sums, column_sums)
        row_negatives = call.queries.unsort(_logsumexp(row_sums), -torch.inf)
        if column_sums is None:
            return found, row_negatives, row_negatives.new_empty(0)
        return found, row_negatives, call.documents.unsort(_logsumexp(column_sums), -torch.inf)


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
    *,
    kernels: Kernels = TILE_OPS,
) -> tuple[Tensor, Tensor]:
    """What torch_core.backward gives: [rows, width] and [columns, width] float32."""
    with _exactly(queries):
        temperature = _on_device(temperature, queries)
        rest = query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights
        call = _call(kernels, queries, documents, positives, positive_scores, temperature, *rest)
        factors = [row_factors] if column_factors is None else [row_factors, column_factors]
        gain, undo = _gain(queries.dtype, temperature, factors)
        of_rows = call.queries.sort(row_totals), call.queries.sort(row_factors * gain)
        of_columns = None
        if column_totals is not None and column_factors is not None:
            of_columns = call.documents.sort(column_totals), call.documents.sort(column_factors * gain)
        gradients = _no_gradients(call)
        for tile in call.tiles:
            _add_gradients(call, tile, of_rows, of_columns, gradients)
        _add_positives(call, positives, positive_factors / temperature, undo, gradients)
    return gradients


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
    *,
    kernels: Kernels = TILE_OPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch_core.forward_backward gives; three matrix products where panels of rows have all columns in memory."""
    with _exactly(queries):
        temperature = _on_device(temperature, queries)
        found = kernels.positive_scores(queries, documents, positives, temperature)
        rest = query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights
        call = _call(kernels, queries, documents, positives, found, temperature, *rest)
        gain, undo = _gain(queries.dtype, temperature, [row_weights])
        scores, weights = call.queries.sort(found), call.queries.sort(row_weights * gain)
        losses = torch.zeros_like(scores)
        gradients = _no_gradients(call)
        row_sums = _no_scores(call.queries)
        for tile in call.tiles:
            if tile.groups > 1 or _panel_rows(call, tile) >= min(PANEL_ROWS, tile.rows):
                _add_softmax(call, tile, scores, weights, losses, gradients)
                continue
            _add_sums(call, tile, row_sums, None)
            rows = slice(tile.first_row, tile.first_row + tile.rows)
            excess = _logsumexp((row_sums[0][rows], row_sums[1][rows])) - scores[rows]
            losses[rows] = torch.nn.functional.softplus(excess, threshold=SOFTPLUS_THRESHOLD)
            totals, gains = split_totals(scores.double() + losses, torch.float32)
            _add_gradients(call, tile, (totals, weights * gains), None, gradients)
        losses = call.queries.unsort(losses, 0.0)
        factors = row_weights * torch.expm1(-losses) / temperature  # of the positives: their share - 1
        _add_positives(call, positives, factors, undo, gradients)
    return losses, *gradients


def register() -> None:
    """Let torch.ops.tdro_hpc.infonce_* call these functions for tensors on a GPU. To be called once, after loading."""
    for function in (forward, backward, forward_backward):
        torch.library.impl(f"tdro_hpc::infonce_{function.__name__}", "cuda", function)


@dataclass(frozen=True)
class _Call:
    """Everything that the tiles of one call share."""

    kernels: Kernels
    queries: Side
    documents: Side
    tiles: list[Tile]
    masks: TileMasks
    workspace: Workspace
    dtype: torch.dtype  # of the embeddings, and of what is made of scores for matrix products
    residuals: Tensor | None  # float32 [rows in tiles], what that type takes off the shares of each row

    def chunks(self, tile: Tile) -> list[tuple[int, int]]:
        """(first, count) of columns of the tile that are read together: all, unless they have to be copied."""
        copied = self.documents.copied_rows
        return [(0, tile.columns)] if tile.groups > 1 or copied is None else list(spans(tile.columns, copied))

    def queries_of(self, tile: Tile) -> Tensor:
        """[groups, rows, width]."""
        return self.queries.take(tile.first_row, tile.all_rows).unflatten(0, (tile.groups, tile.rows))

    def documents_of(self, tile: Tile, first: int, count: int) -> Tensor:
        """[groups, count, width] of its columns."""
        taken = self.documents.take(tile.first_column + first, tile.groups * count)
        return taken.unflatten(0, (tile.groups, count))


def _call(
    kernels: Kernels,
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
) -> _Call:
    rows, columns = Side(queries, None), Side(documents, None)
    tiles = [Tile(0, 0, 1, len(queries), len(documents))]
    if query_group is not None and document_group is not None and not kernels.compares_groups(query_group):
        _refuse_capture(queries)
        rows, columns, tiles = group_tiles(queries, documents, query_group, document_group)
        query_group = document_group = None  # of a tile, all rows meet all columns
    limits = None if margin is None else positive_scores * temperature - margin
    masks = TileMasks(
        temperature,
        rows.sort(columns.positions(positives)),
        query_group,
        document_group,
        columns.sort_given(column_ids),
        rows.sort_given(positive_ids),
        rows.sort_given(known_ids),
        rows.sort_given(limits),
        columns.sort_given(log_weights),
    )
    half = queries.dtype != torch.float32
    residuals = queries.new_zeros(rows.count, dtype=torch.float32) if half else None
    return _Call(kernels, rows, columns, tiles, masks, Workspace(queries.device), queries.dtype, residuals)


def _refuse_capture(queries: Tensor) -> None:
    if queries.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "query_group is on the host: a CUDA graph would replay the tiles of these groups for ever. Move it and "
            "document_group to the device; groups are then compared within tiles of all rows and columns."
        )


def _on_device(temperature: Tensor, queries: Tensor) -> Tensor:
    """[] float32; one from the host is written there by a kernel, since a copy would wait for the device."""
    if temperature.device == queries.device:
        return temperature.to(torch.float32)
    return torch.full((), float(temperature), dtype=torch.float32, device=queries.device)


def _no_scores(side: Side) -> tuple[Tensor, Tensor]:
    lowest = side.embeddings.new_full((side.count,), torch.finfo(torch.float32).min, dtype=torch.float32)
    return lowest, torch.zeros_like(lowest)


def _logsumexp(sums: tuple[Tensor, Tensor]) -> Tensor:
    return sums[0].double() + sums[1].double().log()  # -inf for sums of nothing


def _gain(dtype: torch.dtype, temperature: Tensor, factors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What shares are multiplied by before they are stored, and what gradients are multiplied by at the end.

    float16 loses numbers below 6e-8, and factors are of the order of 1 / rows: the largest is brought near the top of
    its range. The other types hold the quotient by the temperature, and nothing is left to do at the end.
    """
    if dtype != torch.float16:
        return 1 / temperature, None
    largest = torch.stack([factor.abs().max() for factor in factors if len(factor)] or [torch.ones_like(temperature)])
    gain = LARGEST_FLOAT16_SHARE / largest.max().clamp_min(torch.finfo(torch.float32).tiny * LARGEST_FLOAT16_SHARE)
    return gain, 1 / (gain * temperature)


def _no_gradients(call: _Call) -> tuple[Tensor, Tensor]:
    """Zeros, or memory that the first tile of each row and column overwrites."""
    sides = call.queries.embeddings, call.documents.embeddings
    covered = call.queries.order is None and min(map(len, sides)) > 0
    make = torch.empty_like if covered else torch.zeros_like
    queries, documents = (make(side, dtype=torch.float32) for side in sides)
    return queries, documents


def _add_positives(
    call: _Call, positives: Tensor, factors: Tensor, undo: Tensor | None, gradients: tuple[Tensor, Tensor]
) -> None:
    """Finish the gradients: undo the gain, and add the positives, whose products have the gradients `factors` [rows].

    The shares of a row and its positive cancel where documents are alike, but their rounding errors do not. What
    rounding took off the shares is given to the positive, so that an error counts by how much a document differs from
    it: at low temperatures with mined negatives the gradient of a query is ten times as exact.
    """
    of_queries = factors
    if call.residuals is not None:
        residuals = call.queries.unsort(call.residuals, 0.0)
        of_queries = factors + (residuals if undo is None else residuals * undo)
    if undo is not None:
        gradients[0].mul_(undo)
        gradients[1].mul_(undo)
    sides = call.queries.embeddings, call.documents.embeddings
    call.kernels.add_positives(*sides, positives, (of_queries, factors), gradients)


def _products(call: _Call, tile: Tile) -> Tensor:
    """The products [groups, rows, stride] of a tile; beyond its columns, whatever was there."""
    scores, queries = call.workspace.scores(tile), call.queries_of(tile)
    for first, count in call.chunks(tile):
        documents = call.documents_of(tile, first, count)
        call.kernels.multiply(queries, documents.mT, scores[..., first : first + count], accumulate=False)
    return scores


def _add_sums(
    call: _Call, whole: Tile, row_sums: tuple[Tensor, Tensor], column_sums: tuple[Tensor, Tensor] | None
) -> None:
    rows = min(whole.rows, cuda_tiles.SUM_ROWS, call.queries.copied_rows or whole.rows)
    columns = max(1, cuda_tiles.SUM_BYTES // (4 * max(1, rows)))
    for tile in cut(whole, most_rows=rows, most_columns=columns):
        scores = _products(call, tile)
        call.kernels.sum_rows(scores, tile, call.masks, row_sums)
        if column_sums is not None:
            call.kernels.sum_columns(scores, tile, call.masks, column_sums)


def _add_gradients(
    call: _Call,
    whole: Tile,
    of_rows: tuple[Tensor, Tensor],
    of_columns: tuple[Tensor, Tensor] | None,
    gradients: tuple[Tensor, Tensor],
) -> None:
    """Columns inside, as many at once as fit with as many rows: a gradient is read and written once for each tile."""
    rows = min(whole.rows, cuda_tiles.GRADIENT_ROWS, call.queries.copied_rows or whole.rows)
    columns = max(1, cuda_tiles.SCORE_BYTES // (4 * max(1, rows)))
    for tile in cut(whole, most_rows=rows, most_columns=columns):
        scores = _products(call, tile)
        call.kernels.write_shares(scores, tile, call.masks, of_rows, of_columns, call.residuals, call.dtype)
        _spread(call, whole, tile, scores, gradients)


def _panel_rows(call: _Call, tile: Tile) -> int:
    """Rows whose scores of all columns are in memory at once."""
    fitting = cuda_tiles.SCORE_BYTES // (4 * cuda_tiles.stride_of(max(1, tile.columns)))
    return min(tile.rows, fitting, call.queries.copied_rows or tile.rows)


def _add_softmax(
    call: _Call,
    whole: Tile,
    positive_scores: Tensor,
    row_weights: Tensor,
    losses: Tensor,
    gradients: tuple[Tensor, Tensor],
) -> None:
    for tile in cut(whole, most_rows=max(1, _panel_rows(call, whole)), most_columns=max(1, whole.columns)):
        scores = _products(call, tile)
        vectors = positive_scores, row_weights, losses, call.residuals
        call.kernels.write_softmax(scores, tile, call.masks, *vectors, call.dtype)
        _spread(call, whole, tile, scores, gradients)


def _spread(call: _Call, whole: Tile, tile: Tile, scores: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
    """Add what the shares of a part of a tile make of the embeddings to the gradients."""
    shares, queries = shares_of(scores, tile.columns, call.dtype), call.queries_of(tile)
    rows = call.queries.place(tile.first_row, tile.all_rows)
    for first, count in call.chunks(tile):
        documents, part = call.documents_of(tile, first, count), shares[..., first : first + count]
        columns = call.documents.place(tile.first_column + first, tile.groups * count)
        again = tile.first_column + first > whole.first_column
        _add_product(call.kernels, part, documents, gradients[0], rows, accumulate=again)
        _add_product(call.kernels, part.mT, queries, gradients[1], columns, accumulate=tile.first_row > whole.first_row)


def _add_product(
    kernels: Kernels, left: Tensor, right: Tensor, gradient: Tensor, place: slice | Tensor, *, accumulate: bool
) -> None:
    shape = *left.shape[:2], right.shape[2]
    if isinstance(place, slice):
        kernels.multiply(left, right, gradient[place].view(shape), accumulate=accumulate)
        return
    product = gradient.new_empty(shape)
    kernels.multiply(left, right, product, accumulate=False)
    gradient.index_add_(0, place, product.flatten(0, 1))  # zeros at first; no place is there twice, so no sum is random


@contextmanager
def _exactly(queries: Tensor) -> Iterator[None]:
    """On the device of the queries, without gradients, autocast, TF32, or sums in half precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_fp16_accumulation
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(queries.device.type, enabled=False))
        if queries.is_cuda:
            stack.enter_context(torch.cuda.device(queries.device))
        try:
            matmul.fp32_precision, matmul.allow_fp16_accumulation = "ieee", False
            yield
        finally:
            matmul.fp32_precision, matmul.allow_fp16_accumulation = before
