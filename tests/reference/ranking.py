"""Slow and obvious figures of a ranking, and slow exact search."""

import math

import numpy as np


def ndcg_at_10(ranking, grades):
    """Linear gains, log2 discounts, best possible order of the judged documents below."""
    gains = [max(grades.get(document, 0), 0) for document, _ in ranking[:10]]
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:10]
    return _discounted(gains) / _discounted(ideal)


def _discounted(gains):
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def recall_at_100(ranking, grades):
    relevant = {document for document, grade in grades.items() if grade >= 1}
    found = {document for document, _ in ranking[:100]}
    return len(relevant & found) / len(relevant)


def mrr_at_10(ranking, grades):
    for place, (document, _) in enumerate(ranking[:10], start=1):
        if grades.get(document, 0) >= 1:
            return 1 / place
    return 0.0


def best_documents(queries, documents, top_k):
    """(ids, scores) by a full sort of float64 inner products rounded to float32; ties in document order."""
    ids, scores = [], []
    for query in queries:
        row = np.array([np.sum(query.astype(np.float64) * one.astype(np.float64)) for one in documents], np.float32)
        best = sorted(range(len(documents)), key=lambda number: (-row[number], number))[:top_k]
        ids.append(best)
        scores.append(row[best])
    return np.array(ids), np.array(scores)
