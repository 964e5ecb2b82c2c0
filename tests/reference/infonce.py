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
):
    """Per-row losses [rows] float64; the arguments are those of grouped_infonce."""
    queries, documents = queries.double(), documents.double()
    losses = []
    for row, positive in enumerate(positives.tolist()):
        scores = documents @ queries[row]
        lists = [None if x is None else x.tolist() for x in (query_group, document_group, document_ids)]
        known = None if known_positive_ids is None else known_positive_ids.tolist()
        negatives = row_columns(row, scores.tolist(), positive, *lists, known, false_negative_margin, keep_duplicates)
        if not negatives:
            losses.append(0 * scores[positive])
            continue
        against = torch.logsumexp((scores[negatives] - scores[positive]) / temperature, dim=0)
        losses.append(torch.logaddexp(against, torch.zeros_like(against)))  # log(1 + e^against), for any size of it
    return torch.stack(losses) if losses else queries.sum() * torch.zeros(0, dtype=torch.float64)
