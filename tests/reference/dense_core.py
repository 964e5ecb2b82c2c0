"""The operators of the loss with all scores in memory, in float64: short, and shares nothing with the package."""

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
