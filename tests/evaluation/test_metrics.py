import numpy as np
import pytest

from tdro_hpc.evaluation.metrics import METRICS, score_run
from tests.reference.ranking import mrr_at_10, ndcg_at_10, recall_at_100


def test_figures_equal_the_slow_computation_on_graded_judgements():
    draws = np.random.default_rng(0)
    documents = [f"d{number}" for number in range(300)]
    judgements, run = {}, {}
    for number in range(20):
        judged = draws.choice(documents, size=draws.integers(3, 40), replace=False)
        judgements[f"q{number}"] = {name: int(draws.integers(0, 4)) for name in judged} | {documents[number]: 1}
        scores = np.sort(draws.integers(0, 50, size=150))[::-1]  # many ties
        run[f"q{number}"] = list(zip(draws.permutation(documents)[:150], map(float, scores), strict=True))
    scores = score_run(run, judgements)
    for query, values in scores.per_query.items():
        assert values["nDCG@10"] == pytest.approx(ndcg_at_10(run[query], judgements[query]), abs=1e-6)
        assert values["Recall@100"] == pytest.approx(recall_at_100(run[query], judgements[query]), abs=1e-6)
        assert values["MRR@10"] == pytest.approx(mrr_at_10(run[query], judgements[query]), abs=1e-6)
    for name in METRICS:
        assert scores.means[name] == pytest.approx(np.mean([each[name] for each in scores.per_query.values()]))


def test_equal_scores_count_in_the_order_of_the_run():
    """Left to itself trec_eval orders ties by document id."""
    scores = score_run({"q": [("a", 1.0), ("z", 1.0)]}, {"q": {"a": 1}})
    assert scores.means["MRR@10"] == 1.0
    assert score_run({"q": [("z", 1.0), ("a", 1.0)]}, {"q": {"a": 1}}).means["MRR@10"] == 0.5


def test_mrr_sees_ten_documents_and_recall_a_hundred():
    run = {"q": [(f"d{place}", 200.0 - place) for place in range(1, 151)]}
    assert score_run(run, {"q": {"d10": 1}}).means["MRR@10"] == pytest.approx(0.1)
    assert score_run(run, {"q": {"d11": 1}}).means["MRR@10"] == 0.0
    assert score_run(run, {"q": {"d100": 1, "d101": 1}}).means["Recall@100"] == 0.5


def test_queries_without_a_relevant_document_are_left_out_and_counted():
    run = {"a": [("x", 1.0)], "b": [("x", 1.0)]}
    scores = score_run(run, {"a": {"x": 2}, "b": {"x": 0}})
    assert scores.left_out == 1 and list(scores.per_query) == ["a"] and scores.means["nDCG@10"] == 1.0


def test_a_query_that_found_nothing_scores_zero():
    scores = score_run({"a": [("x", 1.0)], "b": []}, {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}})
    assert scores.means["Recall@100"] == pytest.approx(1 / 3)


def test_judgements_without_anything_relevant_are_a_mistake_in_words():
    with pytest.raises(ValueError, match="None of the 1 judged queries"):
        score_run({}, {"a": {"x": 0}})
