import numpy as np
import pytest
import torch

from tdro_hpc.retrieval import search
from tdro_hpc.retrieval.embeddings import Embeddings
from tdro_hpc.retrieval.search import search_exact
from tests.reference.ranking import best_documents

CPU = torch.device("cpu")
BACKENDS = ["torch", "faiss", "auto"]


def unit_vectors(rows, width, seed):
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def find(queries, documents, top_k, backend="torch"):
    return search_exact(queries, documents, top_k=top_k, backend=backend, device=CPU)


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_equals_a_full_sort_over_several_blocks(backend, monkeypatch):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="faiss is an extra")
    monkeypatch.setattr(search, "DOCUMENTS_AT_ONCE", 70)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 5)
    queries, documents = unit_vectors(12, 16, 0), unit_vectors(400, 16, 1)
    hits = find(queries, Embeddings.of_array(documents), 30, backend)
    ids, scores = best_documents(queries, documents, 30)
    np.testing.assert_array_equal(hits.documents, ids)
    np.testing.assert_array_equal(hits.scores, scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_stand_in_document_order_also_at_the_edge(backend, monkeypatch):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="faiss is an extra")
    monkeypatch.setattr(search, "DOCUMENTS_AT_ONCE", 64)
    distinct = unit_vectors(4, 8, 2)
    # 100 copies of each: far more ties at the tenth place than candidates are spared.
    documents = distinct[np.random.default_rng(3).permutation(np.repeat(np.arange(4), 100))]
    queries = unit_vectors(6, 8, 4)
    hits = find(queries, Embeddings.of_array(documents), 10, backend)
    ids, scores = best_documents(queries, documents, 10)
    np.testing.assert_array_equal(hits.documents, ids)
    np.testing.assert_array_equal(hits.scores, scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_closer_than_float32_rounding_still_give_one_answer(backend, monkeypatch):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="faiss is an extra")
    monkeypatch.setattr(search, "DOCUMENTS_AT_ONCE", 64)
    centre = unit_vectors(1, 64, 5)
    documents = (centre + 3e-8 * np.random.default_rng(6).normal(size=(300, 64))).astype(np.float32)
    hits = find(centre, Embeddings.of_array(documents), 20, backend)
    ids, scores = best_documents(centre, documents, 20)
    np.testing.assert_array_equal(hits.documents, ids)
    np.testing.assert_array_equal(hits.scores, scores)


def test_vectors_without_unit_length_are_ranked_by_inner_product():
    documents = np.array([[1, 0], [3, 0], [0, 9]], np.float32)
    hits = find(np.array([[1, 0]], np.float32), Embeddings.of_array(documents), 2)
    assert hits.documents.tolist() == [[1, 0]] and hits.scores.tolist() == [[3, 1]]


def test_asking_for_more_than_there_is_gives_all():
    hits = find(unit_vectors(2, 4, 0), Embeddings.of_array(unit_vectors(3, 4, 1)), 1000)
    assert hits.documents.shape == (2, 3) and sorted(hits.documents[0]) == [0, 1, 2]


def test_no_queries_give_no_hits():
    assert find(np.zeros((0, 4), np.float32), Embeddings.of_array(unit_vectors(3, 4, 1)), 2).documents.shape == (0, 2)


def test_widths_that_differ_are_a_mistake_in_words():
    with pytest.raises(ValueError, match="4 numbers wide and documents 5"):
        find(unit_vectors(1, 4, 0), Embeddings.of_array(unit_vectors(3, 5, 1)), 2)


def test_faiss_asked_for_and_missing_says_what_to_type(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)  # makes `import faiss` fail
    documents = Embeddings.of_array(unit_vectors(3, 4, 1))
    with pytest.raises(ValueError, match="eval.search=torch"):
        find(unit_vectors(1, 4, 0), documents, 2, "faiss")
    assert find(unit_vectors(1, 4, 0), documents, 2, "auto").documents.shape == (1, 2)


def test_embeddings_in_parts_and_another_order_read_like_one_array():
    vectors, order = unit_vectors(10, 4, 7), np.random.default_rng(8).permutation(10)
    stored = vectors[order]
    embeddings = Embeddings([stored[:3], stored[3:6], stored[6:]], order)
    np.testing.assert_array_equal(embeddings.rows(np.array([9, 0, 4, 4])), vectors[[9, 0, 4, 4]])
    seen = [(numbers, block) for numbers, block in embeddings.blocks(4)]
    assert [len(numbers) for numbers, _ in seen] == [4, 4, 2]
    for numbers, block in seen:
        np.testing.assert_array_equal(block, vectors[numbers])
    assert sorted(np.concatenate([numbers for numbers, _ in seen])) == list(range(10))
