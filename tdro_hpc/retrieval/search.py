"""Query vectors and document embeddings in, the exact top-k of every query out. Knows no texts and no ids.

Both backends only choose candidates; scores and order come from one computation that they share, so faiss and torch
give the same documents, the same scores and the same order. Equal scores stand in document order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tdro_hpc.retrieval.embeddings import Embeddings

QUERIES_AT_ONCE = 1024
DOCUMENTS_AT_ONCE = 65_536  # rows of one block: memory is bounded by it, whatever the size of the corpus
_SPARE = 64  # candidates beyond k, so that rounding can hardly move a document across the edge

# (queries [q, width], documents [n, width], k) -> (scores [q, k] float32, rows [q, k] int64), k <= n
Selector = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Hits:
    """Best documents of every query, best first."""

    documents: np.ndarray  # int64 [queries, k], number of the document
    scores: np.ndarray  # float32 [queries, k], inner products


def search_exact(queries: np.ndarray, documents: Embeddings, *, top_k: int, backend: str, device: torch.device) -> Hits:
    """The `top_k` documents with the largest inner product, or all where there are fewer.

    queries  [queries, width] float32       documents  [documents, width] float32, read in blocks
    backend  auto = torch on a GPU, else faiss where it is installed, else torch; faiss (CPU); torch (on `device`)
    raises   ValueError if faiss is asked for and missing, or if the widths differ
    """
    if queries.shape[1] != documents.width:
        raise ValueError(
            f"Queries are {queries.shape[1]} numbers wide and documents {documents.width}: "
            "they come from different models. Encode both with one model."
        )
    select = _selector(backend, device)
    top_k = min(top_k, documents.num_rows)
    pieces = [
        _search_batch(queries[start : start + QUERIES_AT_ONCE], documents, top_k, select)
        for start in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    if not pieces:
        return Hits(np.zeros((0, top_k), np.int64), np.zeros((0, top_k), np.float32))
    found = np.concatenate([piece.documents for piece in pieces])
    return Hits(found, np.concatenate([piece.scores for piece in pieces]))


def _search_batch(queries: np.ndarray, documents: Embeddings, top_k: int, select: Selector) -> Hits:
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    wanted = min(top_k + _SPARE, documents.num_rows)
    scores, found, largest = _candidates(queries, documents, wanted, select)
    hits = Hits(np.empty((len(queries), top_k), np.int64), np.empty((len(queries), top_k), np.float32))
    unsure = []
    for row, query in enumerate(queries):
        hits.documents[row], hits.scores[row] = _ordered(query, found[row], documents, top_k)
        # What was not chosen scores at most the worst candidate, give or take the rounding of a float32 sum.
        slack = 2 * _rounding(query, largest)
        if wanted < documents.num_rows and scores[row, -1] + slack >= hits.scores[row, -1]:
            unsure.append(row)
    if unsure:
        _settle(hits, unsure, queries, documents, largest, top_k)
    return hits


def _candidates(
    queries: np.ndarray, documents: Embeddings, wanted: int, select: Selector
) -> tuple[np.ndarray, np.ndarray, float]:
    """Roughly the best `wanted` of each query over all blocks, best first, and the length of the longest document."""
    best_scores = np.empty((len(queries), 0), np.float32)
    best = np.empty((len(queries), 0), np.int64)
    largest = 0.0
    for numbers, vectors in documents.blocks(DOCUMENTS_AT_ONCE):
        largest = max(largest, float(np.sqrt(np.einsum("ij,ij->i", vectors, vectors).max())))
        block_scores, rows = select(queries, vectors, min(wanted, len(numbers)))
        best_scores = np.concatenate([best_scores, block_scores], axis=1)
        best = np.concatenate([best, numbers[rows]], axis=1)
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :wanted]
        best_scores, best = np.take_along_axis(best_scores, order, 1), np.take_along_axis(best, order, 1)
    return best_scores, best, largest


def _ordered(query: np.ndarray, found: np.ndarray, documents: Embeddings, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `top_k` of some documents, by scores summed in float64 and rounded once, then by document order."""
    numbers = np.sort(found)
    # Row by row, not a matrix product: its sums run in an order that depends on the shape of the block.
    products = documents.rows(numbers).astype(np.float64) * query.astype(np.float64)
    scores = products.sum(axis=1).astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return numbers[order], scores[order]


def _rounding(query: np.ndarray, largest: float) -> float:
    """Bound on the error of a float32 inner product of this query: width x 2^-24 x both lengths."""
    return len(query) * 2.0**-24 * float(np.linalg.norm(query)) * largest


def _settle(
    hits: Hits, unsure: list[int], queries: np.ndarray, documents: Embeddings, largest: float, top_k: int
) -> None:
    """Second pass for queries whose k-th place is nearly tied: look at every document that could hold it."""
    num_together = 16
    for start in range(0, len(unsure), num_together):
        rows = unsure[start : start + num_together]
        floors = np.array([hits.scores[row, -1] - 2 * _rounding(queries[row], largest) for row in rows])
        possible: list[list[np.ndarray]] = [[] for _ in rows]
        for numbers, vectors in documents.blocks(DOCUMENTS_AT_ONCE):
            within = queries[rows] @ vectors.T >= floors[:, None]
            for position, inside in enumerate(within):
                possible[position].append(numbers[inside])
        for position, row in enumerate(rows):
            found = np.concatenate(possible[position])
            hits.documents[row], hits.scores[row] = _ordered(queries[row], found, documents, top_k)


def _selector(backend: str, device: torch.device) -> Selector:
    assert backend in ("auto", "faiss", "torch"), f"eval.search={backend!r} was not caught by the schema"
    if backend == "torch" or (backend == "auto" and device.type != "cpu"):
        return _torch_selector(device)
    try:
        import faiss
    except ImportError as error:
        if backend == "auto":
            return _torch_selector(device)
        raise ValueError(
            "eval.search is faiss, and the package faiss is not installed. "
            "Type: pip install faiss-cpu, or set eval.search=torch (same answers)."
        ) from error
    return _faiss_selector(faiss)


def _faiss_selector(faiss: object) -> Selector:
    def select(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        index = faiss.IndexFlatIP(documents.shape[1])  # type: ignore[attr-defined]
        index.add(documents)
        return index.search(queries, k)

    return select


def _torch_selector(device: torch.device) -> Selector:
    def select(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would break the rounding bound
        try:
            scores = torch.from_numpy(queries).to(device) @ torch.from_numpy(documents).to(device).T
            best = torch.topk(scores, k, dim=1)
        finally:
            torch.set_float32_matmul_precision(precision)
        return best.values.numpy(force=True), best.indices.numpy(force=True)

    return select
