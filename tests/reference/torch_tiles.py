"""What the CUDA kernels do on a tile, in plain torch: for tests of how tiles are put together, on the CPU."""

import math

import torch

from tdro_hpc.losses.cuda_tiles import shares_of


class TorchTiles:
    def __init__(self, *, groups_in_tiles=False):
        self.groups_in_tiles = groups_in_tiles

    def compares_groups(self, group):
        return self.groups_in_tiles

    def multiply(self, left, right, out, *, accumulate):
        assert left.dtype == right.dtype and out.dtype == torch.float32 and out.shape[0] == left.shape[0]
        product = left.float() @ right.float()
        out.add_(product) if accumulate else out.copy_(product)

    def negatives(self, scores, tile, masks):
        """Scores of a tile [groups, rows, columns], -inf where they do not count."""
        rows = slice(tile.first_row, tile.first_row + tile.all_rows)
        columns = slice(tile.first_column, tile.first_column + tile.all_columns)

        def of_rows(values):
            return values[rows].view(tile.groups, tile.rows, 1)

        def of_columns(values):
            return values[columns].view(tile.groups, 1, tile.columns)

        products = scores[..., : tile.columns].clone()
        counts = of_columns(torch.arange(columns.stop)) != of_rows(masks.positives)
        if masks.query_group is not None:
            counts = counts & (of_rows(masks.query_group) == of_columns(masks.document_group))
        if masks.positive_ids is not None:
            counts = counts & (of_rows(masks.positive_ids) != of_columns(masks.column_ids))
        for known in () if masks.known_ids is None else masks.known_ids.unbind(1):
            counts = counts & ~((of_rows(known) == of_columns(masks.column_ids)) & (of_rows(known) != -1))
        if masks.limits is not None:
            counts = counts & ~(products > of_rows(masks.limits))
        found = products / masks.temperature
        if masks.log_weights is not None:
            found += of_columns(masks.log_weights)
        return found.masked_fill(~counts, -math.inf)

    def sum_rows(self, scores, tile, masks, row_sums):
        found = torch.logsumexp(self.negatives(scores, tile, masks), dim=2).flatten()
        self._merge(row_sums, slice(tile.first_row, tile.first_row + tile.all_rows), found)

    def sum_columns(self, scores, tile, masks, column_sums):
        found = torch.logsumexp(self.negatives(scores, tile, masks), dim=1).flatten()
        self._merge(column_sums, slice(tile.first_column, tile.first_column + tile.all_columns), found)

    def _merge(self, sums, place, found):
        before = sums[0][place] + sums[1][place].log()
        total = torch.logaddexp(before, found)
        sums[0][place] = total.clamp_min(torch.finfo(torch.float32).min)
        sums[1][place] = torch.where(total == -math.inf, 0.0, 1.0)

    def write_shares(self, scores, tile, masks, rows, columns, residuals, dtype):
        found = self.negatives(scores, tile, masks)
        place = slice(tile.first_row, tile.first_row + tile.all_rows)
        totals, factors = (vector[place].view(tile.groups, tile.rows, 1) for vector in rows)
        shares = factors * torch.exp(found - totals)
        if columns is not None:
            place = slice(tile.first_column, tile.first_column + tile.all_columns)
            totals, factors = (vector[place].view(tile.groups, 1, tile.columns) for vector in columns)
            shares = shares + factors * torch.exp(found - totals)
        shares = shares.masked_fill(found == -math.inf, 0)
        if residuals is not None:
            residuals[slice(tile.first_row, tile.first_row + tile.all_rows)] += (
                (shares - shares.to(dtype)).sum(2).flatten()
            )
        shares_of(scores, tile.columns, dtype).copy_(shares)

    def write_softmax(self, scores, tile, masks, positive_scores, row_weights, losses, residuals, dtype):
        place = slice(tile.first_row, tile.first_row + tile.all_rows)
        found = torch.logsumexp(self.negatives(scores, tile, masks), dim=2).flatten() - positive_scores[place]
        losses[place] = torch.logaddexp(found, torch.zeros_like(found))
        totals = torch.zeros_like(positive_scores)
        totals[place] = positive_scores[place] + losses[place]
        self.write_shares(scores, tile, masks, (totals, row_weights), None, residuals, dtype)

    def positive_scores(self, queries, documents, positives, temperature):
        inside = (positives >= 0) & (positives < len(documents))
        found = torch.full((len(queries),), math.nan)
        pairs = queries[inside].float() * documents[positives[inside]].float()
        found[inside] = pairs.sum(dim=1) / temperature
        return found

    def add_positives(self, queries, documents, positives, factors, gradients):
        for row, column in enumerate(positives.tolist()):
            if 0 <= column < len(documents):
                gradients[0][row] += factors[0][row] * documents[column].float()
                gradients[1][column] += factors[1][row] * queries[row].float()
