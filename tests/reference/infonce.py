"""InfoNCE one row at a time, in float64 and in words: slow, obvious, differentiable by autograd."""

import torch


def row_columns(row, scores, positive, query_group, document_group, document_ids, known, margin, keep_duplicates):
    """Columns of the negatives of one row."""
    kept = []
    for column in range(len(scores)):
        if column == positive:
            continue
        if query_group is not None and query_group[row] != document_group[column]:
            continue
        if document_ids is not None:
            if not keep_duplicates and document_ids[column] == document_ids[positive]:
                continue
            if known is not None and any(document_ids[column] == k and k != -1 for k in known[row]):
                continue
        if margin is not None and scores[column] > scores[positive] - margin:
            continue
        kept.append(column)
    return kept


def log_odds(negatives, positive):
    """log(1 + sum of e^(negative - positive)), for any size of them; 0 without negatives."""
    if len(negatives) == 0:
        return 0 * positive
    against = torch.logsumexp(negatives - positive, dim=0)
    return torch.logaddexp(against, torch.zeros_like(against))


def slow_infonce(
    queries,
    documents,
    positives,
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
):
    """Per-row losses [rows] float64; the arguments are those of grouped_infonce."""
    cosines = queries.double() @ documents.double().T
    logits = cosines / temperature
    weighted = logits if column_weights is None else logits + column_weights.double().log()
    lists = [None if x is None else x.tolist() for x in (query_group, document_group, document_ids, known_positive_ids)]
    options = *lists, false_negative_margin, keep_duplicates
    scores, columns = cosines.tolist(), positives.tolist()
    negatives = [row_columns(row, scores[row], column, *options) for row, column in enumerate(columns)]
    losses = []
    for row, column in enumerate(columns):
        loss = log_odds(weighted[row, negatives[row]], logits[row, column])
        if symmetric:
            others = [other for other in range(len(columns)) if column in negatives[other]]
            loss = (loss + log_odds(logits[others, column], logits[row, column])) / 2
        losses.append(loss)
    return torch.stack(losses) if losses else logits.sum() * torch.zeros(0, dtype=torch.float64)
