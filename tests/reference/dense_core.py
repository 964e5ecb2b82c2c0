"""The operators of the loss with all scores in memory, in float64: short, and shares nothing with the package."""

from typing import NamedTuple

import torch

MARGIN = 0.05 + 2**-17  # between two products of embeddings on_grid


def on_grid(embeddings):
    """Rounded to multiples of 2^-8: all types hold them, and float32 products are exact, so that no product lies on one
    side of a margin in float32 and on the other in float64."""
    return (embeddings * 256).round() / 256


def negatives(queries, documents, positives, positive_scores, temperature, masks):
    """Scores [rows, columns], and which of them count as negatives."""
    query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights = masks
    products = queries.double() @ documents.double().T
    counts = torch.arange(len(documents)) != positives[:, None]
    if query_group is not None:
        counts &= query_group[:, None] == document_group
    if positive_ids is not None:
        counts &= positive_ids[:, None] != column_ids
    if known_ids is not None:
        counts &= ~((known_ids[:, :, None] == column_ids) & (known_ids[:, :, None] != -1)).any(dim=1)
    if margin is not None:
        counts &= ~(products > (positive_scores * temperature - margin)[:, None])
    scores = products / temperature
    return (scores if log_weights is None else scores + log_weights.double()), counts


def forward(queries, documents, positives, positive_scores, temperature, *masks_and_symmetric):
    *masks, symmetric = masks_and_symmetric
    temperature = float(temperature)
    if positive_scores is None:
        positive_scores = (queries.double() * documents.double()[positives]).sum(dim=1) / temperature
    positive_scores = positive_scores.double()
    scores, counts = negatives(queries, documents, positives, positive_scores, temperature, masks)
    scores = scores.masked_fill(~counts, -torch.inf)
    column_negatives = torch.logsumexp(scores, dim=0) if symmetric else scores.new_empty(0)
    return positive_scores, torch.logsumexp(scores, dim=1), column_negatives


def backward(queries, documents, positives, positive_scores, temperature, *rest):
    masks, (row_totals, row_factors, positive_factors, column_totals, column_factors) = rest[:7], rest[7:]
    temperature = float(temperature)
    scores, counts = negatives(queries, documents, positives, positive_scores.double(), temperature, masks)
    shares = row_factors.double()[:, None] * torch.exp(scores - row_totals.double()[:, None])
    if column_totals is not None:
        shares = shares + column_factors.double() * torch.exp(scores - column_totals.double())
    shares = torch.where(counts, shares, 0.0)
    inside = (positives >= 0) & (positives < len(documents))
    shares[inside.nonzero()[:, 0], positives[inside]] += positive_factors.double()[inside]
    return shares @ documents.double() / temperature, shares.T @ queries.double() / temperature


def forward_backward(queries, documents, positives, row_weights, temperature, *masks):
    found, row_negatives, _ = forward(queries, documents, positives, None, temperature, *masks, False)
    excess = row_negatives - found
    losses = torch.logaddexp(excess, torch.zeros_like(excess))
    factors = row_weights.double() * torch.expm1(-losses)
    vectors = found + losses, row_weights, factors, None, None
    return losses, *backward(queries, documents, positives, found, temperature, *masks, *vectors)


class Results(NamedTuple):
    losses: torch.Tensor  # [rows]
    of_queries: torch.Tensor  # gradients of sum(row_weights * losses)
    of_documents: torch.Tensor
    of_temperature: torch.Tensor  # []


def losses_and_gradients(
    queries,
    documents,
    positives,
    row_weights,
    *,
    temperature,
    query_group=None,
    document_group=None,
    document_ids=None,
    known_positive_ids=None,
    false_negative_margin=None,
    keep_duplicates=False,
    column_weights=None,
    symmetric=False,
    chunk_rows=256,
):
    """Results of grouped_infonce and weighted_infonce with these arguments, in float64, some rows at a time."""
    queries, documents, weights = queries.double(), documents.double(), row_weights.double()
    positive_ids = None if document_ids is None or keep_duplicates else document_ids[positives]
    log_weights = None if column_weights is None else column_weights.double().log()
    of_columns = document_ids, positive_ids, known_positive_ids, false_negative_margin, log_weights

    def chunk(part):
        group, ids = None if query_group is None else query_group[part], [*of_columns]
        for place in (1, 2):
            ids[place] = None if ids[place] is None else ids[place][part]
        return queries[part], documents, positives[part], (group, document_group, *ids)

    parts = [slice(start, start + chunk_rows) for start in range(0, len(queries), chunk_rows)]
    found = []
    for part in parts:
        *sides, masks = chunk(part)
        found.append(forward(*sides, None, temperature, *masks, symmetric))
    positive_scores, row_negatives = (torch.cat([each[place] for each in found]) for place in (0, 1))
    losses, row_shares = _losses_and_shares(row_negatives - positive_scores)
    row_factors = weights * row_shares / (1 + symmetric)
    positive_factors, column_negatives, column_factors = -row_factors, None, None
    if symmetric:
        column_negatives = torch.stack([each[2] for each in found]).logsumexp(dim=0)
        others, column_shares = _losses_and_shares(column_negatives[positives] - positive_scores)
        losses, column_shares = (losses + others) / 2, weights * column_shares / 2
        positive_factors = positive_factors - column_shares
        column_factors = torch.zeros_like(column_negatives).index_add_(0, positives, column_shares)
    of_queries, of_documents = torch.zeros_like(queries), torch.zeros_like(documents)
    for part in parts:
        *sides, masks = chunk(part)
        shares = row_negatives[part], row_factors[part], positive_factors[part], column_negatives, column_factors
        gradients = backward(*sides, positive_scores[part], temperature, *masks, *shares)
        of_queries[part] = gradients[0]
        of_documents += gradients[1]
    return Results(losses, of_queries, of_documents, -(queries * of_queries).sum() / temperature)


def _losses_and_shares(excess):
    """log(1 + e^excess), and its derivative: the share of the negatives."""
    return torch.logaddexp(excess, torch.zeros_like(excess)), torch.sigmoid(excess)
